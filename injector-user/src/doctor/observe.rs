//! Makes one observation, on a connection of its own: with or without a header, perhaps with a
//! dialogue.
//!
//! The doctor lets the server close the connection, after QUIT or LOGOUT, or waits until the time
//! is over. A client that disconnects before Postfix looks up its address can kill an smtpd: in
//! 3.7.11 a LOCAL header followed by a reset does (`fatal: smtpd_peer_hostaddr_to_sockaddr`). So
//! the doctor never sends LOCAL.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use injector_common::proxy::EncodeError;
use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout, timeout_at},
};

use super::{
    dialect::{Dialect, GreetingState, Response, readable},
    dialogue::{Action, Script},
    exchange::{CLOSE_TIMEOUT, Read, Stream, Terms, probe_service, quit, read, read_to_end, run_script},
    header_addresses::HeaderAddresses,
    observation::{Client, Dialogue, Family, Greeting, Observation, Outcome, Probe, Step, Target},
};
use crate::{
    config::{Receiver, UNIQUE_ID_LEN},
    header::EncodedHeader,
    net::tls,
    protocol::Protocol,
};

/// If `220-` comes so long before `220 `, it is postscreen's teaser, not a banner of several lines.
const TEASER_DELAY: Duration = Duration::from_millis(500);
/// How long to wait for an answer from an address that should be filtered: enough for one repeated
/// SYN.
const FILTERED_TIMEOUT: Duration = Duration::from_secs(2);
/// The unique ID in the header, if the listener sends one: it identifies the doctor.
const UNIQUE_ID: &[u8; UNIQUE_ID_LEN] = b"00000000000000000000000000d0c702";

/// How long to wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeouts {
    /// For a connection.
    pub(super) connect: Duration,
    /// For the server's reply.
    pub(super) answer: Duration,
}

/// Carries out one step.
pub(super) async fn observe(
    target: &Target,
    step: Step,
    addresses: &HeaderAddresses,
    timeouts: Timeouts,
) -> Observation {
    let begun = Instant::now();
    let destination = step.probe.destination(target);
    let limit = if step.from.is_some() { timeouts.connect.min(FILTERED_TIMEOUT) } else { timeouts.connect };
    let stream = match timeout(limit, connect(destination, step.from)).await {
        Ok(Ok(stream)) => stream,
        failed => {
            let outcome = match failed {
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Outcome::Refused,
                Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => Outcome::NoAnswer,
                Ok(Err(error)) if error.kind() == io::ErrorKind::AddrNotAvailable && step.from.is_none() => {
                    Outcome::NoSourcePorts
                }
                Ok(Err(error)) => Outcome::Unreachable(error.to_string()),
                _ => Outcome::NoAnswer,
            };
            return Observation { step, outcome, after: begun.elapsed(), tls: None, dialogue: None };
        }
    };
    let connected = Instant::now();
    let session = Session {
        protocol: target.protocol,
        server: target.address.ip(),
        client: claimed_client(step.probe),
        connected,
        until: connected + timeouts.answer,
        answer: timeouts.answer,
    };
    match run_probe(target, step.probe, addresses, stream, session).await {
        Ok(ProbeResult { outcome, after, tls, dialogue }) => {
            Observation { step, outcome, after, tls, dialogue }
        }
        Err(error) => {
            let outcome = Outcome::Unreachable(error);
            Observation { step, outcome, after: connected.elapsed(), tls: None, dialogue: None }
        }
    }
}

/// Sends a header with the source localhost to `address`, without a configuration, and tests what
/// the server allows that client.
pub async fn claim_localhost(
    address: SocketAddr,
    protocol: Protocol,
    connect: Duration,
    answer: Duration,
) -> Observation {
    let target = Target {
        listener: String::new(),
        protocol,
        receiver: Receiver::default(),
        ipv6_clients: true,
        ipv4_clients: true,
        backend: address.to_string(),
        address,
        source: None,
        other_sources: Vec::new(),
        untrusted: true,
    };
    let (version, family) = (target.receiver.version, Family::of(address.ip()));
    let step = Step { probe: Probe::Claim { version, family, client: Client::Localhost }, from: None };
    observe(&target, step, &HeaderAddresses::new(None, &[], &[address]), Timeouts { connect, answer }).await
}

