//! An injector between two links that the test controls (see [`crate::wire`]), in namespaces of its
//! own. It is created once for all trials of a kind.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::{BPF_EVENTS, Injector, Session};
use injector_testbed::netns::{Family, HostAddresses, Netns, VIP_RELAY};
use socket2::{Domain, Socket, Type};

use crate::testbed::{
    BACKEND_PORT, DetachOnDrop, LIMIT, PORT, TLS_PORT, accept_within, expect, header, patient,
};
use crate::wire::{Layer, Wire};

const CLIENT: HostAddresses =
    place(Ipv4Addr::new(198, 51, 101, 7), Ipv6Addr::new(0x2001, 0xdb8, 0xcc, 0, 0, 0, 0, 7));
const OUTSIDE: HostAddresses =
    place(Ipv4Addr::new(198, 51, 101, 1), Ipv6Addr::new(0x2001, 0xdb8, 0xcc, 0, 0, 0, 0, 1));
const INSIDE: HostAddresses = place(Ipv4Addr::new(10, 26, 0, 1), Ipv6Addr::new(0xfd26, 0, 0, 0, 0, 0, 0, 1));
const BACKEND: HostAddresses = place(Ipv4Addr::new(10, 26, 0, 2), Ipv6Addr::new(0xfd26, 0, 0, 0, 0, 0, 0, 2));
const VIP: HostAddresses = VIP_RELAY;

const fn place(v4: Ipv4Addr, v6: Ipv6Addr) -> HostAddresses {
    HostAddresses { v4, v6 }
}

/// Namespaces of its own: a network namespace has one daemon with this engine.
#[derive(Debug)]
pub(crate) struct WireTestbed {
    // Dropped in this order.
    pub(crate) injector: Injector,
    attached: DetachOnDrop,
    pub(crate) wire: Wire,
    pub(crate) layer: Layer,
    client: Netns,
    edge: Netns,
    mail: Netns,
    _bpffs: BpfFs,
}

impl WireTestbed {
    pub(crate) fn new(group: &str, layer: Layer) -> anyhow::Result<Self> {
        Self::with(group, layer, "")
    }

    /// With these lines of `[inline]`.
    pub(crate) fn with(group: &str, layer: Layer, lines: &str) -> anyhow::Result<Self> {
        let netns = |role: &str| Netns::new(&format!("{role}-{group}"));
        let (client, edge, mail) = (netns("client")?, netns("edge")?, netns("mail")?);
        let ends = [(&client, "wire"), (&edge, "wire-outside"), (&edge, "wire-inside"), (&mail, "wire")];
        let wire = Wire::new(ends, layer)?;
        for ((netns, device), place) in ends.into_iter().zip([CLIENT, OUTSIDE, INSIDE, BACKEND]) {
            netns.ip(&["address", "add", &format!("{}/24", place.v4), "dev", device])?;
            netns.ip(&["address", "add", &format!("{}/64", place.v6), "dev", device, "nodad"])?;
        }
        edge.ip(&["address", "add", &format!("{}/32", VIP.v4), "dev", "lo"])?;
        edge.ip(&["address", "add", &format!("{}/128", VIP.v6), "dev", "lo", "nodad"])?;
        // The public address, and for attempts to bypass it, the backend's own.
        for (to, via) in [
            (VIP.v4.to_string(), OUTSIDE.v4.to_string()),
            (VIP.v6.to_string(), OUTSIDE.v6.to_string()),
            (BACKEND.v4.to_string(), OUTSIDE.v4.to_string()),
            (BACKEND.v6.to_string(), OUTSIDE.v6.to_string()),
        ] {
            client.ip(&["route", "replace", &to, "via", &via, "dev", "wire"])?;
        }
        // Packets to forged sources go to a link without a host.
        for (to, via) in
            [("203.0.0.0/16", CLIENT.v4.to_string()), ("2001:db8:ee::/64", CLIENT.v6.to_string())]
        {
            edge.ip(&["route", "replace", to, "via", &via, "dev", "wire-outside"])?;
        }
        // What a backend answers to a client that reached it without the injector.
        for via in [INSIDE.v4.to_string(), INSIDE.v6.to_string()] {
            mail.ip(&["route", "add", "default", "via", &via])?;
        }
        let bpffs = BpfFs::mount()?;
        let pin = bpffs.path().join("wire");
        let attached = DetachOnDrop { edge: edge.handle(), pin: pin.clone() };
        let mut config = format!(
            "[metrics]\nlisten = \"127.0.0.1:9146\"\n\n[inline]\npin = \"{}\"\n\
             devices = [\"wire-outside\", \"wire-inside\"]\n{lines}\n\
             [guard]\nmax_connections_per_source = 1000000\nmax_rate_per_source = 1000000\n\n",
            pin.display()
        );
        for (name, port, protocol) in [("wire", PORT, "smtp"), ("wire-tls", TLS_PORT, "imaps")] {
            let [v4, v6] = Family::ALL.map(|family| SocketAddr::new(VIP.of(family), port));
            let [b4, b6] = Family::ALL.map(backend);
            write!(
                config,
                "[[listener]]\nname = \"{name}\"\nbind = [\"{v4}\", \"{v6}\"]\nprotocol = \"{protocol}\"\n\
                 engine = \"inline\"\nbackends = [\"{b4}\", \"{b6}\"]\n\
                 [listener.health]\neject_after = 0\n\n"
            )?;
        }
        let injector = Injector::start(&edge, &config)?;
        Ok(Self { injector, attached, wire, layer, client, edge, mail, _bpffs: bpffs })
    }

