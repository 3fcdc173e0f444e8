//! The clients that test the backend, directly and through the injector: well-known crates, not
//! code that was written to agree with the backend.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use futures::TryStreamExt;
use lettre::address::Envelope;
use lettre::transport::smtp::client::AsyncSmtpConnection;
use lettre::transport::smtp::extension::ClientId;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};

/// Time limit of one whole conversation.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Source and destination of a client's connection, and what it sends before the protocol starts.
#[derive(Clone, Debug)]
pub struct Route {
    /// The local address to use; `None` for any.
    pub from: Option<IpAddr>,
    /// The server.
    pub to: SocketAddr,
    /// Sent first, in one write: empty through an injector, a PROXY header directly to the backend.
    pub preamble: Vec<u8>,
}

impl Route {
    /// To a server, with no bytes before the protocol and any local address.
    #[must_use]
    pub fn to(to: SocketAddr) -> Self {
        Self { from: None, to, preamble: Vec::new() }
    }

    async fn connect(&self) -> anyhow::Result<TcpStream> {
        let socket = if self.to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        if let Some(from) = self.from {
            socket
                .bind(SocketAddr::new(from, 0))
                .with_context(|| format!("cannot use the address {from}"))?;
        }
        let mut stream =
            socket.connect(self.to).await.with_context(|| format!("cannot connect to {}", self.to))?;
        stream.set_nodelay(true)?;
        stream.write_all(&self.preamble).await?;
        Ok(stream)
    }
}

/// Sends one message over SMTP, with the envelope addresses `from` and `to`; returns the local
/// address of the connection.
///
/// `content` must end with CRLF, and is what the server will store: lettre adds a CRLF before the
/// final dot, so the last CRLF is omitted.
///
/// # Errors
/// When the connection or any SMTP command fails, or the conversation takes more than 20 s.
pub async fn send(route: &Route, from: &str, to: &str, content: &[u8]) -> anyhow::Result<SocketAddr> {
    let envelope = Envelope::new(Some(from.parse()?), vec![to.parse()?])?;
    let content = content.strip_suffix(b"\r\n").context("a message ends with CRLF")?;
    let conversation = async {
        let stream = route.connect().await?;
        let local = stream.local_addr()?;
        let hello = ClientId::Domain("client.example".to_owned());
        let mut smtp = AsyncSmtpConnection::connect_with_transport(Box::new(stream), &hello).await?;
        smtp.send(&envelope, content).await?;
        smtp.quit().await?;
        Ok(local)
    };
    with_timeout(conversation).await.with_context(|| format!("sending to {}", route.to))
}

/// The result of [`fetch`].
#[derive(Debug)]
pub struct Fetched {
    /// The local address of the connection.
    pub local: SocketAddr,
    /// The number of messages in the INBOX.
    pub exists: u32,
    /// The newest message, complete.
    pub newest: Vec<u8>,
}

/// Logs in over IMAP and fetches the newest message of the INBOX.
///
/// # Errors
/// When the connection or any IMAP command fails, the INBOX is empty, or the conversation takes
/// more than 20 s.
pub async fn fetch(route: &Route, account: &(String, String)) -> anyhow::Result<Fetched> {
    let conversation = async {
        let stream = route.connect().await?;
        let local = stream.local_addr()?;
        let mut imap = async_imap::Client::new(stream);
        imap.read_response().await?.context("closed before the greeting")?;
        let mut session = imap.login(&account.0, &account.1).await.map_err(|(error, _client)| error)?;
        let exists = session.select("INBOX").await?.exists;
        ensure!(exists > 0, "the INBOX is empty");
        let messages: Vec<_> = session.fetch("*", "(UID RFC822.SIZE BODY[])").await?.try_collect().await?;
        let newest = messages.last().and_then(|message| message.body()).map(<[u8]>::to_vec);
        session.logout().await?;
        Ok(Fetched { local, exists, newest: newest.ok_or_else(|| anyhow!("FETCH brought no body"))? })
    };
    with_timeout(conversation).await.with_context(|| format!("fetching from {}", route.to))
}

async fn with_timeout<T>(conversation: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let done = tokio::time::timeout(TIMEOUT, conversation).await;
    done.map_err(|_| anyhow!("not over after {TIMEOUT:?}"))?
}
