//! The external path: the client sends and reads through a front, and the mail servers must log the
//! client's address.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use injector_testbed::daemon::{
    BYTES, DIRECTION, HEADERS_FAILED, HEADERS_SENT, Injector, PIPED, PLANE, RELAYED, SPLICED, Session,
    TO_BACKEND, TO_CLIENT,
};
use injector_testbed::mail_client;
use injector_testbed::message::Message;
use injector_testbed::metrics::Metrics;
use injector_testbed::netns::{CLIENT, Family};
use injector_testbed::service::{IMAPS, SMTP, Service};

use crate::testbed::{Front, Running, Testbed};

/// How long a server's log line, a delivery or a metric may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Close reasons that client and server can cause after their last replies: the side that closes
/// while the other's TLS close_notify is in flight resets. Any other reason is the injector's.
pub(crate) const HARMLESS_ENDS: [&str; 4] =
    ["client_closed", "backend_closed", "client_reset", "backend_reset"];

/// A message is sent to one of the SMTP ports, is stored unchanged, and is read by IMAP.
pub(crate) fn smtp(testbed: &Testbed, front: usize, service: Service, family: Family) -> anyhow::Result<()> {
    let (front, running) = testbed.front(front)?;
    let user = format!("{}-{}-{}", front.name, family.name(), service.standard);
    let message = Message::new(&user, &user);
    let watch = Watch::start(running)?;

    let sender = send(testbed, front, service, family, &message, &user)?;
    let reader = fetch(testbed, front, family, &message, &user)?;
    watch.ensure_carried(front, &[sender, reader], &message)
}

/// A message is appended and read in one IMAP session.
pub(crate) fn imap(testbed: &Testbed, front: usize, family: Family) -> anyhow::Result<()> {
    let (front, running) = testbed.front(front)?;
    let user = format!("{}-{}-{}", front.name, family.name(), IMAPS.standard);
    let message = Message::new(&user, &user);
    let watch = Watch::start(running)?;

    let reader = read(testbed, front, family, &message, &user, &[&message])?;
    watch.ensure_carried(front, &[reader], &message)
}

/// Sends from the client's network and returns the sender address that Postfix logged.
pub(crate) fn send(
    testbed: &Testbed,
    front: Front,
    service: Service,
    family: Family,
    message: &Message,
    user: &str,
) -> anyhow::Result<SocketAddr> {
    let postfix = &testbed.host.postfix;
    let mark = postfix.log().mark();
    let server = testbed.server(front.vip, family, service.standard);
    let queue_id = mail_client::send(&testbed.topology.client, server, service.security, user, message)?;

    let sender = postfix.client_of(mark, &queue_id, service.proxied, LIMIT)?;
    ensure!(sender.ip() == CLIENT.of(family), "Postfix saw {sender}, the client is {}", CLIENT.of(family));
    if service == SMTP {
        // postscreen read the header itself: the source, and the address that the client connected
        // to.
        let seen = format!("CONNECT from {} to {}", bracketed(sender), bracketed(server.address));
        postfix.log().wait_for(mark, &["postscreen[", &seen], LIMIT)?;
    }
    postfix.wait_delivered(mark, &queue_id, LIMIT)?;
    Ok(sender)
}

/// Fetches the message by IMAP, from the client's network, and returns the reader's address.
pub(crate) fn fetch(
    testbed: &Testbed,
    front: Front,
    family: Family,
    message: &Message,
    user: &str,
) -> anyhow::Result<SocketAddr> {
    read(testbed, front, family, message, user, &[])
}

fn read(
    testbed: &Testbed,
    front: Front,
    family: Family,
    message: &Message,
    user: &str,
    append: &[&Message],
) -> anyhow::Result<SocketAddr> {
    let dovecot = &testbed.host.dovecot;
    let mark = dovecot.log().mark();
    let server = testbed.server(front.vip, family, IMAPS.standard);
    let mailbox = mail_client::read_inbox(&testbed.topology.client, server, user, append)?;

    let seen = dovecot.client_of(mark, user, LIMIT)?;
    ensure!(seen == mailbox.client, "Dovecot saw {seen}, the client was {}", mailbox.client);
    ensure!(seen.ip() == CLIENT.of(family), "the client was at {seen}, not at {}", CLIENT.of(family));
    let lip = format!("lip={}, lport={}", server.address.ip(), server.address.port());
    dovecot.log().wait_for(mark, &[&format!("user=<{user}>"), &lip], LIMIT)?;

    let [fetched] = &mailbox.messages[..] else {
        anyhow::bail!("{} messages in the inbox of {user}, not one", mailbox.messages.len());
    };
    message.ensure_unchanged(fetched)?;
    Ok(seen)
}

