//! The three namespaces, an injector with the inline engine, and plain sockets on both sides. The
//! edge does not forward.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use injector_common::proxy::{ParseError, parse};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::{ADMIN, BPF_EVENTS, Injector};
use injector_testbed::netns::{CLIENT, Family, MAIL, Netns, NetnsHandle, Topology, VIP_INLINE};

pub(crate) use injector_testbed::sockets::{LIMIT, accept, accept_within, expect, pass, patient};

/// Where clients connect.
pub(crate) const PORT: u16 = 2500;
/// The same, for a protocol in which clients speak first.
pub(crate) const TLS_PORT: u16 = 2501;
/// Where the backend listens.
pub(crate) const BACKEND_PORT: u16 = 12500;

/// The namespaces, shared by all trials of a group.
#[derive(Debug)]
pub(crate) struct Testbed {
    pub(crate) topology: Topology,
    pub(crate) bpffs: BpfFs,
}

impl Testbed {
    pub(crate) fn new(group: &str) -> anyhow::Result<Self> {
        let topology = Topology::named(group)?;
        topology.edge.sysctl("net/ipv4/ip_forward", "0")?;
        topology.edge.sysctl("net/ipv6/conf/all/forwarding", "0")?;
        Ok(Self { topology, bpffs: BpfFs::mount()? })
    }

    /// An injector for both families; `extra` are lines of `[inline]`.
    pub(crate) fn injector(&self, protocol: &str, extra: &str) -> anyhow::Result<InlineInjector> {
        self.start(&self.config(protocol, extra))
    }

    /// An injector with this configuration, which has this testbed's pin.
    pub(crate) fn start(&self, config: &str) -> anyhow::Result<InlineInjector> {
        InlineInjector::start(&self.topology.edge, self.bpffs.path(), config)
    }

    /// Detaches what injectors of [`Self::config`] leave.
    pub(crate) fn attached(&self) -> DetachOnDrop {
        DetachOnDrop { edge: self.topology.edge.handle(), pin: self.bpffs.path().to_owned() }
    }

    pub(crate) fn config(&self, protocol: &str, extra: &str) -> String {
        self.config_with(&format!("devices = [\"outside\", \"inside\"]\n{extra}"), protocol, "")
    }

    /// A configuration with these lines of `[inline]`, and these lines and tables of the one listener.
    pub(crate) fn config_with(&self, inline: &str, protocol: &str, listener: &str) -> String {
        let [v4, v6] = Family::ALL.map(public_address);
        let backends = if listener.contains("backends = ") {
            String::new()
        } else {
            let [b4, b6] = Family::ALL.map(backend_address);
            format!("backends = [\"{b4}\", \"{b6}\"]\n")
        };
        format!(
            "[metrics]\nlisten = \"127.0.0.1:9145\"\n\n{ADMIN}\n[inline]\npin = \"{}\"\n{inline}\n\n\
             [[listener]]\nname = \"test\"\nbind = [\"{v4}\", \"{v6}\"]\nprotocol = \"{protocol}\"\n\
             engine = \"inline\"\n{backends}{listener}\n",
            self.bpffs.path().display()
        )
    }

    /// A backend that listens at [`BACKEND_PORT`].
    pub(crate) fn backend(&self, family: Family) -> anyhow::Result<TcpListener> {
        self.topology.mail.listen(backend_address(family)).context("backend")
    }

    /// A client's connection to the public address.
    pub(crate) fn client(&self, family: Family) -> anyhow::Result<TcpStream> {
        connect(&self.topology.client, public_address(family))
    }

    /// A client and its connection at the backend, with the header read and both directions used.
    pub(crate) fn joined(
        &self,
        family: Family,
        backend: &TcpListener,
    ) -> anyhow::Result<(TcpStream, TcpStream)> {
        greeted(self.client(family)?, backend)
    }

    /// The same by inline, not by the socket.
    pub(crate) fn inlined(
        &self,
        family: Family,
        backend: &TcpListener,
    ) -> anyhow::Result<(TcpStream, TcpStream)> {
        let (client, server) = self.joined(family, backend)?;
        ensure!(is_inline(&server)?, "served by the socket, from {}", server.peer_addr()?);
        Ok((client, server))
    }
}