/// The client whose permissions the dialogue tests.
const fn claimed_client(probe: Probe) -> Option<IpAddr> {
    match probe {
        Probe::Claim { family, client, .. } => Some(client.ip(family)),
        Probe::NoHeader | Probe::Tls | Probe::Header { .. } | Probe::StandardPort { .. } => None,
    }
}

async fn connect(address: SocketAddr, from: Option<IpAddr>) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(from) = from {
        socket.bind(SocketAddr::new(from, 0))?;
    }
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The parameters of one connection.
#[derive(Clone, Copy)]
struct Session {
    protocol: Protocol,
    server: IpAddr,
    /// Test what the server allows this client.
    client: Option<IpAddr>,
    connected: Instant,
    /// When to stop waiting for the greeting.
    until: Instant,
    /// How long the dialogue after it may take.
    answer: Duration,
}

struct ProbeResult {
    outcome: Outcome,
    after: Duration,
    tls: Option<String>,
    dialogue: Option<Dialogue>,
}

async fn run_probe(
    target: &Target,
    probe: Probe,
    addresses: &HeaderAddresses,
    mut stream: TcpStream,
    session: Session,
) -> Result<ProbeResult, String> {
    let port = stream.local_addr().map_or(0, |local| local.port());
    if let Some(header) =
        header(target, probe, addresses, port).map_err(|error| format!("header: {error}"))?
    {
        // In one write: servers reject a header that arrives in pieces. The read below reports an
        // error. In TLS together with the ClientHello, as the injector sends it.
        let _ = if target.is_tls() {
            SockRef::from(&stream).send_with_flags(header.as_bytes(), libc::MSG_MORE).map(drop)
        } else {
            stream.write_all(header.as_bytes()).await
        };
    }
    if target.is_tls() && probe != Probe::NoHeader {
        return Ok(run_in_tls(target, stream, session).await);
    }
    let (outcome, after, dialogue) = run_session(&mut stream, session).await;
    Ok(ProbeResult { outcome, after, tls: None, dialogue })
}

/// The header that a probe sends, if it sends one.
fn header(
    target: &Target,
    probe: Probe,
    addresses: &HeaderAddresses,
    port: u16,
) -> Result<Option<EncodedHeader>, EncodeError> {
    let (version, tlvs, (source, destination)) = match probe {
        Probe::NoHeader | Probe::Tls | Probe::StandardPort { header: None } => return Ok(None),
        Probe::StandardPort { header: Some(family) } => {
            (target.receiver.version, true, addresses.of(family, port))
        }
        Probe::Header { version, family, tlvs } => (version, tlvs, addresses.of(family, port)),
        Probe::Claim { version, family, client } => {
            (version, true, addresses.with_client(client, family, port))
        }
    };
    let plain = Receiver { version, ..Receiver::default() };
    let own = Receiver { version, ..target.receiver.clone() };
    let receiver = if tlvs && version == target.receiver.version { own } else { plain };
    EncodedHeader::new(&receiver, source, destination, UNIQUE_ID).map(Some)
}