/// `[ADDRESS]:PORT`, as postscreen writes either family.
fn bracketed(address: SocketAddr) -> String {
    format!("[{}]:{}", address.ip(), address.port())
}

/// What an injector had counted before a trial. HAProxy has no such counters.
pub(crate) struct Watch<'a> {
    injector: Option<(&'a Injector, Metrics, usize)>,
}

impl<'a> Watch<'a> {
    pub(crate) fn start(running: &'a Running) -> anyhow::Result<Self> {
        let injector = match running {
            Running::HaProxy(_) => None,
            Running::Injector(injector) | Running::Inline { injector, .. } => {
                Some((injector, injector.metrics()?, injector.sessions()?.len()))
            }
        };
        Ok(Self { injector })
    }

    /// Every connection got its header, ended normally, and has one log line.
    pub(crate) fn ensure_ended(&self, front: Front, clients: &[SocketAddr]) -> anyhow::Result<()> {
        let Some((injector, before, earlier)) = &self.injector else { return Ok(()) };
        for session in wait_for_sessions(injector, *earlier, clients.len())? {
            let client = session.client().with_context(|| format!("no client in {session:?}"))?;
            ensure!(clients.contains(&client), "{client} is none of the clients {clients:?}");
            ensure!(
                session.field("engine").as_deref() == Some(front.engine),
                "not by {}: {session:?}",
                front.engine
            );
            let end = session.field("reason").unwrap_or_default();
            ensure!(HARMLESS_ENDS.contains(&end.as_str()), "ended with {end:?}: {session:?}");
        }
        let after = injector.metrics()?;
        let added = |name| after.sum(name, &[]) - before.sum(name, &[]);
        let (sent, failed) = (added(HEADERS_SENT), added(HEADERS_FAILED));
        let expected = f64::from(u32::try_from(clients.len())?);
        ensure!(
            sent == expected && failed == 0.0,
            "{sent} headers sent, {failed} failed, for {expected} connections"
        );
        Ok(())
    }

    /// As [`Self::ensure_ended`], and the engine's data path carried the message in both
    /// directions.
    fn ensure_carried(&self, front: Front, clients: &[SocketAddr], message: &Message) -> anyhow::Result<()> {
        self.ensure_ended(front, clients)?;
        let Some((injector, before, _)) = &self.injector else { return Ok(()) };
        ensure_counted(front, before, &injector.metrics()?, message)
    }
}

/// Waits for the log lines of finished connections; one line more is an error as well.
fn wait_for_sessions(injector: &Injector, earlier: usize, expected: usize) -> anyhow::Result<Vec<Session>> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let sessions = injector.sessions()?.split_off(earlier);
        if sessions.len() >= expected || Instant::now() >= deadline {
            let count = sessions.len();
            ensure!(count == expected, "{count} lines for {expected} finished connections: {sessions:?}");
            return Ok(sessions);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// The bytes of the message are in the counters of the right data path, in both directions.
///
/// TLS and protocol bytes are added. With splice the first bytes of a direction go through user
/// space; up to half of the message is allowed for that.
fn ensure_counted(front: Front, before: &Metrics, after: &Metrics, message: &Message) -> anyhow::Result<()> {
    let size = f64::from(u32::try_from(message.bytes.len())?);
    for direction in [TO_BACKEND, TO_CLIENT] {
        let moved = |plane| {
            let labels = [(DIRECTION, direction), (PLANE, plane)];
            after.sum(BYTES, &labels) - before.sum(BYTES, &labels)
        };
        let (spliced, relayed) = (moved(SPLICED), moved(RELAYED) + moved(PIPED));
        let counted = format!("{BYTES} {direction}: {spliced} spliced, {relayed} relayed, of {size}");
        ensure!(spliced + relayed >= size, "bytes not counted: {counted}");
        match front.name {
            "relay" => ensure!(spliced == 0.0, "spliced without splice: {counted}"),
            _ => ensure!(spliced >= size / 2.0, "not spliced: {counted}"),
        }
    }
    Ok(())
}
