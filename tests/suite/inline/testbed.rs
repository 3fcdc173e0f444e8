//! The three namespaces, NAT rules of the test, an injector with the inline engine, and plain
//! sockets on both sides.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;

use anyhow::{Context as _, bail, ensure};
use injector_common::proxy::{ParseError, parse};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::Injector;
use injector_testbed::netns::{
    CLIENT, EDGE_INSIDE, Family, HostAddresses, MAIL, Netns, NetnsHandle, Topology, VIP_INLINE,
};

pub(crate) use injector_testbed::sockets::{LIMIT, accept, accept_within, expect, pass, patient};

/// Where clients connect.
pub(crate) const PORT: u16 = 2500;
/// The same, for a protocol in which clients speak first.
pub(crate) const TLS_PORT: u16 = 2501;
/// Where the backend listens.
pub(crate) const BACKEND_PORT: u16 = 12500;

/// The namespaces, shared by all trials.
#[derive(Debug)]
pub(crate) struct Testbed {
    pub(crate) topology: Topology,
    pub(crate) bpffs: BpfFs,
}

impl Testbed {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self { topology: Topology::new()?, bpffs: BpfFs::mount()? })
    }

    /// An injector for both families, with this test's own NAT rules.
    pub(crate) fn injector(&self, protocol: &str, extra: &str) -> anyhow::Result<InlineInjector> {
        let nat = self.nat()?;
        let injector = Injector::start(&self.topology.edge, &self.config(protocol, extra))?;
        Ok(InlineInjector { injector, _attached: self.attached(), _nat: nat })
    }

    pub(crate) fn nat(&self) -> anyhow::Result<Nat> {
        Nat::new(&self.topology.edge, "test-nat", VIP_INLINE, MAIL, EDGE_INSIDE)
    }

    /// Detaches what injectors of [`Self::config`] leave.
    pub(crate) fn attached(&self) -> DetachOnDrop {
        DetachOnDrop { edge: self.topology.edge.handle(), pin: self.bpffs.path().to_owned() }
    }

    pub(crate) fn config(&self, protocol: &str, extra: &str) -> String {
        let [v4, v6] = [Family::V4, Family::V6].map(public_address);
        let [b4, b6] = [Family::V4, Family::V6].map(backend_address);
        format!(
            "[metrics]\nlisten = \"127.0.0.1:9145\"\n\n[inline]\nnat = \"external\"\npin = \"{}\"\n\
             client_devices = [\"outside\"]\nbackend_devices = [\"inside\"]\n{extra}\n\n\
             [[listener]]\nname = \"test\"\nbind = [\"{v4}\", \"{v6}\"]\nprotocol = \"{protocol}\"\n\
             engine = \"inline\"\nbackends = [\"{b4}\", \"{b6}\"]\n",
            self.bpffs.path().display()
        )
    }

    /// A backend that listens at [`BACKEND_PORT`].
    pub(crate) fn backend(&self, family: Family) -> anyhow::Result<TcpListener> {
        self.topology.mail.run(|| TcpListener::bind(backend_address(family)))?.context("backend")
    }

    /// A client's connection to the public address.
    pub(crate) fn client(&self, family: Family) -> anyhow::Result<TcpStream> {
        let connect = || TcpStream::connect_timeout(&public_address(family), LIMIT);
        let client = self.topology.client.run(connect)?.context("connecting to the public address")?;
        patient(&client)?;
        Ok(client)
    }
}

/// An injector whose programs are detached on drop.
#[derive(Debug)]
pub(crate) struct InlineInjector {
    // Dropped in this order.
    pub(crate) injector: Injector,
    _attached: DetachOnDrop,
    _nat: Nat,
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
        let removed = self.edge.run(|| injector_user::engine::inline::detach(&self.pin));
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

/// Destination NAT and masquerade, in a table of this test.
#[derive(Debug)]
pub(crate) struct Nat {
    edge: NetnsHandle,
    table: &'static str,
}

impl Nat {
    /// From [`PORT`] and [`TLS_PORT`] of `vip` to [`BACKEND_PORT`] of `backend`, which sees
    /// `inside` as its client.
    pub(crate) fn new(
        edge: &Netns,
        table: &'static str,
        vip: HostAddresses,
        backend: HostAddresses,
        inside: HostAddresses,
    ) -> anyhow::Result<Self> {
        let nat = Self { edge: edge.handle(), table };
        let (v4, v6) = (vip.v4, vip.v6);
        let (b4, b6) = (backend.v4, backend.v6);
        let (e4, e6) = (inside.v4, inside.v6);
        let ports = format!("{{ {PORT}, {TLS_PORT} }}");
        nat.edge.nft(&format!(
            "add table inet {table}; \
             add chain inet {table} before {{ type nat hook prerouting priority -100; }}; \
             add chain inet {table} after {{ type nat hook postrouting priority 100; }}; \
             add rule inet {table} before ip daddr {v4} tcp dport {ports} dnat ip to {b4}:{BACKEND_PORT}; \
             add rule inet {table} before ip6 daddr {v6} tcp dport {ports} dnat ip6 to [{b6}]:{BACKEND_PORT}; \
             add rule inet {table} after ip daddr {b4} tcp dport {BACKEND_PORT} snat ip to {e4}; \
             add rule inet {table} after ip6 daddr {b6} tcp dport {BACKEND_PORT} snat ip6 to {e6}"
        ))?;
        Ok(nat)
    }
}

impl Drop for Nat {
    fn drop(&mut self) {
        if let Err(error) = self.edge.nft(&format!("delete table inet {}", self.table)) {
            eprintln!("{error:#}");
        }
    }
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