    /// The directory of what is pinned.
    pub(crate) fn pin(&self) -> &std::path::Path {
        &self.attached.pin
    }

    pub(crate) fn client_side(&self) -> &Netns {
        &self.client
    }

    pub(crate) fn edge(&self) -> &Netns {
        &self.edge
    }

    pub(crate) fn backend_side(&self) -> &Netns {
        &self.mail
    }

    /// A backend that listens.
    pub(crate) fn backend(&self, family: Family) -> anyhow::Result<TcpListener> {
        self.backend_side().listen(backend(family)).context("backend")
    }

    /// A client's connection to the public address.
    pub(crate) fn client(&self, family: Family) -> anyhow::Result<TcpStream> {
        self.client_by(family, |_| Ok(()))
    }

    /// The same to the listener where the header waits for the client's first bytes.
    pub(crate) fn tls_client(&self, family: Family) -> anyhow::Result<TcpStream> {
        self.client_to(tls(family), |_| Ok(()))
    }

    /// To the public address, from a prepared socket.
    pub(crate) fn client_by(
        &self,
        family: Family,
        prepare: impl FnOnce(&Socket) -> std::io::Result<()> + Send,
    ) -> anyhow::Result<TcpStream> {
        self.client_to(public(family), prepare)
    }

    fn client_to(
        &self,
        address: SocketAddr,
        prepare: impl FnOnce(&Socket) -> std::io::Result<()> + Send,
    ) -> anyhow::Result<TcpStream> {
        let connect = || {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
            prepare(&socket)?;
            socket.connect_timeout(&address.into(), LIMIT)?;
            std::io::Result::Ok(TcpStream::from(socket))
        };
        let client = self.client_side().run(connect)?.context("connecting to the public address")?;
        patient(&client)?;
        Ok(client)
    }

    /// Opens a connection, reads and checks the header, and measures the time to the first byte:
    /// the banner at the client, or the client's first bytes at the backend.
    pub(crate) fn connection(&self, family: Family, first: FirstSpeaker) -> anyhow::Result<Connection> {
        self.connection_within(family, first, LIMIT)
    }

