//! Makes one observation: a connection of its own, a header or none, perhaps a dialogue, and polite to the end.
//!
//! A client that is gone when Postfix looks for its address can cost an smtpd its life: in 3.7.11 a LOCAL header followed by a
//! reset is `fatal: smtpd_peer_hostaddr_to_sockaddr`. So a connection is closed by the server, after QUIT or LOGOUT, or when
//! the time is over, and LOCAL is never sent.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use injector_common::proxy::EncodeError;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout, timeout_at},
};

use super::{
    dialect::{Dialect, Heard, Meaning, readable},
    dialogue::{Action, Script},
    exchange::{CLOSE_TIMEOUT, Read, Stream, Terms, ask, read, read_to_end, say_goodbye},
    header_addresses::HeaderAddresses,
    observation::{Client, Dialogue, Family, Greeting, Observation, Outcome, Probe, Step, Target},
};
use crate::{
    config::{Receiver, UNIQUE_ID_LEN},
    header::Rendered,
    net::tls,
    protocol::Protocol,
};

/// `220-` so long before `220 ` is a teaser and no banner of several lines.
const TEASER: Duration = Duration::from_millis(500);
/// How long a source that should be filtered has to get its SYN answered: long enough for one repetition.
const FILTERED: Duration = Duration::from_secs(2);
/// In the header where the listener wants one: says who it was.
const UNIQUE_ID: &[u8; UNIQUE_ID_LEN] = b"00000000000000000000000000d0c702";

/// How long to wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeouts {
    /// For a connection.
    pub(super) connect: Duration,
    /// For the server's word.
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
    let limit = if step.from.is_some() { timeouts.connect.min(FILTERED) } else { timeouts.connect };
    let stream = match timeout(limit, connect(target.address, step.from)).await {
        Ok(Ok(stream)) => stream,
        failed => {
            let outcome = match failed {
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Outcome::Refused,
                Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => Outcome::NoAnswer,
                Ok(Err(error)) => Outcome::Unreachable(error.to_string()),
                _ => Outcome::NoAnswer,
            };
            return Observation { step, outcome, after: begun.elapsed(), tls: None, dialogue: None };
        }
    };
    let connected = Instant::now();
    let talk = Talk {
        protocol: target.protocol,
        server: target.address.ip(),
        client: claimed(step.probe),
        connected,
        until: connected + timeouts.answer,
        answer: timeouts.answer,
    };
    match speak(target, step.probe, addresses, stream, talk).await {
        Ok(Heeded { outcome, after, tls, dialogue }) => Observation { step, outcome, after, tls, dialogue },
        Err(error) => {
            let outcome = Outcome::Unreachable(error);
            Observation { step, outcome, after: connected.elapsed(), tls: None, dialogue: None }
        }
    }
}

/// Sends `address` a header that says localhost, without a configuration, and asks what that client may do.
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
        others: Vec::new(),
        untrusted: true,
    };
    let (version, family) = (target.receiver.version, Family::of(address.ip()));
    let step = Step { probe: Probe::Claim { version, family, client: Client::Localhost }, from: None };
    observe(&target, step, &HeaderAddresses::new(None, &[], &[address]), Timeouts { connect, answer }).await
}