/// A connection from a namespace.
pub(crate) fn connect(netns: &Netns, address: SocketAddr) -> anyhow::Result<TcpStream> {
    let connect = || TcpStream::connect_timeout(&address, LIMIT);
    let client = netns.run(connect)?.with_context(|| format!("connecting to {address}"))?;
    patient(&client)?;
    Ok(client)
}

/// A client's connection at the backend, with the header read and both directions used.
pub(crate) fn greeted(
    mut client: TcpStream,
    backend: &TcpListener,
) -> anyhow::Result<(TcpStream, TcpStream)> {
    let mut server = accept(backend)?;
    own_header(&mut server, &client)?;
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    pass(&mut client, &mut server, b"EHLO client\r\n")?;
    Ok((client, server))
}

/// Whether inline has opened a backend's connection: it uses no source port of those that the host's
/// sockets get (`net.ipv4.ip_local_port_range`).
pub(crate) fn is_inline(server: &TcpStream) -> anyhow::Result<bool> {
    Ok(!(32_768..=60_999).contains(&server.peer_addr()?.port()))
}

/// The count of this event in the program.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number, and small")]
pub(crate) fn counted(injector: &Injector, event: &str) -> anyhow::Result<u64> {
    Ok(injector.metrics()?.sum(BPF_EVENTS, &[("event", event)]) as u64)
}

/// Checks that both ends of a connection still work.
pub(crate) fn works(client: &mut TcpStream, server: &mut TcpStream) -> anyhow::Result<()> {
    pass(client, server, b"NOOP\r\n")?;
    pass(server, client, b"250 ok\r\n")
}

/// An injector whose programs are detached on drop.
#[derive(Debug)]
pub(crate) struct InlineInjector {
    // Dropped in this order.
    pub(crate) injector: Injector,
    _attached: DetachOnDrop,
}

impl InlineInjector {
    /// Starts it on this host, with this configuration and the pin that it has.
    pub(crate) fn start(edge: &Netns, pin: &Path, config: &str) -> anyhow::Result<Self> {
        let attached = DetachOnDrop { edge: edge.handle(), pin: pin.to_owned() };
        Ok(Self { injector: Injector::start(edge, config)?, _attached: attached })
    }
}

impl std::ops::Deref for InlineInjector {
    type Target = Injector;

    fn deref(&self) -> &Injector {
        &self.injector
    }
}

/// What an injector leaves in the kernel; detached on drop.
#[derive(Debug)]
pub(crate) struct DetachOnDrop {
    pub(crate) edge: NetnsHandle,
    /// Its `inline.pin`.
    pub(crate) pin: PathBuf,
}

impl Drop for DetachOnDrop {
    fn drop(&mut self) {
        let removed = self.edge.run(|| injector_user::engine::inline::detach(&self.pin, true));
        if let Err(error) = removed.and_then(|removed| Ok(removed?)) {
            eprintln!("detaching: {error:#}");
        }
    }
}

/// Where clients connect.
pub(crate) fn public_address(family: Family) -> SocketAddr {
    SocketAddr::new(VIP_INLINE.of(family), PORT)
}

/// Where the backend listens.
pub(crate) fn backend_address(family: Family) -> SocketAddr {
    SocketAddr::new(MAIL.of(family), BACKEND_PORT)
}

pub(crate) fn client_ip(family: Family) -> IpAddr {
    CLIENT.of(family)
}

/// Reads the header, which must be complete; returns the client that it names, and the client's
/// destination.
pub(crate) fn header(stream: &mut TcpStream) -> anyhow::Result<(SocketAddr, SocketAddr)> {
    let mut seen = Vec::new();
    loop {
        let mut byte = [0];
        ensure!(stream.read(&mut byte).context("reading the header")? == 1, "the end, after {seen:02x?}");
        seen.push(byte[0]);
        match parse(&seen) {
            Ok(parsed) => {
                let addresses = parsed.command.addresses().context("a header without addresses")?;
                return Ok((addresses.source(), addresses.destination()));
            }
            Err(ParseError::Incomplete { .. }) => {}
            Err(error) => bail!("no header but {seen:02x?}: {error}"),
        }
    }
}

/// Reads the header, which must name the client's own addresses.
pub(crate) fn own_header(stream: &mut TcpStream, client: &TcpStream) -> anyhow::Result<()> {
    let (source, destination) = header(stream)?;
    ensure!(source == client.local_addr()?, "the header names {source}");
    ensure!(destination == client.peer_addr()?, "the header has the destination {destination}");
    Ok(())
}
