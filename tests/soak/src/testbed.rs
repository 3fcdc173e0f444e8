//! The testbed of the soak: three namespaces, a client address and port for every session, the
//! daemon.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Context as _;

use super::options::Engine;
use super::plan::{Opening, Plan};
use injector_testbed::daemon::{self, Injector};
use injector_testbed::netns::{self, Family, MAIL, Topology, VIP_RELAY, VIP_SPLICE};

/// Outstanding bytes of a direction above which it leaves the kernel data path, and below which it
/// returns: very low, so that the data path changes often.
const WATERMARKS: (u64, u64) = (64 << 10, 16 << 10);

/// Sessions per client address, each with its own port.
const PORTS: u64 = 50_000;
/// The first of these ports.
const FIRST_PORT: u64 = 10_000;
/// Client addresses of either family.
const ADDRESSES: u8 = 8;

/// The maximum number of sessions in one soak.
pub(crate) const MAX_SESSIONS: u64 = PORTS * ADDRESSES as u64;

/// The two listeners: SMTP, where the server speaks first, and IMAP over TLS, where the client
/// does. Both accept IPv4 and IPv6; one has an IPv4 backend, the other an IPv6 backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Listener {
    pub(crate) protocol: &'static str,
    pub(crate) port: u16,
    pub(crate) backend: SocketAddr,
}

const SMTP: Listener =
    Listener { protocol: "smtp", port: 25, backend: SocketAddr::new(IpAddr::V4(MAIL.v4), 2525) };
const IMAPS: Listener =
    Listener { protocol: "imaps", port: 993, backend: SocketAddr::new(IpAddr::V6(MAIL.v6), 10993) };

/// Both listeners.
pub(crate) const LISTENERS: [Listener; 2] = [SMTP, IMAPS];

/// The destination of a session.
pub(crate) fn destination(plan: &Plan, engine: Engine) -> SocketAddr {
    let listener = match plan.opening {
        Opening::Server { .. } => SMTP,
        Opening::Client => IMAPS,
    };
    let vip = match engine {
        Engine::Splice => VIP_SPLICE,
        Engine::Relay => VIP_RELAY,
    };
    SocketAddr::new(vip.of(plan.family), listener.port)
}

/// The source of a session. It is unique within a soak, so that the header alone identifies the
/// session.
pub(crate) fn source(number: u64, family: Family) -> SocketAddr {
    let (address, port) = (number / PORTS, FIRST_PORT + number % PORTS);
    let address = u8::try_from(address).unwrap_or(u8::MAX);
    SocketAddr::new(client(address, family), u16::try_from(port).unwrap_or_default())
}

/// The number of the session that has this source.
pub(crate) fn number(source: SocketAddr) -> Option<u64> {
    let family = if source.is_ipv4() { Family::V4 } else { Family::V6 };
    let address = (0..ADDRESSES).find(|address| client(*address, family) == source.ip())?;
    let port = u64::from(source.port()).checked_sub(FIRST_PORT)?;
    (port < PORTS).then_some(u64::from(address) * PORTS + port)
}

/// A client address, in the networks of [`netns::CLIENT`].
fn client(address: u8, family: Family) -> IpAddr {
    let last = 100 + address;
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(198, 51, 100, last)),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, last.into())),
    }
}

/// The namespaces and the daemon; removed on drop.
#[derive(Debug)]
pub(crate) struct Testbed {
    // Before the namespaces: fields are dropped in this order.
    pub(crate) injector: Injector,
    pub(crate) topology: Topology,
    /// High and low water mark, if the daemon supports them.
    pub(crate) watermarks: Option<(u64, u64)>,
}

impl Testbed {
    pub(crate) fn new(engine: Engine) -> anyhow::Result<Self> {
        let topology = Topology::new()?;
        for address in 0..ADDRESSES {
            let (v4, v6) = (client(address, Family::V4), client(address, Family::V6));
            topology.client.ip(&["address", "add", &format!("{v4}/24"), "dev", "eth0"])?;
            topology.client.ip(&["address", "add", &format!("{v6}/64"), "dev", "eth0", "nodad"])?;
        }
        let with_marks = configuration(engine, Some(WATERMARKS));
        let watermarks = accepts_config(&with_marks)?.then_some(WATERMARKS);
        let config = if watermarks.is_some() { with_marks } else { configuration(engine, None) };
        let injector = Injector::start(&topology.edge, &config)?;
        Ok(Self { injector, topology, watermarks })
    }
}

/// Low enough for most sessions with small pieces, too high for sessions that start with bulk:
/// these go by pipe.
const ENROL_AFTER: u32 = 3;

fn configuration(engine: Engine, watermarks: Option<(u64, u64)>) -> String {
    let metrics = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9145);
    let mut text = format!("[metrics]\nlisten = \"{metrics}\"\n");
    if let Some((high, low)) = watermarks {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "\n[splice]\nhigh_water = {high}\nlow_water = {low}\nenrol_after_messages = {ENROL_AFTER}\n"
        );
    }
    let vip = match engine {
        Engine::Splice => VIP_SPLICE,
        Engine::Relay => VIP_RELAY,
    };
    for Listener { protocol, port, backend } in LISTENERS {
        let binds = Family::ALL.map(|family| SocketAddr::new(vip.of(family), port));
        let [v4, v6] = binds;
        let _ = write!(
            text,
            "\n[[listener]]\nname = \"{protocol}\"\nbind = [\"{v4}\", \"{v6}\"]\nprotocol = \"{protocol}\"\n\
             engine = \"{}\"\nbackends = [\"{backend}\"]\n",
            engine.name()
        );
    }
    text
}

/// Whether the daemon accepts a configuration.
fn accepts_config(config: &str) -> anyhow::Result<bool> {
    let dir = netns::scratch_dir("soak")?;
    let file = dir.path().join("injector.toml");
    fs::write(&file, config)?;
    let binary = daemon::binary()?;
    let output = std::process::Command::new(&binary).arg("check").arg("--config").arg(&file).output();
    let output = output.with_context(|| format!("cannot run {}", binary.display()))?;
    Ok(output.status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_session_has_an_address_that_identifies_it() {
        for family in Family::ALL {
            for session in [0, 1, 49_999, 50_000, 123_456, MAX_SESSIONS - 1] {
                assert_eq!(number(source(session, family)), Some(session));
            }
        }
        for other in
            ["198.51.100.7:10000", "198.51.100.100:9999", "198.51.100.108:10000", "[2001:db8:c::64]:60000"]
        {
            assert_eq!(number(other.parse().unwrap()), None, "{other}");
        }
        assert_eq!(source(50_001, Family::V4).to_string(), "198.51.100.101:10001");
    }
}
