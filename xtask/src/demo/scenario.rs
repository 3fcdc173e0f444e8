//! The demo's scenario: a message is sent and fetched again, observed at the client, the backend
//! and the injector.

use std::net::SocketAddr;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context as _, Result};
use injector_testbed::demo_backend::client::{self, Route};
use injector_testbed::demo_backend::{Backend, Visit};
use injector_testbed::message::{DOMAIN, Message};
use injector_testbed::metrics::Metrics;
use injector_testbed::netns::Family;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::injector::Injector;
use super::service::{IMAP, SMTP, Service};
use super::testbed::Testbed;

/// How long the backend may take to close a connection and record it.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);

/// The owner of the mailbox.
const USER: &str = "demo";

/// Everything that was observed.
pub(super) struct Run {
    /// The connection straight to the backend, without a header.
    pub(super) without_header: Visit,
    /// One per family.
    pub(super) scenarios: Vec<Scenario>,
    /// The injector's metrics before the first scenario.
    pub(super) before: Metrics,
    /// The injector's metrics after the last scenario.
    pub(super) after: Metrics,
    /// The daemon's exit status after SIGTERM.
    pub(super) stopped: ExitStatus,
}

/// A message sent over SMTP and fetched over IMAP, in one family.
pub(super) struct Scenario {
    /// The address family.
    pub(super) family: Family,
    /// The message as sent.
    pub(super) sent: Vec<u8>,
    /// As the backend stored it.
    pub(super) stored: Vec<u8>,
    /// As the client fetched it.
    pub(super) fetched: Vec<u8>,
    /// The two connections, SMTP first.
    pub(super) transactions: [Transaction; 2],
}

/// One connection from three points of view.
pub(super) struct Transaction {
    /// Its protocol.
    pub(super) service: Service,
    /// The client's own address: the expected value.
    pub(super) client: SocketAddr,
    /// The address that it connected to.
    pub(super) listener: SocketAddr,
    /// What the backend saw.
    pub(super) visit: Visit,
    /// The injector's access log line, fields by name.
    pub(super) line: Value,
}

impl Run {
    /// All connections through the injector.
    pub(super) fn transactions(&self) -> impl Iterator<Item = &Transaction> {
        self.scenarios.iter().flat_map(|scenario| &scenario.transactions)
    }
}

impl Transaction {
    /// A number in the access log line; 0 if the field is missing.
    pub(super) fn logged(&self, field: &str) -> u64 {
        self.line[field].as_u64().unwrap_or(0)
    }

    /// The listener's name in the injector's configuration.
    pub(super) fn listener_name(&self) -> String {
        let family = if self.listener.is_ipv4() { Family::V4 } else { Family::V6 };
        self.service.listener_name(family)
    }
}

/// Connects straight to the backend's SMTP port, past the injector, and sends no header.
pub(super) async fn connect_without_header(testbed: &Testbed, backend: &Backend) -> Result<Visit> {
    let before = backend.visits().borrow().len();
    let to = *backend.smtp().first().context("the backend has no SMTP address")?;
    let knock = async move {
        let mut stream = TcpStream::connect(to).await?;
        stream.write_all(b"EHLO uninvited.example\r\n").await?;
        // The backend closes without reading our line, which arrives here as a reset. What it
        // received is in its record.
        let _reset = stream.read_to_end(&mut Vec::new()).await;
        anyhow::Ok(())
    };
    testbed.edge.run(timeout(TIMEOUT, knock)).await???;
    visit(backend, before).await
}

/// Sends a message through the injector, and fetches it through the injector.
pub(super) async fn run(
    testbed: &Testbed,
    backend: &Backend,
    injector: &mut Injector,
    family: Family,
    account: &(String, String),
) -> Result<Scenario> {
    let Sent { sent, stored, transaction: smtp } = send(testbed, backend, injector, SMTP, family).await?;
    let (imap, fetched) = fetch(testbed, backend, injector, family, account).await?;
    Ok(Scenario { family, sent, stored, fetched, transactions: [smtp, imap] })
}

/// A message that was sent.
pub(super) struct Sent {
    /// As sent.
    pub(super) sent: Vec<u8>,
    /// As the backend stored it.
    pub(super) stored: Vec<u8>,
    /// Its connection.
    pub(super) transaction: Transaction,
}

/// Sends a message through the injector.
pub(super) async fn send(
    testbed: &Testbed,
    backend: &Backend,
    injector: &mut Injector,
    service: Service,
    family: Family,
) -> Result<Sent> {
    let before = backend.visits().borrow().len();
    let listener = testbed.listener(service, family);
    let route = Route { from: Some(testbed.client_ip(family)), ..Route::to(listener) };
    let sent = Message::new(&format!("demo-{}", service.listener_name(family)), USER).bytes;
    let message = sent.clone();
    let recipient = format!("{USER}@{DOMAIN}");
    let work = async move { client::send(&route, "sender@client.example.test", &recipient, &message).await };
    let client = testbed.client.run(work).await?.map_err(|error| with_refusals(error, backend, before))?;
    let visit = visit(backend, before).await?;
    let stored = backend.messages().pop().context("the backend has no message")?.content;
    let line = injector.access_log_line(client).await?;
    Ok(Sent { sent, stored, transaction: Transaction { service, client, listener, visit, line } })
}

async fn fetch(
    testbed: &Testbed,
    backend: &Backend,
    injector: &mut Injector,
    family: Family,
    account: &(String, String),
) -> Result<(Transaction, Vec<u8>)> {
    let before = backend.visits().borrow().len();
    let listener = testbed.listener(IMAP, family);
    let route = Route { from: Some(testbed.client_ip(family)), ..Route::to(listener) };
    let account = account.clone();
    let work = async move { client::fetch(&route, &account).await };
    let fetched = testbed.client.run(work).await?.map_err(|error| with_refusals(error, backend, before))?;
    let visit = visit(backend, before).await?;
    let line = injector.access_log_line(fetched.local).await?;
    let transaction = Transaction { service: IMAP, client: fetched.local, listener, visit, line };
    Ok((transaction, fetched.newest))
}

/// Adds the backend's first refusal after `before` connections to a client's error, because it may
/// be the cause.
fn with_refusals(error: anyhow::Error, backend: &Backend, before: usize) -> anyhow::Error {
    let visits = backend.visits();
    let refusals: Vec<_> =
        visits.borrow().iter().skip(before).filter_map(|visit| visit.header.clone().err()).collect();
    match refusals.first() {
        Some(refusal) => error.context(format!("the backend refused the connection ({refusal})")),
        None => error,
    }
}

/// The backend's record of the first connection after `before` others.
async fn visit(backend: &Backend, before: usize) -> Result<Visit> {
    let mut visits = backend.visits();
    let seen = timeout(TIMEOUT, visits.wait_for(|visits| visits.len() > before)).await;
    let seen = seen.context("the backend did not see the connection end")??;
    seen.get(before).cloned().context("the backend has lost a record")
}
