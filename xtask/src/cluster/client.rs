//! Mail clients outside the cluster, and what the mail server says of them.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use injector_testbed::{
    mail_client::{self, Server},
    message::Message,
    netns::NetnsHandle,
    service::{IMAPS, MATRIX, Service},
};

use super::{
    deploy,
    machines::Cluster,
    mail,
    plan::{CLIENT, client_netns},
    wait::wait,
};

/// How long a step of a client may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The client's namespace.
pub(super) fn namespace() -> NetnsHandle {
    NetnsHandle::named(&client_netns())
}

/// Uses all four ports at this address, and ensures that the mail server logged the client's own
/// address on its alternative ports, and that this engine served. Returns what was logged, in short.
///
/// # Errors
/// When a port does not work, the mail server logged another address, or another engine served.
pub(super) fn check_address(cluster: &Cluster, to: Ipv4Addr, engine: &str) -> Result<String> {
    let authority = mail::authority(cluster)?;
    let before = deploy::connections_by(cluster, engine);
    let mut seen = Vec::new();
    for service in MATRIX {
        let found = logged_address(cluster, to, service, &authority)
            .with_context(|| format!("port {} of {to}", service.standard))?;
        ensure!(
            found == CLIENT,
            "port {}: the mail server logged {found}, the client is {CLIENT}",
            service.standard
        );
        seen.push(service.standard.to_string());
    }
    // Inline logs a connection when both sides have ended it.
    wait(&format!("{} more connections that {engine} has served", MATRIX.len()), TIMEOUT * 2, || {
        let more = deploy::connections_by(cluster, engine).saturating_sub(before);
        Ok((more >= MATRIX.len()).then_some(()))
    })?;
    Ok(format!("{CLIENT} on {}, by {engine}", seen.join(", ")))
}

/// Sends a message, or logs in, and reads from the mail server's log who that was.
fn logged_address(cluster: &Cluster, to: Ipv4Addr, service: Service, authority: &str) -> Result<Ipv4Addr> {
    let server =
        Server { address: SocketAddr::new(IpAddr::V4(to), service.standard), authority_pem: authority };
    let user = unique(service.protocol);
    if service == IMAPS {
        namespace().run(|| -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let inbox = mail_client::read_inbox_here(server, &user, &[]);
            runtime.block_on(async { tokio::time::timeout(TIMEOUT * 2, inbox).await })??;
            Ok(())
        })??;
        let line = mail::wait_log(cluster, &["Login: ", &format!("user=<{user}>")])?;
        return rip(&line).with_context(|| format!("no address in: {line}"));
    }
    let message = Message::short(&user, &user);
    let reply =
        namespace().run(|| mail_client::send_here(server, service.security, &user, None, &message))??;
    let (_, queue_id) = reply.split_once("queued as ").with_context(|| format!("no queue id in: {reply}"))?;
    let program = format!("postfix/proxied{}/smtpd", service.standard);
    let line = mail::wait_log(cluster, &[&program, &format!("{}: client=", queue_id.trim())])?;
    postfix_client(&line).with_context(|| format!("no address in: {line}"))
}

/// The address in `… client=unknown[198.51.100.7]`.
fn postfix_client(line: &str) -> Option<Ipv4Addr> {
    line.split_once(": client=")?.1.split_once('[')?.1.split_once(']')?.0.parse().ok()
}

/// The address in `… rip=198.51.100.7, lip=…` (Dovecot's `login_log_format_elements`).
fn rip(line: &str) -> Option<Ipv4Addr> {
    line.split_once("rip=")?.1.split_once(',')?.0.parse().ok()
}

/// A name that no other step of any run has.
pub(super) fn unique(kind: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{kind}-{}", now.as_nanos())
}

/// An SMTP session in clear text, line by line.
#[derive(Debug)]
pub(super) struct Session {
    reader: BufReader<TcpStream>,
}

impl Session {
    /// Connects, sends `first`, and reads the greeting.
    ///
    /// # Errors
    /// When there is no connection or no greeting; a greeting other than 220 is part of the error.
    pub(super) fn open(to: Ipv4Addr, port: u16, first: &[u8]) -> Result<Self> {
        Self::connect(to, port, first)?.greeted()
    }

    fn greeted(mut self) -> Result<Self> {
        let greeting = self.line()?;
        ensure!(greeting.starts_with("220"), "greeted with: {greeting}");
        Ok(self)
    }

