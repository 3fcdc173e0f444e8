//! Three hosts without links, for trials that differ in how they are joined.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context as _, ensure};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::Injector;
use injector_testbed::netns::{Family, HostAddresses, Netns};

use crate::testbed::{BACKEND_PORT, InlineInjector, PORT, connect, counted, greeted, is_inline};
use crate::wire_testbed::through;

/// Client, edge and mail host. The public address is on the edge's `lo`.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) client: Netns,
    pub(crate) edge: Netns,
    pub(crate) mail: Netns,
    bpffs: BpfFs,
}

/// The address of a host on one of the links: `10.NET.0.HOST` and `fd00:NET::HOST`. Each link has its
/// own network.
pub(crate) const fn on(net: u8, host: u8) -> HostAddresses {
    HostAddresses {
        v4: Ipv4Addr::new(10, net, 0, host),
        v6: Ipv6Addr::new(0xfd00, net as u16, 0, 0, 0, 0, 0, host as u16),
    }
}

/// The link between client and edge.
pub(crate) const OUTSIDE: u8 = 30;
/// The link between edge and mail host.
pub(crate) const INSIDE: u8 = 31;
const VIP: HostAddresses = HostAddresses {
    v4: Ipv4Addr::new(192, 0, 2, 77),
    v6: Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, 0x77),
};

/// A namespace, and a device in it.
pub(crate) type End<'a> = (&'a Netns, &'a str);

impl Site {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let site = Self {
            client: Netns::new("site-client")?,
            edge: Netns::new("site-edge")?,
            mail: Netns::new("site-mail")?,
            bpffs: BpfFs::mount()?,
        };
        site.edge.ip(&["address", "add", &format!("{}/32", VIP.v4), "dev", "lo"])?;
        site.edge.ip(&["address", "add", &format!("{}/128", VIP.v6), "dev", "lo", "nodad"])?;
        for netns in [&site.client, &site.edge, &site.mail] {
            for which in ["all", "default"] {
                netns.sysctl(&format!("net/ipv4/conf/{which}/rp_filter"), "0")?;
            }
        }
        Ok(site)
    }

    /// Client and edge are joined: `eth0` and `outside`.
    pub(crate) fn with_client() -> anyhow::Result<Self> {
        let site = Self::new()?;
        join((&site.client, "eth0"), (&site.edge, "outside"), OUTSIDE)?;
        site.route_to_vip(on(OUTSIDE, 1))?;
        Ok(site)
    }

    /// All are joined by links: `eth0`, `outside`, `inside`, `eth0`.
    pub(crate) fn joined() -> anyhow::Result<Self> {
        let site = Self::with_client()?;
        join((&site.mail, "eth0"), (&site.edge, "inside"), INSIDE)?;
        Ok(site)
    }

    /// The client's route to the public address.
    pub(crate) fn route_to_vip(&self, via: HostAddresses) -> anyhow::Result<()> {
        for family in Family::ALL {
            self.client.ip(&[
                "route",
                "replace",
                &VIP.of(family).to_string(),
                "via",
                &via.of(family).to_string(),
            ])?;
        }
        Ok(())
    }

    /// A daemon with these backends; `inline` are lines of `[inline]`.
    pub(crate) fn start(&self, backend: HostAddresses, inline: &str) -> anyhow::Result<InlineInjector> {
        let pin = self.bpffs.path();
        let [v4, v6] = Family::ALL.map(vip);
        let [b4, b6] = Family::ALL.map(|family| SocketAddr::new(backend.of(family), BACKEND_PORT));
        let config = format!(
            "[metrics]\nlisten = \"127.0.0.1:9147\"\n\n[inline]\npin = \"{}\"\n{inline}\n\n[[listener]]\n\
             name = \"test\"\nbind = [\"{v4}\", \"{v6}\"]\nprotocol = \"smtp\"\nengine = \"inline\"\n\
             backends = [\"{b4}\", \"{b6}\"]\n",
            pin.display()
        );
        InlineInjector::start(&self.edge, pin, &config)
    }

    /// A client and its connection at the backend.
    pub(crate) fn pair(
        &self,
        family: Family,
        backend: &TcpListener,
    ) -> anyhow::Result<(TcpStream, TcpStream)> {
        greeted(connect(&self.client, vip(family))?, backend)
    }

    /// The same, by inline.
    pub(crate) fn inlined(
        &self,
        family: Family,
        backend: &TcpListener,
    ) -> anyhow::Result<(TcpStream, TcpStream)> {
        let (client, server) = self.pair(family, backend)?;
        ensure!(is_inline(&server)?, "served by the socket, from {}", server.peer_addr()?);
        Ok((client, server))
    }

    /// A connection of either family by inline, with bytes in both directions.
    pub(crate) fn serves(&self, injector: &Injector, backend: HostAddresses) -> anyhow::Result<()> {
        for family in Family::ALL {
            let listener = self.listen(backend, family)?;
            let (client, server) = self.inlined(family, &listener).with_context(|| {
                format!("{}, events: {}", family.name(), events(injector).unwrap_or_default())
            })?;
            through(&client, &server, 1 << 20, 0).context("to the backend")?;
            through(&server, &client, 1 << 20, 0).context("to the client")?;
        }
        for event in ["rewrite_failed", "append_failed", "too_big", "route_lost"] {
            let count = counted(injector, event)?;
            ensure!(count == 0, "{event} was counted {count} times");
        }
        Ok(())
    }

    /// The mail host listens there.
    pub(crate) fn listen(&self, backend: HostAddresses, family: Family) -> anyhow::Result<TcpListener> {
        listen(&self.mail, backend.of(family))
    }
}

