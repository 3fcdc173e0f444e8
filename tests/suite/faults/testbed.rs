//! The three namespaces, plain sockets in them, and an injector between them.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, ensure};
use injector_testbed::daemon::{EAGER, Injector, Session};
use injector_testbed::netns::{CLIENT, Family, MAIL, Topology, VIP_SPLICE};

pub(crate) use injector_testbed::sockets::{
    Ending, LIMIT, accept, accept_with_header, ending, expect, pass, patient,
};

/// Where clients connect.
pub(crate) const PORT: u16 = 2500;
/// Where the backend listens.
pub(crate) const BACKEND_PORT: u16 = 12500;

/// The namespaces, shared by all trials.
#[derive(Debug)]
pub(crate) struct Testbed {
    pub(crate) topology: Topology,
}

impl Testbed {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let topology = Topology::new()?;
        // The receive buffers that Linux had before 6.16; since then they grow to 32 MiB.
        topology.edge.sysctl("net/ipv4/tcp_rmem", "4096 131072 6291456")?;
        Ok(Self { topology })
    }

    /// A backend that listens at [`BACKEND_PORT`].
    pub(crate) fn backend(&self) -> anyhow::Result<TcpListener> {
        self.topology.mail.run(|| TcpListener::bind(backend_address()))?.context("backend")
    }

    /// An injector with one listener for `protocol`; `extra` are further lines of the listener.
    pub(crate) fn injector(&self, engine: &str, protocol: &str, extra: &str) -> anyhow::Result<Injector> {
        Injector::start(&self.topology.edge, &config(engine, protocol, extra))
    }

    /// An injector with this configuration, started by a command that ends in `-c`.
    pub(crate) fn injector_by(&self, command: &[&str], config: &str) -> anyhow::Result<Injector> {
        Injector::start_by(&self.topology.edge, command, config)
    }

    /// A client's connection to the injector; `None` if it is reset so early that connecting fails.
    pub(crate) fn client_unless_reset(&self) -> anyhow::Result<Option<TcpStream>> {
        match self.client() {
            Err(error) if was_reset(&error) => Ok(None),
            client => client.map(Some),
        }
    }

    /// A client's connection to the injector.
    pub(crate) fn client(&self) -> anyhow::Result<TcpStream> {
        let connect = || TcpStream::connect_timeout(&public_address(), LIMIT);
        let client = self.topology.client.run(connect)?.context("connecting to the injector")?;
        patient(&client)?;
        Ok(client)
    }
}

fn was_reset(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<std::io::Error>();
    error.is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

/// Where clients connect.
pub(crate) fn public_address() -> SocketAddr {
    SocketAddr::new(VIP_SPLICE.of(Family::V4), PORT)
}

/// Where the backend listens.
pub(crate) fn backend_address() -> SocketAddr {
    SocketAddr::new(MAIL.of(Family::V4), BACKEND_PORT)
}

pub(crate) fn client_ip() -> IpAddr {
    CLIENT.of(Family::V4)
}

pub(crate) fn metrics_address() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9145)
}

/// A configuration with one listener. Lines of `extra` before its first blank line belong to the
/// listener; the rest is appended to the file. Unless that has a table `[splice]`, the splice
/// engine enrols at once.
pub(crate) fn config(engine: &str, protocol: &str, extra: &str) -> String {
    let (own, rest) = extra.split_once("\n\n").unwrap_or((extra, ""));
    let backends = if own.contains("backends = ") {
        String::new()
    } else {
        format!("backends = [\"{}\"]\n", backend_address())
    };
    let eager = if rest.contains("[splice]") { "" } else { EAGER };
    format!(
        "[metrics]\nlisten = \"{}\"\n\n[[listener]]\nname = \"test\"\nbind = [\"{}\"]\nprotocol = \"{protocol}\"\n\
         engine = \"{engine}\"\n{backends}{own}\n\n{rest}\n\n{eager}",
        metrics_address(),
        public_address()
    )
}

/// A connection that is already in the accept queue of a non-blocking listener.
pub(crate) fn accept_now(backend: &TcpListener) -> anyhow::Result<Option<TcpStream>> {
    match backend.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Waits until `count` connections have a log line, and returns them all.
pub(crate) fn finished(injector: &Injector, count: usize) -> anyhow::Result<Vec<Session>> {
    injector.sessions_within(count)
}

/// Checks that the one finished connection has this close reason.
pub(crate) fn ended(injector: &Injector, end: &str) -> anyhow::Result<Session> {
    let mut sessions = finished(injector, 1)?;
    let session = sessions.remove(0);
    let seen = session.field("reason").unwrap_or_default();
    ensure!(
        seen == end,
        "ended {seen:?} where {end:?} was expected: {session:?}\nlogged:\n{}",
        injector.log()
    );
    Ok(session)
}

/// Checks that a counter has this value.
pub(crate) fn counted(
    injector: &Injector,
    name: &str,
    labels: &[(&str, &str)],
    value: f64,
) -> anyhow::Result<()> {
    let seen = injector.metrics()?.sum(name, labels);
    ensure!((seen - value).abs() < 0.5, "{name}{labels:?} is {seen}, expected {value}");
    Ok(())
}