    /// As [`Self::open`], without reading the greeting.
    ///
    /// # Errors
    /// When there is no connection.
    pub(super) fn connect(to: Ipv4Addr, port: u16, first: &[u8]) -> Result<Self> {
        namespace().run(|| Self::connect_here(to, port, first))?
    }

    /// As [`Self::connect`], from the namespace of the calling thread.
    fn connect_here(to: Ipv4Addr, port: u16, first: &[u8]) -> Result<Self> {
        let address = SocketAddr::new(IpAddr::V4(to), port);
        let stream = TcpStream::connect_timeout(&address, TIMEOUT).context("no connection")?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        stream.set_nodelay(true)?;
        let mut session = Self { reader: BufReader::new(stream) };
        session.reader.get_mut().write_all(first)?;
        Ok(session)
    }

    /// Sends a command, and returns the last line of the reply.
    ///
    /// # Errors
    /// When the connection has ended, or there is no reply in time.
    pub(super) fn command(&mut self, command: &str) -> Result<String> {
        self.reader.get_mut().write_all(format!("{command}\r\n").as_bytes())?;
        loop {
            let line = self.line()?;
            if line.as_bytes().get(3) != Some(&b'-') {
                return Ok(line);
            }
        }
    }

    /// # Errors
    /// When the connection has ended, or there is no line in time.
    pub(super) fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("the connection was closed");
        }
        Ok(line.trim_end().to_owned())
    }

    /// Whether the session still works.
    ///
    /// # Errors
    /// When it does not.
    pub(super) fn noop(&mut self) -> Result<()> {
        let reply = self.command("NOOP")?;
        ensure!(reply.starts_with("250"), "NOOP was answered with: {reply}");
        Ok(())
    }
}

/// A whole short session, from the namespace of the calling thread.
///
/// # Errors
/// When a step fails.
fn short_session(to: Ipv4Addr) -> Result<()> {
    let mut session = Session::connect_here(to, 25, b"")?.greeted()?;
    let reply = session.command("EHLO client.example.test")?;
    ensure!(reply.starts_with("250"), "EHLO was answered with: {reply}");
    session.command("QUIT").map(drop)
}

/// Waits until a session works, and returns how long that took.
///
/// # Errors
/// When none works in time; with the last failure.
pub(super) fn wait_served(to: Ipv4Addr, limit: Duration) -> Result<Duration> {
    let begun = Instant::now();
    let mut last = None;
    let served = wait("mail through the injector", limit, || {
        Ok(namespace().run(|| short_session(to))?.map_err(|error| last = Some(error)).ok())
    });
    match (served, last) {
        (Err(error), Some(last)) => Err(error.context(format!("the last session failed: {last:#}"))),
        (served, _) => served.map(|()| begun.elapsed()),
    }
}

/// How one short session of a load went.
#[derive(Debug)]
struct Attempt {
    at: Instant,
    failure: Option<String>,
}

/// Short sessions at a steady rate, and open sessions with a command every half second.
#[derive(Debug)]
pub(super) struct Load {
    begun: Instant,
    stop: Arc<AtomicBool>,
    short: Vec<JoinHandle<Vec<Attempt>>>,
    open: Vec<JoinHandle<Option<String>>>,
}

/// What became of a load.
#[derive(Debug, Default)]
pub(super) struct LoadReport {
    /// Short sessions that succeeded.
    pub(super) served: usize,
    /// Those that failed, and the reasons of some.
    pub(super) failures: Vec<String>,
    /// The longest time between two successes.
    pub(super) gap: Duration,
    /// How the open sessions ended that did not last.
    pub(super) lost: Vec<String>,
    pub(super) open: usize,
}

impl Load {
    /// Starts `open` sessions, which must be greeted and then last as long as `lasting`, and `rate`
    /// short ones in a second.
    ///
    /// # Errors
    /// When an open session is not greeted.
    pub(super) fn start(to: Ipv4Addr, rate: u32, open: usize, lasting: Duration) -> Result<Self> {
        const THREADS: u32 = 8;
        let stop = Arc::new(AtomicBool::new(false));
        let sessions = (0..open).map(|_| Session::open(to, 25, b"")).collect::<Result<Vec<_>>>()?;
        let open = sessions.into_iter().map(|session| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || hold(session, lasting, &stop))
        });
        let open = open.collect();
        let threads = THREADS.min(rate);
        let short = (0..threads).map(|index| {
            let stop = Arc::clone(&stop);
            let interval = Duration::from_secs(1) * threads / rate.max(1);
            let first = Instant::now() + interval * index / threads.max(1);
            thread::spawn(move || namespace().run(|| repeat(to, first, interval, &stop)).unwrap_or_default())
        });
        Ok(Self { begun: Instant::now(), short: short.collect(), stop, open })
    }

    /// Ends it.
    pub(super) fn finish(self) -> LoadReport {
        self.stop.store(true, Ordering::Relaxed);
        let attempts = self.short.into_iter().filter_map(|thread| thread.join().ok()).flatten().collect();
        let open = self.open.len();
        let lost = self.open.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect();
        LoadReport { lost, open, ..LoadReport::of(attempts, self.begun, Instant::now()) }
    }
}