async fn run_in_tls(target: &Target, stream: TcpStream, session: Session) -> ProbeResult {
    let clear =
        |outcome| ProbeResult { outcome, after: session.connected.elapsed(), tls: None, dialogue: None };
    let connector = match tls::unverified_connector() {
        Ok(connector) => connector,
        Err(error) => return clear(Outcome::Unreachable(error.to_string())),
    };
    let recorded = RecordingStream { stream, first: Vec::new() };
    let handshake = connector.connect(server_name(target), recorded).into_fallible();
    match timeout_at(session.until, handshake).await {
        Err(_) => clear(Outcome::Silent),
        Ok(Ok(mut stream)) => {
            let version = stream.get_ref().1.protocol_version();
            let (outcome, after, dialogue) = run_session(&mut stream, session).await;
            let name = version.and_then(|version| version.as_str()).unwrap_or("TLS");
            ProbeResult {
                outcome,
                after,
                tls: Some(name.replace('_', ".").replace("TLSv", "TLS ")),
                dialogue,
            }
        }
        Ok(Err((error, mut recorded))) => {
            if let Some(rustls::Error::AlertReceived(alert)) = tls_error(&error) {
                return clear(Outcome::Alert(format!("{alert:?}")));
            }
            if recorded.first.first().is_some_and(u8::is_ascii_graphic) {
                let outcome = match Dialect::of(session.protocol).classify(&recorded.first) {
                    Response::Rejected(line) => Outcome::Rejected(line),
                    _ => Outcome::Strange(readable(
                        recorded.first.split(|byte| *byte == b'\n').next().unwrap_or(&[]),
                    )),
                };
                let after = session.connected.elapsed();
                wait_for_close(&mut recorded.stream).await;
                return ProbeResult { outcome, after, tls: None, dialogue: None };
            }
            clear(match (tls_error(&error), error.kind()) {
                (Some(other), _) => Outcome::Strange(other.to_string()),
                (None, io::ErrorKind::UnexpectedEof) => Outcome::Closed { reset: false },
                (None, _) => Outcome::Closed { reset: true },
            })
        }
    }
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

/// Reads the greeting, runs the dialogue if there is one, sends QUIT, and reads the rest.
async fn run_session<S: Stream>(stream: &mut S, session: Session) -> (Outcome, Duration, Option<Dialogue>) {
    let Session { protocol, connected, until, .. } = session;
    let dialect = Dialect::of(protocol);
    let mut said = Vec::new();
    let mut first_byte = None;
    let (ended, state) = loop {
        match timeout_at(until, read(stream, &mut said)).await {
            Err(_) => break (None, GreetingState::Incomplete),
            Ok(Read::End { reset }) => break (Some(reset), GreetingState::Incomplete),
            Ok(Read::More) => {
                first_byte.get_or_insert_with(Instant::now);
                match dialect.greeting_state(&said) {
                    GreetingState::Incomplete => {}
                    state => break (None, state),
                }
            }
        }
    };
    let after = connected.elapsed();
    let teaser = said.starts_with(b"220-") && first_byte.is_some_and(|at| at.elapsed() > TEASER_DELAY);
    let mut dialogue = None;
    match state {
        GreetingState::Complete => match script(&said, session) {
            Some(begun) => {
                let terms = Terms { protocol, server: session.server, timeout: session.answer };
                dialogue = run_script(stream, &mut said, begun, terms).await;
            }
            None => {
                probe_service(stream, &mut said, protocol).await;
                quit(stream, &mut said, protocol).await;
            }
        },
        // The server closes; a client that closes first after a header harms an smtpd.
        GreetingState::Rejected | GreetingState::Strange => {
            let _ = timeout(CLOSE_TIMEOUT, read_to_end(stream, &mut said)).await;
        }
        GreetingState::Incomplete => {}
    }
    let outcome = match dialect.classify(&said) {
        Response::Empty => match ended {
            Some(reset) => Outcome::Closed { reset },
            None => Outcome::Silent,
        },
        Response::Greeted(line) => Outcome::Greeted(Greeting { line, teaser }),
        Response::Misunderstood(line, complaint) => {
            Outcome::Misunderstood { greeting: Greeting { line, teaser }, complaint }
        }
        Response::Rejected(line) => Outcome::Rejected(line),
        Response::Strange(line) => Outcome::Strange(line),
    };
    (outcome, after, dialogue)
}

/// The dialogue to run after this greeting, if any. None with a server that sent an error reply to
/// the header.
fn script(said: &[u8], session: Session) -> Option<(Script, Action)> {
    let greeted = matches!(Dialect::of(session.protocol).classify(said), Response::Greeted(_));
    session.client.filter(|_| greeted).and_then(|client| Script::start(session.protocol, client, said))
}

/// Waits for the server to close.
async fn wait_for_close(stream: &mut TcpStream) {
    let _ = timeout(CLOSE_TIMEOUT, read_to_end(stream, &mut Vec::new())).await;
}

fn server_name(target: &Target) -> ServerName<'static> {
    let host = target.backend.rsplit_once(':').map_or(target.backend.as_str(), |(host, _)| host);
    // Without the final dot of an absolute name (RFC 6066, section 3).
    let host = host.strip_suffix('.').unwrap_or(host);
    ServerName::try_from(host.to_owned()).unwrap_or_else(|_| ServerName::from(target.address.ip()))
}

/// A stream that keeps the first bytes, to show them if they are not TLS.
#[derive(Debug)]
struct RecordingStream {
    stream: TcpStream,
    first: Vec<u8>,
}

impl AsyncRead for RecordingStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        const KEPT: usize = 512;
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        let new = buf.filled().get(before..).unwrap_or_default();
        let room = KEPT.saturating_sub(this.first.len()).min(new.len());
        this.first.extend_from_slice(new.get(..room).unwrap_or_default());
        polled
    }
}

