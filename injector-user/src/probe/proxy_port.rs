//! Tests whether the mail server's PROXY ports trust this host, which is not the injector's: sends
//! a header with the source localhost, and a dialogue up to the recipient. The doctor implements
//! the dialogue.

use std::{net::SocketAddr, time::Duration};

use futures_util::future::join_all;
use tokio::time::timeout;

use super::args::Server;
use crate::{
    doctor::{
        claim_localhost,
        observation::{Client, Dialogue, Family, Observation, Outcome, Relay},
    },
    protocol::Protocol,
};

/// How long a connection may take: enough for a SYN and two retransmissions.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the greeting, and the dialogue after it, may take: postscreen takes up to 6 s.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// One PROXY port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyPort {
    /// The port as given on the command line.
    pub server: String,
    /// The result for each of its addresses, or why the port was not tested.
    pub addresses: Result<Vec<(SocketAddr, Exposure)>, String>,
}

/// How an address reacts to a header from this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exposure {
    /// It did not answer; how.
    Closed(String),
    /// It answered.
    Open {
        /// What it said.
        said: String,
        /// Whether it relays; `None` if it does not speak SMTP.
        relay: Option<Relay>,
    },
}

impl ProxyPort {
    /// One of its addresses answered.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.exposures().any(|exposure| matches!(exposure, Exposure::Open { .. }))
    }

    /// One of its addresses relays.
    #[must_use]
    pub fn relays(&self) -> bool {
        let accepted =
            |exposure: &_| matches!(exposure, Exposure::Open { relay: Some(Relay::Accepted(_)), .. });
        self.exposures().any(accepted)
    }

    /// What is wrong with the port, in one line; `None` if nothing.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        let Self { server, addresses } = self;
        let addresses = match addresses {
            Ok(addresses) => addresses,
            Err(why) => return Some(format!("{server} was not tested: {why}")),
        };
        let open: Vec<_> =
            addresses.iter().filter(|(_, exposure)| matches!(exposure, Exposure::Open { .. })).collect();
        let (address, exposure) = open.iter().find(|(_, exposure)| exposure.relays()).or(open.first())?;
        Some(format!("{server} ({address}) {}", exposure.describe(Family::of(address.ip()))))
    }

    fn exposures(&self) -> impl Iterator<Item = &Exposure> {
        self.addresses.iter().flatten().map(|(_, exposure)| exposure)
    }
}

impl Exposure {
    const fn relays(&self) -> bool {
        matches!(self, Self::Open { relay: Some(Relay::Accepted(_)), .. })
    }

    /// One line, to follow the address; `family` is that of the header.
    pub(super) fn describe(&self, family: Family) -> String {
        let localhost = Client::Localhost.ip(family);
        match self {
            Self::Closed(how) => format!("is closed to this host: {how}"),
            Self::Open { said, relay } => {
                let relay = match relay {
                    Some(Relay::Accepted(said)) => {
                        format!(
                            "; it is an OPEN RELAY for any host that can reach it ({said:?} to a recipient in a foreign domain)"
                        )
                    }
                    Some(Relay::Refused(said)) => format!("; it does not relay ({said:?})"),
                    Some(Relay::Unknown(why)) => format!("; whether it relays is unknown: {why}"),
                    None => String::new(),
                };
                format!("answers a header with the source {localhost} from this host ({said}){relay}")
            }
        }
    }
}

/// Tests all ports in parallel.
pub(super) async fn check_all(servers: &[Server], limit: Duration) -> Vec<ProxyPort> {
    join_all(servers.iter().map(|server| check(server, limit))).await
}

async fn check(server: &Server, limit: Duration) -> ProxyPort {
    let addresses = match timeout(limit, addresses(server, limit)).await {
        Ok(addresses) => addresses,
        Err(_) => Err(format!("not finished within the {} of --timeout", humantime::format_duration(limit))),
    };
    ProxyPort { server: server.to_string(), addresses }
}

/// Tests every address of the server: a firewall may lack rules for one family.
async fn addresses(server: &Server, limit: Duration) -> Result<Vec<(SocketAddr, Exposure)>, String> {
    let found = tokio::net::lookup_host((server.host.as_str(), server.port)).await;
    let mut addresses: Vec<_> =
        found.map_err(|error| format!("resolving the name failed: {error}"))?.collect();
    addresses.sort_unstable();
    addresses.dedup();
    if addresses.is_empty() {
        return Err("the name has no address".to_owned());
    }
    let tried =
        addresses.into_iter().map(|address| async move { (address, probe_address(address, limit).await) });
    Ok(join_all(tried).await)
}

/// Tests clear text first. A port that accepts the connection and sends nothing may expect TLS.
async fn probe_address(address: SocketAddr, limit: Duration) -> Exposure {
    let (connect, answer) = (CONNECT_TIMEOUT.min(limit), REPLY_TIMEOUT.min(limit / 3));
    let seen = claim_localhost(address, Protocol::Smtp, connect, answer).await;
    if seen.outcome != Outcome::Silent {
        return exposure_of(&seen);
    }
    exposure_of(&claim_localhost(address, Protocol::Submissions, connect, answer).await)
}