pub(crate) fn vip(family: Family) -> SocketAddr {
    SocketAddr::new(VIP.of(family), PORT)
}

pub(crate) fn listen(netns: &Netns, ip: IpAddr) -> anyhow::Result<TcpListener> {
    let address = SocketAddr::new(ip, BACKEND_PORT);
    netns.listen(address)
}

/// A veth pair; the first end is host 2 of the link, the second host 1.
pub(crate) fn join(host: End<'_>, edge: End<'_>, net: u8) -> anyhow::Result<()> {
    veth(host, edge)?;
    for (end, number) in [(edge, 1), (host, 2)] {
        address(end, on(net, number))?;
    }
    Ok(())
}

/// A veth pair, up, without addresses.
pub(crate) fn veth(one: End<'_>, other: End<'_>) -> anyhow::Result<()> {
    one.0.ip(&["link", "add", one.1, "type", "veth", "peer", "name", other.1, "netns", other.0.name()])?;
    one.0.ip(&["link", "set", one.1, "up"])?;
    other.0.ip(&["link", "set", other.1, "up"])
}

pub(crate) fn address(end: End<'_>, addresses: HostAddresses) -> anyhow::Result<()> {
    end.0.ip(&["address", "add", &format!("{}/24", addresses.v4), "dev", end.1])?;
    end.0.ip(&["address", "add", &format!("{}/64", addresses.v6), "dev", end.1, "nodad"])
}

/// The program's counts that are not zero.
pub(crate) fn events(injector: &Injector) -> anyhow::Result<String> {
    let metrics = injector.metrics()?;
    let of_inline = metrics
        .samples()
        .iter()
        .filter(|sample| sample.name == injector_testbed::daemon::BPF_EVENTS && sample.value > 0.5);
    let line = |sample: &injector_testbed::metrics::Sample| {
        let event = sample.labels.iter().find(|(name, _)| name == "event").map(|(_, event)| event.as_str());
        format!("{} {}", event.unwrap_or_default(), sample.value)
    };
    Ok(of_inline.map(line).collect::<Vec<_>>().join(", "))
}
