//! The three namespaces, plain sockets in them, and an injector between them.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, bail, ensure};
use injector_common::proxy::{ParseError, Parsed, parse};
use injector_tests::daemon::{EAGER, Injector, Session};
use injector_tests::netns::{CLIENT, Family, MAIL, Topology, VIP_SPLICE};

pub(crate) use injector_tests::sockets::{LIMIT, accept, expect, pass, patient};

/// Where clients connect.
pub(crate) const PORT: u16 = 2500;
/// Where the backend listens.
pub(crate) const BACKEND_PORT: u16 = 12500;

/// The namespaces, made once.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) topology: Topology,
}

impl World {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self { topology: Topology::new()? })
    }

    /// A backend that listens at [`BACKEND_PORT`].
    pub(crate) fn backend(&self) -> anyhow::Result<TcpListener> {
        self.topology.mail.run(|| TcpListener::bind(backend_address()))?.context("backend")
    }

    /// An injector with one listener for `protocol`; `extra` are further lines of it.
    pub(crate) fn injector(&self, engine: &str, protocol: &str, extra: &str) -> anyhow::Result<Injector> {
        Injector::start(&self.topology.edge, &config(engine, protocol, extra))
    }

    /// An injector that a command ending in `-c` starts, with this configuration.
    pub(crate) fn injector_by(&self, command: &[&str], config: &str) -> anyhow::Result<Injector> {
        Injector::start_by(&self.topology.edge, command, config)
    }

    /// A client's connection to the injector, which may be reset so fast that connecting already says so: then none.
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

/// A configuration with one listener. Lines of `extra` before its first blank line belong to the listener; what follows
/// stands at the end of the file. Unless that has a table `[splice]` of its own, the splice engine is eager.
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

/// Accepts one connection and reads its header, which must come whole in the first read; returns what came behind it.
pub(crate) fn accept_with_header(listener: &TcpListener) -> anyhow::Result<(TcpStream, Header, Vec<u8>)> {
    let mut stream = accept(listener)?;
    let mut first = vec![0; 16384];
    let count = stream.read(&mut first).context("reading the header")?;
    first.truncate(count);
    let header = match parse(&first) {
        Ok(parsed) => Header::of(&first, &parsed),
        Err(ParseError::Incomplete { needed }) => {
            bail!("{count} bytes in the first read, the header has {needed}")
        }
        Err(error) => bail!("no header but {first:02x?}: {error}"),
    };
    let rest = first.split_off(header.bytes.len());
    Ok((stream, header, rest))
}

/// What a backend read first.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) bytes: Vec<u8>,
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
}

impl Header {
    fn of(first: &[u8], parsed: &Parsed<'_>) -> Self {
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let (source, destination) = parsed
            .command
            .addresses()
            .map_or((nowhere, nowhere), |addresses| (addresses.source(), addresses.destination()));
        Self { bytes: first.get(..parsed.len).unwrap_or_default().to_vec(), source, destination }
    }
}

/// How the other side ended a connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// A FIN, after these bytes.
    Fin(Vec<u8>),
    /// A reset, after these bytes.
    Reset(Vec<u8>),
}

/// Reads to the end, whichever it is.
pub(crate) fn ending(stream: &mut TcpStream) -> anyhow::Result<Ending> {
    let mut seen = Vec::new();
    match stream.read_to_end(&mut seen) {
        Ok(_) => Ok(Ending::Fin(seen)),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(Ending::Reset(seen)),
        Err(error) => Err(error).with_context(|| format!("after {} bytes", seen.len())),
    }
}

/// Waits until `count` connections have their line, and returns them all.
pub(crate) fn finished(injector: &Injector, count: usize) -> anyhow::Result<Vec<Session>> {
    injector.sessions_within(count)
}

/// The one finished connection ended so.
pub(crate) fn ended(injector: &Injector, end: &str) -> anyhow::Result<Session> {
    let mut sessions = finished(injector, 1)?;
    let session = sessions.remove(0);
    let seen = session.field("end").unwrap_or_default();
    ensure!(
        seen == end,
        "ended {seen:?} where {end:?} was expected: {session:?}\nlogged:\n{}",
        injector.log()
    );
    Ok(session)
}

/// A counter of the listener has this value.
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