    /// The same with another time limit.
    pub(crate) fn connection_within(
        &self,
        family: Family,
        first: FirstSpeaker,
        limit: Duration,
    ) -> anyhow::Result<Connection> {
        let listener = self.backend(family)?;
        self.connection_at(&listener, family, first, limit)
    }

    /// The same from a prepared client socket.
    pub(crate) fn connection_by(
        &self,
        family: Family,
        first: FirstSpeaker,
        prepare: impl FnOnce(&Socket) -> std::io::Result<()> + Send,
    ) -> anyhow::Result<Connection> {
        let listener = self.backend(family)?;
        self.connect(&listener, family, first, LIMIT, prepare)
    }

    /// The same with an existing backend.
    pub(crate) fn connection_at(
        &self,
        listener: &TcpListener,
        family: Family,
        first: FirstSpeaker,
        limit: Duration,
    ) -> anyhow::Result<Connection> {
        self.connect(listener, family, first, limit, |_| Ok(()))
    }

    fn connect(
        &self,
        listener: &TcpListener,
        family: Family,
        first: FirstSpeaker,
        limit: Duration,
        prepare: impl FnOnce(&Socket) -> std::io::Result<()> + Send,
    ) -> anyhow::Result<Connection> {
        const WORDS: &[u8] = b"the first words";
        let started = Instant::now();
        std::thread::scope(|scope| {
            let serving = scope.spawn(move || {
                let mut server = accept_within(listener, limit)?;
                let named = header(&mut server)?;
                if first == FirstSpeaker::Server {
                    server.write_all(WORDS)?;
                } else {
                    expect(&mut server, WORDS)?;
                }
                anyhow::Ok((server, named, started.elapsed()))
            });
            let address = if first == FirstSpeaker::ClientByProtocol { tls(family) } else { public(family) };
            let mut client = self.client_to(address, prepare)?;
            client.set_read_timeout(Some(limit))?;
            if first == FirstSpeaker::Server {
                expect(&mut client, WORDS)?;
            } else {
                client.write_all(WORDS)?;
            }
            let banner = started.elapsed();
            let (server, named, read) = serving.join().map_err(|_| anyhow!("panicked"))??;
            let own = (client.local_addr()?, client.peer_addr()?);
            ensure!(named == own, "the header names {named:?}, not {own:?}");
            let took = if first == FirstSpeaker::Server { banner } else { read };
            Ok(Connection { client, server, took })
        })
    }

    /// The count of this event in the programs.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number, and small")]
    pub(crate) fn counted(&self, event: &str) -> anyhow::Result<u64> {
        let metrics = self.injector.metrics()?;
        Ok(metrics.sum(BPF_EVENTS, &[("event", event)]) as u64)
    }

    /// The log line of one client's connection, which has ended.
    pub(crate) fn session(&self, client: SocketAddr, asked: SocketAddr) -> anyhow::Result<Session> {
        // Another trial may have used the same client port, with another destination port.
        let is_its = |session: &Session| {
            session.client() == Some(client) && session.field("local").as_deref() == Some(&asked.to_string())
        };
        let deadline = Instant::now() + LIMIT;
        loop {
            let sessions = self.injector.sessions()?;
            if let Some(session) = sessions.into_iter().rfind(is_its) {
                return Ok(session);
            }
            ensure!(Instant::now() < deadline, "no line for {client}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Which side speaks first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FirstSpeaker {
    Server,
    Client,
    /// The client, according to the protocol: the header waits for its first bytes.
    ClientByProtocol,
}

impl FirstSpeaker {
    pub(crate) const ALL: [Self; 3] = [Self::Server, Self::Client, Self::ClientByProtocol];
}

/// A kernel setting of a namespace, restored on drop.
#[derive(Debug)]
pub(crate) struct SysctlGuard<'a> {
    netns: &'a Netns,
    key: &'static str,
    before: String,
}

impl<'a> SysctlGuard<'a> {
    pub(crate) fn new(netns: &'a Netns, key: &'static str, value: &str) -> anyhow::Result<Self> {
        let path = format!("/proc/sys/{key}");
        let before = netns.run(|| std::fs::read_to_string(&path))?.context(key)?.trim().to_owned();
        netns.sysctl(key, value)?;
        Ok(Self { netns, key, before })
    }
}

impl Drop for SysctlGuard<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.netns.sysctl(self.key, &self.before) {
            eprintln!("{error:#}");
        }
    }
}

