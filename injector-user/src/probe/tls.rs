//! TCP and TLS for both protocols, and which certificates to trust.

use std::{fmt::Debug, fs, net::SocketAddr, path::Path, sync::Arc};

use anyhow::{Context as _, Result, anyhow, ensure};
use lettre::transport::smtp::client::{
    AsyncTokioStream, Certificate, CertificateStore, TlsParameters, TlsParametersBuilder,
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::args::Server;
use crate::net::tls;

/// A connection, in clear text or TLS.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin + Debug {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin + Debug> Stream for T {}

/// Connects to a server, by each address of its name in turn.
pub(super) async fn connect(server: &Server) -> Result<TcpStream> {
    let connected = TcpStream::connect((server.host.as_str(), server.port)).await;
    let stream = connected.with_context(|| format!("cannot connect to {server}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Which certificates to trust.
#[derive(Clone, Debug)]
pub(super) enum Trust {
    /// Mozilla's list.
    Mozilla,
    /// These authorities.
    Authorities(Vec<CertificateDer<'static>>),
    /// Any certificate.
    AcceptAnyCertificate,
}

impl Trust {
    /// From the command line's flags.
    pub(super) fn new(authorities: Option<&Path>, insecure: bool) -> Result<Self> {
        if insecure {
            return Ok(Self::AcceptAnyCertificate);
        }
        let Some(file) = authorities else { return Ok(Self::Mozilla) };
        let read = || -> Result<Vec<_>> {
            let pem = fs::read(file)?;
            let certificates = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
            let certificates = certificates.map_err(|error| anyhow!("{error:?}"))?;
            ensure!(!certificates.is_empty(), "it contains no certificate");
            Ok(certificates)
        };
        read()
            .map(Self::Authorities)
            .with_context(|| format!("cannot read the authorities in {}", file.display()))
    }

    /// Starts TLS with the server that must prove this name.
    pub(super) async fn secure<S: Stream>(&self, stream: S, name: &str) -> Result<TlsStream<S>> {
        let config = self.client_config()?;
        let server = ServerName::try_from(name.to_owned())
            .with_context(|| format!("{name:?} is not a valid TLS server name"))?;
        let secured = TlsConnector::from(Arc::new(config)).connect(server, stream).await;
        secured.with_context(|| format!("the TLS handshake with {name:?} failed"))
    }

    /// The same parameters for lettre, which starts TLS itself after STARTTLS.
    pub(super) fn lettre_parameters(&self, name: &str) -> Result<TlsParameters> {
        let mut builder = TlsParametersBuilder::new(name.to_owned());
        match self {
            Self::Mozilla => builder = builder.certificate_store(CertificateStore::WebpkiRoots),
            Self::Authorities(certificates) => {
                builder = builder.certificate_store(CertificateStore::None);
                for certificate in certificates {
                    builder = builder.add_root_certificate(Certificate::from_der(certificate.to_vec())?);
                }
            }
            Self::AcceptAnyCertificate => {
                builder =
                    builder.dangerous_accept_invalid_certs(true).dangerous_accept_invalid_hostnames(true);
            }
        }
        Ok(builder.build_rustls()?)
    }

    fn client_config(&self) -> Result<ClientConfig> {
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions()?;
        let roots = match self {
            Self::Mozilla => RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() },
            Self::Authorities(certificates) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates {
                    roots
                        .add(certificate.clone())
                        .context("a certificate in --ca is not a valid authority")?;
                }
                roots
            }
            Self::AcceptAnyCertificate => return Ok(tls::unverified_config()?),
        };
        Ok(builder.with_root_certificates(roots).with_no_client_auth())
    }
}

/// A TLS connection that lettre accepts.
#[derive(Debug)]
pub(super) struct LettreStream {
    pub(super) stream: TlsStream<TcpStream>,
}

impl AsyncTokioStream for LettreStream {
    fn peer_addr(&self) -> std::io::Result<SocketAddr> {
        self.stream.get_ref().0.peer_addr()
    }
}

impl AsyncRead for LettreStream {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for LettreStream {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