impl LoadReport {
    fn of(mut attempts: Vec<Attempt>, begun: Instant, end: Instant) -> Self {
        attempts.sort_by_key(|attempt| attempt.at);
        let successes = attempts.iter().filter(|attempt| attempt.failure.is_none()).map(|attempt| attempt.at);
        let moments: Vec<_> = [begun].into_iter().chain(successes).chain([end]).collect();
        let gaps = moments.windows(2).map(|pair| pair[1].saturating_duration_since(pair[0]));
        let gap = gaps.max().unwrap_or_default();
        let failures: Vec<_> = attempts.into_iter().filter_map(|attempt| attempt.failure).collect();
        Self { served: moments.len() - 2, failures, gap, ..Self::default() }
    }
}

impl std::fmt::Display for LoadReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { served, failures, gap, lost, open } = self;
        write!(f, "{served} short sessions served, {} failed", failures.len())?;
        if let Some(failure) = failures.first() {
            write!(f, " (the first: {failure})")?;
        }
        write!(f, ", longest gap {:.1} s; {} of {open} open sessions lost", gap.as_secs_f32(), lost.len())?;
        lost.first().map_or(Ok(()), |reason| write!(f, " ({reason})"))
    }
}

/// Uses a session for a time, or until the load ends. Returns why it ended before.
fn hold(mut session: Session, lasting: Duration, stop: &AtomicBool) -> Option<String> {
    let begun = Instant::now();
    while !stop.load(Ordering::Relaxed) && begun.elapsed() < lasting {
        if let Err(error) = session.noop() {
            return Some(format!("after {:.1} s: {error:#}", begun.elapsed().as_secs_f32()));
        }
        thread::sleep(Duration::from_millis(500));
    }
    None
}

fn repeat(to: Ipv4Addr, first: Instant, interval: Duration, stop: &AtomicBool) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    let mut next = first;
    while !stop.load(Ordering::Relaxed) {
        thread::sleep(next.saturating_duration_since(Instant::now()));
        next = (next + interval).max(Instant::now());
        let failure = short_session(to).err().map(|error| format!("{error:#}"));
        attempts.push(Attempt { at: Instant::now(), failure });
    }
    attempts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_read_from_both_servers_lines() {
        let postfix = "2026-11-30T07:04:00.1Z stdout F Nov 30 07:04:00 mail postfix/proxied25/smtpd[9]: \
                       4F1: client=unknown[198.51.100.7]";
        assert_eq!(postfix_client(postfix), Some(CLIENT));
        let dovecot =
            "stderr F imap-login: Info: Login: user=<u>, method=PLAIN, rip=198.51.100.7, lip=192.0.2.10";
        assert_eq!(rip(dovecot), Some(CLIENT));
        for other in ["", "x: client=unknown", "x: client=unknown[local]", "rip=::1, lip=::1", "rip=10.0.0.1"]
        {
            assert_eq!((postfix_client(other), rip(other)), (None, None), "{other}");
        }
    }

    #[test]
    fn the_longest_gap_is_found_also_at_the_ends() {
        let begun = Instant::now();
        let at = |seconds: u64, failure: Option<&str>| Attempt {
            at: begun + Duration::from_secs(seconds),
            failure: failure.map(str::to_owned),
        };
        let end = begun + Duration::from_secs(10);
        let attempts = vec![at(8, None), at(1, None), at(4, Some("refused")), at(2, None)];
        let report = LoadReport::of(attempts, begun, end);
        assert_eq!((report.served, report.failures.len(), report.gap.as_secs()), (3, 1, 6));
        assert_eq!(LoadReport::of(vec![at(3, None)], begun, end).gap.as_secs(), 7);
        assert_eq!(LoadReport::of(Vec::new(), begun, end).gap.as_secs(), 10);
    }
}
