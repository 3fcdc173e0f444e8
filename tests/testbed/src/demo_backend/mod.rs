//! A small in-memory mail backend that *requires* a PROXY protocol header: the demo and the tests
//! put it behind the injector where a whole Postfix and Dovecot would distract.
//!
//! It reads the header the way Postfix does, complete in one read, speaks enough SMTP to accept
//! mail and enough IMAP to return it, and records a [`Visit`] for every connection: the header's
//! bytes, the client that it names, and the actual TCP peer.
//!
//! ```no_run
//! # async fn example() -> std::io::Result<()> {
//! use injector_testbed::demo_backend::{Backend, Config};
//!
//! let config = Config { smtp: vec!["127.0.0.1:0".parse().unwrap()], ..Config::default() };
//! let backend = Backend::start(config).await?;
//! let mut visits = backend.visits();
//! // … a client comes through the injector …
//! let seen = visits.wait_for(|visits| !visits.is_empty()).await.unwrap();
//! println!("{:?}", seen[0].header);
//! # Ok(())
//! # }
//! ```

pub mod client;
mod header_check;
mod imap;
#[cfg(test)]
mod loopback;
mod smtp;
mod wire;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

pub use header_check::{Header, HeaderError};
use wire::Wire;

/// The protocol on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// RFC 5321, the server speaks first.
    Smtp,
    /// RFC 3501 without TLS, the server speaks first.
    Imap,
}

/// Where the backend listens, and its account.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses for SMTP; port 0 selects a free one.
    pub smtp: Vec<SocketAddr>,
    /// Addresses for IMAP; port 0 selects a free one.
    pub imap: Vec<SocketAddr>,
    /// The only account: user name and password for `LOGIN`.
    pub account: (String, String),
    /// Time limit for the header of a connection.
    pub header_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            smtp: Vec::new(),
            imap: Vec::new(),
            account: ("demo".to_owned(), "let me in".to_owned()),
            // Dovecot's limit; Postfix waits 5 s.
            header_timeout: Duration::from_secs(3),
        }
    }
}

/// A message received over SMTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The address in `MAIL FROM`, empty for a bounce.
    pub from: String,
    /// The addresses in `RCPT TO`, in order.
    pub to: Vec<String>,
    /// Header and body as sent, without dot-stuffing, every line ended by CRLF. Nothing is added,
    /// not even `Received:`.
    pub content: Vec<u8>,
}

/// One connection that has ended.
#[derive(Clone, Debug)]
pub struct Visit {
    /// The port's protocol.
    pub protocol: Protocol,
    /// The TCP peer: all that the backend would know without a header.
    pub peer: SocketAddr,
    /// The header, or why the connection was rejected.
    pub header: Result<Header, HeaderError>,
    /// Bytes read after the header.
    pub received: u64,
    /// Bytes written.
    pub sent: u64,
}

/// A running backend; dropping it ends every connection and closes the ports.
#[derive(Debug)]
pub struct Backend {
    smtp: Vec<SocketAddr>,
    imap: Vec<SocketAddr>,
    shared: Arc<Shared>,
    visits: watch::Receiver<Vec<Visit>>,
    _listeners: JoinSet<()>,
}

/// What all connections of one backend share.
#[derive(Debug)]
struct Shared {
    account: (String, String),
    header_timeout: Duration,
    mailbox: Mutex<Vec<Message>>,
    visits: watch::Sender<Vec<Visit>>,
}

impl Backend {
    /// Binds every address and serves on the current runtime, in the network namespace of the
    /// calling thread.
    ///
    /// # Errors
    /// When an address cannot be bound; the error names it.
    pub async fn start(config: Config) -> io::Result<Self> {
        let (sender, visits) = watch::channel(Vec::new());
        let shared = Arc::new(Shared {
            account: config.account,
            header_timeout: config.header_timeout,
            mailbox: Mutex::default(),
            visits: sender,
        });
        let mut listeners = JoinSet::new();
        let smtp = listen(&mut listeners, &shared, Protocol::Smtp, &config.smtp).await?;
        let imap = listen(&mut listeners, &shared, Protocol::Imap, &config.imap).await?;
        Ok(Self { smtp, imap, shared, visits, _listeners: listeners })
    }

    /// The bound SMTP addresses, in the requested order.
    #[must_use]
    pub fn smtp(&self) -> &[SocketAddr] {
        &self.smtp
    }

    /// The bound IMAP addresses, in the requested order.
    #[must_use]
    pub fn imap(&self) -> &[SocketAddr] {
        &self.imap
    }

    /// The messages received so far, oldest first; their IMAP sequence numbers and UIDs start at 1.
    #[must_use]
    pub fn messages(&self) -> Vec<Message> {
        self.shared.mailbox().clone()
    }

    /// Every connection that has ended, oldest first; wait for one with
    /// [`watch::Receiver::wait_for`], from any runtime.
    #[must_use]
    pub fn visits(&self) -> watch::Receiver<Vec<Visit>> {
        self.visits.clone()
    }
}

impl Shared {
    /// A thread that panicked while it held the lock cannot have left a partial message: pushing is
    /// the only change.
    fn mailbox(&self) -> MutexGuard<'_, Vec<Message>> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn listen(
    listeners: &mut JoinSet<()>,
    shared: &Arc<Shared>,
    protocol: Protocol,
    addresses: &[SocketAddr],
) -> io::Result<Vec<SocketAddr>> {
    let mut bound = Vec::with_capacity(addresses.len());
    for address in addresses {
        let named =
            |error: io::Error| io::Error::new(error.kind(), format!("demo backend on {address}: {error}"));
        let listener = TcpListener::bind(address).await.map_err(named)?;
        bound.push(listener.local_addr()?);
        listeners.spawn(accept(listener, protocol, Arc::clone(shared)));
    }
    Ok(bound)
}

/// Accepts until it is aborted, and ends its connections with it.
async fn accept(listener: TcpListener, protocol: Protocol, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                connections.spawn(receive(stream, peer, protocol, Arc::clone(&shared)));
            }
            // Out of descriptors, or the client closed before it was accepted: an immediate retry
            // helps neither.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
        while connections.try_join_next().is_some() {}
    }
}

/// One connection: header, protocol, record.
async fn receive(mut stream: TcpStream, peer: SocketAddr, protocol: Protocol, shared: Arc<Shared>) {
    let header = header_check::receive(&mut stream, shared.header_timeout).await;
    let mut wire = Wire::new(stream);
    if header.is_ok() {
        // A connection that breaks is recorded like one that completes: the byte counts distinguish
        // them.
        let _broken = serve(&mut wire, protocol, &shared).await;
    }
    let visit = Visit { protocol, peer, header, received: wire.received(), sent: wire.sent() };
    drop(wire);
    shared.visits.send_modify(|visits| visits.push(visit));
}

fn serve<'a>(
    wire: &'a mut Wire,
    protocol: Protocol,
    shared: &'a Shared,
) -> std::pin::Pin<Box<dyn Future<Output = io::Result<()>> + Send + 'a>> {
    match protocol {
        Protocol::Smtp => Box::pin(smtp::serve(wire, shared)),
        Protocol::Imap => Box::pin(imap::serve(wire, shared)),
    }
}