fn exposure_of(seen: &Observation) -> Exposure {
    let said = match &seen.outcome {
        Outcome::Refused => return Exposure::Closed("connection refused".to_owned()),
        Outcome::NoAnswer => return Exposure::Closed("no answer".to_owned()),
        Outcome::Unreachable(why) => return Exposure::Closed(why.clone()),
        Outcome::Closed { reset } if seen.tls.is_none() => {
            let how = if *reset { "it resets the connection" } else { "it closes the connection" };
            return Exposure::Closed(how.to_owned());
        }
        Outcome::Silent if seen.tls.is_none() => {
            return Exposure::Closed("it accepts the connection and sends nothing".to_owned());
        }
        Outcome::Misunderstood { complaint, .. } => {
            format!("{complaint:?}: it reads the header as commands, so it is not a PROXY port")
        }
        Outcome::Alert(name) => format!("TLS alert {name}"),
        _ => seen.said().map_or_else(|| "TLS".to_owned(), |line| format!("{line:?}")),
    };
    let relay = match &seen.dialogue {
        Some(Dialogue::Relay(relay)) => Some(relay.clone()),
        Some(Dialogue::ClearTextLogin(_)) | None => None,
    };
    // A server that reads the header as commands does not know the header's client.
    let relay = relay.filter(|_| !matches!(seen.outcome, Outcome::Misunderstood { .. }));
    Exposure::Open { said, relay }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    /// Tests a server that handles its connection like this.
    async fn tried<F>(serve: impl FnOnce(tokio::net::TcpStream) -> F + Send + 'static) -> ProxyPort
    where
        F: Future<Output = ()> + Send,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap().to_string().parse().unwrap();
        let serving = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            serve(stream).await;
        });
        let port = check(&server, Duration::from_secs(6)).await;
        serving.abort();
        port
    }

    /// Answers the header with a greeting, and commands with these.
    async fn answer(mut stream: tokio::net::TcpStream, replies: &[&str]) {
        let mut heard = [0; 512];
        for reply in replies {
            let count = stream.read(&mut heard).await.unwrap_or(0);
            if heard.starts_with(b"\r\n\r\n\0\r\nQUIT\n") {
                // Version 2, PROXY, TCP over IPv4, 12 bytes of addresses, the source.
                assert_eq!(heard.get(12..20), Some(&[0x21, 0x11, 0, 12, 127, 0, 0, 1][..]), "{count}");
            }
            stream.write_all(reply.as_bytes()).await.unwrap();
        }
        while stream.read(&mut heard).await.unwrap_or(0) > 0 {}
    }

    fn exposure(port: &ProxyPort) -> &Exposure {
        &port.addresses.as_ref().unwrap()[0].1
    }

    #[tokio::test]
    async fn an_open_relay_is_reported() {
        let replies =
            ["220 mail\r\n", "250 mail\r\n", "250 Ok\r\n", "250 2.1.5 Ok\r\n", "250 Ok\r\n", "221 Bye\r\n"];
        let port = tried(move |stream| async move { answer(stream, &replies).await }).await;
        assert!(port.is_open() && port.relays(), "{port:?}");
        let failure = port.failure().unwrap();
        assert!(
            failure.contains("the source 127.0.0.1 from this host (\"220 mail\"); it is an OPEN RELAY"),
            "{failure}"
        );
    }

    #[tokio::test]
    async fn a_port_that_trusts_the_header_and_does_not_relay_is_open() {
        let replies = [
            "220 mail\r\n",
            "250 mail\r\n",
            "250 Ok\r\n",
            "454 4.7.1 <>: Relay access denied\r\n",
            "250 Ok\r\n",
        ];
        let port = tried(move |stream| async move { answer(stream, &replies).await }).await;
        assert!(port.is_open() && !port.relays(), "{port:?}");
        assert!(port.failure().unwrap().contains("; it does not relay"), "{port:?}");
        let port = tried(|stream| async move { answer(stream, &["* OK Dovecot ready.\r\n"]).await }).await;
        assert_eq!(
            *exposure(&port),
            Exposure::Open { said: "\"* OK Dovecot ready.\"".to_owned(), relay: None }
        );
        let port =
            tried(|stream| async move { answer(stream, &["220 mail\r\n", "500 5.5.2 bad\r\n"]).await }).await;
        assert!(port.failure().unwrap().contains("it is not a PROXY port"), "{port:?}");
    }

    #[tokio::test]
    async fn a_port_that_does_not_answer_is_closed() {
        let port = tried(|mut stream| async move { drop(stream.read(&mut [0; 64]).await) }).await;
        assert_eq!((port.is_open(), port.failure()), (false, None), "{port:?}");
        // The server sends nothing in clear text, and never accepts the connection for TLS.
        let port = tried(|stream| async move { answer(stream, &[]).await }).await;
        assert_eq!(port.failure(), None, "{port:?}");
        let unused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let port = check(&unused.to_string().parse().unwrap(), Duration::from_secs(3)).await;
        assert_eq!(*exposure(&port), Exposure::Closed("connection refused".to_owned()));
    }

    #[tokio::test]
    async fn a_name_without_an_address_is_not_a_closed_port() {
        let port = check(&"nowhere.invalid:2525".parse().unwrap(), Duration::from_secs(5)).await;
        assert!(!port.is_open());
        assert!(port.failure().unwrap().starts_with("nowhere.invalid:2525 was not tested: "), "{port:?}");
    }
}