/// While this exists, the edge forwards packets.
#[derive(Debug)]
pub(crate) struct Forwarding<'a>(&'a Netns);

impl<'a> Forwarding<'a> {
    const KEYS: [&'static str; 2] = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];

    pub(crate) fn new(edge: &'a Netns) -> anyhow::Result<Self> {
        Self::KEYS.iter().try_for_each(|key| edge.sysctl(key, "1"))?;
        Ok(Self(edge))
    }
}

impl Drop for Forwarding<'_> {
    fn drop(&mut self) {
        // These keys set those of `lo` as well, which the daemon had set.
        let own = ["net/ipv4/conf/lo/forwarding", "net/ipv6/conf/lo/forwarding"];
        let off = Self::KEYS.iter().map(|key| (key, "0"));
        for (key, value) in off.chain(own.iter().map(|key| (key, "1"))) {
            if let Err(error) = self.0.sysctl(key, value) {
                eprintln!("{error:#}");
            }
        }
    }
}

/// Both sides of a connection through the injector, after the header.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) client: TcpStream,
    pub(crate) server: TcpStream,
    /// Time to the first byte.
    pub(crate) took: Duration,
}

impl Connection {
    /// Transfers a number of bytes in each direction at once, closes, and compares.
    pub(crate) fn finish(&self, bytes: usize) -> anyhow::Result<()> {
        std::thread::scope(|scope| {
            let up = scope.spawn(|| through(&self.client, &self.server, bytes, 0));
            through(&self.server, &self.client, bytes, 101)?;
            up.join().map_err(|_| anyhow!("panicked"))?
        })
    }
}

/// Sends known bytes and a FIN; the other side must receive exactly these.
pub(crate) fn through(
    mut from: &TcpStream,
    mut to: &TcpStream,
    bytes: usize,
    start: usize,
) -> anyhow::Result<()> {
    let sent: Vec<u8> = (0_u8..251).cycle().skip(start).take(bytes).collect();
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| from.write_all(&sent).and_then(|()| from.shutdown(Shutdown::Write)));
        let mut seen = Vec::with_capacity(bytes);
        to.read_to_end(&mut seen).with_context(|| format!("receiving, after {} bytes", seen.len()))?;
        sending.join().map_err(|_| anyhow!("panicked"))?.context("sending")?;
        if seen == sent {
            return Ok(());
        }
        if let Some(at) = seen.iter().zip(&sent).position(|(seen, sent)| seen != sent) {
            let around = |bytes: &[u8]| bytes.iter().skip(at).take(64).copied().collect::<Vec<_>>();
            let wrong = seen.iter().zip(&sent).filter(|(seen, sent)| seen != sent).count();
            bail!("{wrong} wrong bytes, from {at} on: {:02x?}, not {:02x?}", around(&seen), around(&sent));
        }
        bail!("{} bytes have come of {bytes}", seen.len())
    })
}

/// Where clients connect.
pub(crate) fn public(family: Family) -> SocketAddr {
    SocketAddr::new(VIP.of(family), PORT)
}

/// Where clients connect that speak first.
pub(crate) fn tls(family: Family) -> SocketAddr {
    SocketAddr::new(VIP.of(family), TLS_PORT)
}

/// Where the backend listens.
pub(crate) fn backend(family: Family) -> SocketAddr {
    SocketAddr::new(BACKEND.of(family), BACKEND_PORT)
}

pub(crate) fn client_ip(family: Family) -> IpAddr {
    CLIENT.of(family)
}