impl AsyncWrite for RecordingStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt as _, net::TcpListener};

    use super::{super::fixtures::target, *};
    use crate::config::ProxyVersion;

    /// Observes a server that sends these parts, each after a pause, and returns what it received.
    async fn observed(
        protocol: Protocol,
        probe: Probe,
        parts: &'static [&'static str],
    ) -> (Observation, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target { address: listener.local_addr().unwrap(), ..target(protocol) };
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut received = Vec::new();
            for part in parts {
                tokio::time::sleep(Duration::from_millis(600)).await;
                stream.write_all(part.as_bytes()).await.unwrap();
            }
            for (command, reply) in [("NOOP\r\n", "250 2.0.0 Ok\r\n"), ("QUIT\r\n", "221 2.0.0 Bye\r\n")] {
                while !received.ends_with(command.as_bytes())
                    && stream.read_buf(&mut received).await.unwrap_or(0) > 0
                {}
                stream.write_all(reply.as_bytes()).await.unwrap();
            }
            received
        });
        let second = Duration::from_secs(5);
        let addresses = HeaderAddresses::new(target.source, &[], &["192.0.2.10:25".parse().unwrap()]);
        let timeouts = Timeouts { connect: second, answer: second };
        let observation = observe(&target, Step { probe, from: None }, &addresses, timeouts).await;
        (observation, server.await.unwrap())
    }

    #[tokio::test]
    async fn after_a_header_the_doctor_waits_for_the_greeting_and_quits() {
        let probe = Probe::Header { version: ProxyVersion::V1, family: Family::V4, tlvs: true };
        let (seen, received) = observed(Protocol::Smtp, probe, &["220-mail\r\n", "220 mail\r\n"]).await;
        assert_eq!(seen.outcome, Outcome::Greeted(Greeting { line: "220-mail".to_owned(), teaser: true }));
        let received = String::from_utf8(received).unwrap();
        assert!(received.starts_with("PROXY TCP4 10.25.0.1 192.0.2.10 "), "{received:?}");
        assert!(received.ends_with(" 25\r\nNOOP\r\nQUIT\r\n"), "{received:?}");
    }

    #[tokio::test]
    async fn without_a_header_nothing_is_sent_before_the_greeting() {
        let (seen, received) = observed(Protocol::Smtp, Probe::NoHeader, &["220-a\r\n220 b\r\n"]).await;
        assert_eq!(seen.outcome, Outcome::Greeted(Greeting { line: "220-a".to_owned(), teaser: false }));
        assert!(seen.after >= Duration::from_millis(600), "{seen:?}");
        assert_eq!(received, b"NOOP\r\nQUIT\r\n");
    }

    /// Exim 4.96 without the header that it expects.
    #[tokio::test]
    async fn a_server_that_greets_and_refuses_commands_has_not_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target { address: listener.local_addr().unwrap(), ..target(Protocol::Smtp) };
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"220 mail ESMTP Exim 4.96\r\n").await.unwrap();
            loop {
                let mut command = Vec::new();
                stream.read_buf(&mut command).await.unwrap();
                if command == b"QUIT\r\n" {
                    break stream.write_all(b"221 mail closing connection\r\n").await.unwrap();
                }
                let refusal = b"503 Command refused, required Proxy negotiation failed\r\n";
                stream.write_all(refusal).await.unwrap();
            }
        });
        let second = Duration::from_secs(5);
        let step = Step { probe: Probe::NoHeader, from: None };
        let addresses = HeaderAddresses::new(None, &[], &[]);
        let seen = observe(&target, step, &addresses, Timeouts { connect: second, answer: second }).await;
        assert!(
            matches!(&seen.outcome, Outcome::Misunderstood { complaint, .. } if complaint.starts_with("503"))
        );
        assert!(!seen.answered(), "{seen:?}");
    }

    #[tokio::test]
    async fn clear_text_instead_of_tls_is_reported_as_received() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target { address: listener.local_addr().unwrap(), ..target(Protocol::Submissions) };
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"220 mail ESMTP\r\n").await.unwrap();
            let mut hello = [0; 4096];
            let _ = stream.read(&mut hello).await;
        });
        let second = Duration::from_secs(5);
        let addresses = HeaderAddresses::new(None, &[], &[]);
        let step = Step { probe: Probe::Tls, from: None };
        let seen = observe(&target, step, &addresses, Timeouts { connect: second, answer: second }).await;
        assert_eq!((seen.outcome, seen.tls), (Outcome::Strange("220 mail ESMTP".to_owned()), None));
    }
}
