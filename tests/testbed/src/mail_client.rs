//! Clients: SMTP by lettre, IMAP by async-imap, each inside a namespace.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use futures::TryStreamExt;
use lettre::address::Envelope;
use lettre::transport::smtp::authentication::{Credentials, Mechanism};
use lettre::transport::smtp::client::{Certificate, SmtpConnection, TlsParameters, TlsParametersBuilder};
use lettre::transport::smtp::extension::ClientId;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::certificate::MAIL_NAME;
use crate::dovecot::PASSWORD;
use crate::message::{DOMAIN, Message};
use crate::netns::Netns;
use crate::service::Security;

/// Time limit of each step of a client; longer than the receivers' own limits, so that these are
/// detected.
const TIMEOUT: Duration = Duration::from_secs(20);

/// The server of a client, and the trusted authority.
#[derive(Clone, Copy, Debug)]
pub struct Server<'a> {
    /// The address.
    pub address: SocketAddr,
    /// The authority to trust, PEM.
    pub authority_pem: &'a str,
}

/// Sends a message to `user` and returns the server's queue id. On secured connections it logs in
/// as that user, because those are submission ports.
///
/// # Errors
/// When any command fails.
pub fn send(
    netns: &Netns,
    server: Server<'_>,
    security: Security,
    user: &str,
    message: &Message,
) -> anyhow::Result<String> {
    netns
        .run(|| {
            let login = (security != Security::Plain).then_some(user);
            let reply = send_here(server, security, user, login, message)?;
            let queue_id = reply.split_once("queued as ").map(|(_, id)| id.trim().to_owned());
            queue_id.with_context(|| format!("no queue id in: {reply}"))
        })?
        .with_context(|| format!("cannot send a message to {}", server.address))
}

/// Sends a message to `user`, without a login, to a server of any kind.
///
/// # Errors
/// When any command fails.
pub fn send_without_login(
    netns: &Netns,
    server: Server<'_>,
    security: Security,
    user: &str,
    message: &Message,
) -> anyhow::Result<()> {
    netns
        .run(|| send_here(server, security, user, None, message).map(drop))?
        .with_context(|| format!("cannot send a message to {}", server.address))
}

/// Logs in, and no more. The error has the server's answer.
///
/// # Errors
/// When the server rejects the password, or before.
pub fn log_in(
    netns: &Netns,
    server: Server<'_>,
    security: Security,
    user: &str,
    password: &str,
) -> anyhow::Result<()> {
    let log_in =
        || -> anyhow::Result<_> { Ok(connect_here(server, security, Some((user, password)))?.quit()?) };
    netns.run(log_in)?.map(drop).with_context(|| format!("cannot log in at {}", server.address))
}

/// As [`send`], from the namespace of the calling thread, with a login as that user if there is one.
/// Returns the reply to the message.
///
/// # Errors
/// When any command fails.
pub fn send_here(
    server: Server<'_>,
    security: Security,
    user: &str,
    login: Option<&str>,
    message: &Message,
) -> anyhow::Result<String> {
    let mut connection = connect_here(server, security, login.map(|user| (user, PASSWORD)))?;
    let sender = "sender@client.example.test".parse()?;
    let envelope = Envelope::new(Some(sender), vec![format!("{user}@{DOMAIN}").parse()?])?;
    // lettre ends every message with CRLF and a dot, whether it ends with CRLF or not.
    let text = message.bytes.strip_suffix(b"\r\n").context("a message has to end with CRLF")?;
    let response = connection.send(&envelope, text)?;
    connection.quit()?;
    Ok(response.message().collect::<Vec<_>>().join(" "))
}

/// A connection, after the login if there is one.
fn connect_here(
    server: Server<'_>,
    security: Security,
    login: Option<(&str, &str)>,
) -> anyhow::Result<SmtpConnection> {
    let hello = ClientId::Domain("client.example.test".to_owned());
    let tls = tls_parameters(server.authority_pem)?;
    let at_once = (security == Security::ImplicitTls).then_some(&tls);
    let mut connection = SmtpConnection::connect(server.address, Some(TIMEOUT), &hello, at_once, None)?;
    if security == Security::StartTls {
        connection.starttls(&tls, &hello)?;
    }
    if let Some((user, password)) = login {
        let credentials = Credentials::new(user.to_owned(), password.to_owned());
        connection.auth(&[Mechanism::Plain], &credentials)?;
    }
    Ok(connection)
}

fn tls_parameters(authority_pem: &str) -> anyhow::Result<TlsParameters> {
    let authority = Certificate::from_pem(authority_pem.as_bytes())?;
    Ok(TlsParametersBuilder::new(MAIL_NAME.to_owned()).add_root_certificate(authority).build_rustls()?)
}

/// The result of an IMAP session.
#[derive(Debug)]
pub struct Mailbox {
    /// All messages of the inbox, oldest first, as the server stores them.
    pub messages: Vec<Vec<u8>>,
    /// The local address of the client: what the server must have logged.
    pub client: SocketAddr,
}

/// Logs in by IMAP over TLS, appends the given messages, and fetches the whole inbox.
///
/// # Errors
/// When any command fails, or all of it takes longer than twenty seconds.
pub fn read_inbox(
    netns: &Netns,
    server: Server<'_>,
    user: &str,
    append: &[&Message],
) -> anyhow::Result<Mailbox> {
    let session = async {
        let session = tokio::time::timeout(TIMEOUT, read_inbox_here(server, user, append)).await;
        session.map_err(|_| anyhow!("not done after {TIMEOUT:?}"))?
    };
    let mailbox = netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(session)
    })?;
    mailbox.with_context(|| format!("cannot read the inbox of {user} at {}", server.address))
}

/// As [`read_inbox`], from the namespace of the calling thread and without a limit of time.
///
/// # Errors
/// When any command fails.
pub async fn read_inbox_here(server: Server<'_>, user: &str, append: &[&Message]) -> anyhow::Result<Mailbox> {
    let tcp = TcpStream::connect(server.address).await?;
    let client = tcp.local_addr()?;
    let mut imap = async_imap::Client::new(secure(tcp, server.authority_pem).await?);
    imap.read_response().await?.context("no greeting")?;
    let mut session = imap.login(user, PASSWORD).await.map_err(|(error, _)| error)?;
    for message in append {
        session.append("INBOX", None, None, &message.bytes).await?;
    }
    let inbox = session.select("INBOX").await?;
    let mut messages = Vec::new();
    // A range in an empty mailbox would be an error.
    if inbox.exists > 0 {
        let fetched: Vec<_> = session.fetch("1:*", "BODY.PEEK[]").await?.try_collect().await?;
        messages.extend(fetched.iter().filter_map(|fetch| fetch.body()).map(<[u8]>::to_vec));
    }
    session.logout().await?;
    Ok(Mailbox { messages, client })
}

/// TLS that verifies the mail host's name and certificate.
async fn secure(tcp: TcpStream, authority_pem: &str) -> anyhow::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(
        CertificateDer::from_pem_slice(authority_pem.as_bytes()).map_err(|error| anyhow!("{error:?}"))?,
    )?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let config = config.with_root_certificates(roots).with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(MAIL_NAME)?, tcp).await?)
}