/// The client whose rights are asked for.
const fn claimed(probe: Probe) -> Option<IpAddr> {
    match probe {
        Probe::Claim { family, client, .. } => Some(client.ip(family)),
        Probe::NoHeader | Probe::Tls | Probe::Header { .. } => None,
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

/// The terms of one conversation.
#[derive(Clone, Copy)]
struct Talk {
    protocol: Protocol,
    server: IpAddr,
    /// Ask what this client may do.
    client: Option<IpAddr>,
    connected: Instant,
    /// The end of patience with the greeting.
    until: Instant,
    /// Patience with the dialogue after it.
    answer: Duration,
}

struct Heeded {
    outcome: Outcome,
    after: Duration,
    tls: Option<String>,
    dialogue: Option<Dialogue>,
}

async fn speak(
    target: &Target,
    probe: Probe,
    addresses: &HeaderAddresses,
    mut stream: TcpStream,
    talk: Talk,
) -> Result<Heeded, String> {
    let port = stream.local_addr().map_or(0, |local| local.port());
    if let Some(header) =
        header(target, probe, addresses, port).map_err(|error| format!("header: {error}"))?
    {
        // Whole and at once: servers refuse one that comes in pieces. An error here is heard again below.
        let _ = stream.write_all(header.as_bytes()).await;
    }
    if target.is_tls() && probe != Probe::NoHeader {
        return Ok(speak_tls(target, stream, talk).await);
    }
    let (outcome, after, dialogue) = converse(&mut stream, talk).await;
    Ok(Heeded { outcome, after, tls: None, dialogue })
}

/// The header that a probe sends, if it sends one.
fn header(
    target: &Target,
    probe: Probe,
    addresses: &HeaderAddresses,
    port: u16,
) -> Result<Option<Rendered>, EncodeError> {
    let (version, tlvs, (source, destination)) = match probe {
        Probe::NoHeader | Probe::Tls => return Ok(None),
        Probe::Header { version, family, tlvs } => (version, tlvs, addresses.of(family, port)),
        Probe::Claim { version, family, client } => {
            (version, true, addresses.with_client(client, family, port))
        }
    };
    let plain = Receiver { version, ..Receiver::default() };
    let own = Receiver { version, ..target.receiver.clone() };
    let receiver = if tlvs && version == target.receiver.version { own } else { plain };
    Rendered::new(&receiver, source, destination, UNIQUE_ID).map(Some)
}

async fn speak_tls(target: &Target, stream: TcpStream, talk: Talk) -> Heeded {
    let clear = |outcome| Heeded { outcome, after: talk.connected.elapsed(), tls: None, dialogue: None };
    let connector = match tls::unverified_connector() {
        Ok(connector) => connector,
        Err(error) => return clear(Outcome::Unreachable(error.to_string())),
    };
    let recorded = Recorded { stream, first: Vec::new() };
    let handshake = connector.connect(server_name(target), recorded).into_fallible();
    match timeout_at(talk.until, handshake).await {
        Err(_) => clear(Outcome::Silent),
        Ok(Ok(mut stream)) => {
            let version = stream.get_ref().1.protocol_version();
            let (outcome, after, dialogue) = converse(&mut stream, talk).await;
            let name = version.and_then(|version| version.as_str()).unwrap_or("TLS");
            Heeded { outcome, after, tls: Some(name.replace('_', ".").replace("TLSv", "TLS ")), dialogue }
        }
        Ok(Err((error, mut recorded))) => {
            if let Some(rustls::Error::AlertReceived(alert)) = tls_error(&error) {
                return clear(Outcome::Alert(format!("{alert:?}")));
            }
            if recorded.first.first().is_some_and(u8::is_ascii_graphic) {
                let outcome = match Dialect::of(talk.protocol).judge(&recorded.first) {
                    Meaning::TurnedAway(line) => Outcome::TurnedAway(line),
                    _ => Outcome::Strange(readable(
                        recorded.first.split(|byte| *byte == b'\n').next().unwrap_or(&[]),
                    )),
                };
                let after = talk.connected.elapsed();
                part(&mut recorded.stream).await;
                return Heeded { outcome, after, tls: None, dialogue: None };
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

/// Listens, asks what there is to ask, takes its leave as the protocol has it, and hears the rest.
async fn converse<S: Stream>(stream: &mut S, talk: Talk) -> (Outcome, Duration, Option<Dialogue>) {
    let Talk { protocol, connected, until, .. } = talk;
    let dialect = Dialect::of(protocol);
    let mut said = Vec::new();
    let mut first_word = None;
    let (ended, heard) = loop {
        match timeout_at(until, read(stream, &mut said)).await {
            Err(_) => break (None, Heard::Nothing),
            Ok(Read::End { reset }) => break (Some(reset), Heard::Nothing),
            Ok(Read::More) => {
                first_word.get_or_insert_with(Instant::now);
                match dialect.hear(&said) {
                    Heard::Nothing => {}
                    heard => break (None, heard),
                }
            }
        }
    };
    let after = connected.elapsed();
    let teaser = said.starts_with(b"220-") && first_word.is_some_and(|at| at.elapsed() > TEASER);
    let mut dialogue = None;
    match heard {
        Heard::Floor => match script(&said, talk) {
            Some(begun) => {
                let terms = Terms { protocol, server: talk.server, timeout: talk.answer };
                dialogue = ask(stream, &mut said, begun, terms).await;
            }
            None => say_goodbye(stream, &mut said, protocol).await,
        },
        // It closes by itself; and who closes first after a header harms an smtpd.
        Heard::TurnedAway | Heard::Strange => {
            let _ = timeout(CLOSE_TIMEOUT, read_to_end(stream, &mut said)).await;
        }
        Heard::Nothing => {}
    }
    let outcome = match dialect.judge(&said) {
        Meaning::Nothing => match ended {
            Some(reset) => Outcome::Closed { reset },
            None => Outcome::Silent,
        },
        Meaning::Greeted(line) => Outcome::Greeted(Greeting { line, teaser }),
        Meaning::Misunderstood(line, complaint) => {
            Outcome::Misunderstood { greeting: Greeting { line, teaser }, complaint }
        }
        Meaning::TurnedAway(line) => Outcome::TurnedAway(line),
        Meaning::Strange(line) => Outcome::Strange(line),
    };
    (outcome, after, dialogue)
}

/// What to ask after this greeting, if anything; not of a server that complains about the header.
fn script(said: &[u8], talk: Talk) -> Option<(Script, Action)> {
    let greeted = matches!(Dialect::of(talk.protocol).judge(said), Meaning::Greeted(_));
    talk.client.filter(|_| greeted).and_then(|client| Script::begin(talk.protocol, client, said))
}

/// Waits for the server to close.
async fn part(stream: &mut TcpStream) {
    let _ = timeout(CLOSE_TIMEOUT, read_to_end(stream, &mut Vec::new())).await;
}

fn server_name(target: &Target) -> ServerName<'static> {
    let host = target.backend.rsplit_once(':').map_or(target.backend.as_str(), |(host, _)| host);
    ServerName::try_from(host.to_owned()).unwrap_or_else(|_| ServerName::from(target.address.ip()))
}

/// A stream that remembers what came first: what is no TLS is shown as it came.
#[derive(Debug)]
struct Recorded {
    stream: TcpStream,
    first: Vec<u8>,
}

impl AsyncRead for Recorded {
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

impl AsyncWrite for Recorded {
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

    /// Observes a server that says this, each part after a pause, and hears what it was told.
    async fn observed(
        protocol: Protocol,
        probe: Probe,
        parts: &'static [&'static str],
    ) -> (Observation, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target { address: listener.local_addr().unwrap(), ..target(protocol) };
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut told = Vec::new();
            for part in parts {
                tokio::time::sleep(Duration::from_millis(600)).await;
                stream.write_all(part.as_bytes()).await.unwrap();
            }
            while !told.ends_with(b"QUIT\r\n") && stream.read_buf(&mut told).await.unwrap_or(0) > 0 {}
            stream.write_all(b"221 2.0.0 Bye\r\n").await.unwrap();
            told
        });
        let second = Duration::from_secs(5);
        let addresses = HeaderAddresses::new(target.source, &[], &["192.0.2.10:25".parse().unwrap()]);
        let timeouts = Timeouts { connect: second, answer: second };
        let observation = observe(&target, Step { probe, from: None }, &addresses, timeouts).await;
        (observation, server.await.unwrap())
    }

    #[tokio::test]
    async fn a_header_is_followed_by_patience_and_a_goodbye() {
        let probe = Probe::Header { version: ProxyVersion::V1, family: Family::V4, tlvs: true };
        let (seen, told) = observed(Protocol::Smtp, probe, &["220-mail\r\n", "220 mail\r\n"]).await;
        assert_eq!(seen.outcome, Outcome::Greeted(Greeting { line: "220-mail".to_owned(), teaser: true }));
        let told = String::from_utf8(told).unwrap();
        assert!(told.starts_with("PROXY TCP4 10.25.0.1 192.0.2.10 "), "{told:?}");
        assert!(told.ends_with(" 25\r\nQUIT\r\n"), "{told:?}");
    }

    #[tokio::test]
    async fn silence_sends_nothing_before_the_greeting() {
        let (seen, told) = observed(Protocol::Smtp, Probe::NoHeader, &["220-a\r\n220 b\r\n"]).await;
        assert_eq!(seen.outcome, Outcome::Greeted(Greeting { line: "220-a".to_owned(), teaser: false }));
        assert!(seen.after >= Duration::from_millis(600), "{seen:?}");
        assert_eq!(told, b"QUIT\r\n");
    }

    #[tokio::test]
    async fn clear_text_where_tls_should_be_is_shown_as_it_came() {
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
