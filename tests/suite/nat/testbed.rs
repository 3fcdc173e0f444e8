//! Client, edge and mail hosts, and servers that report their own address and the client's.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, ensure};
use injector_testbed::netns::{
    EDGE_INSIDE, EDGE_OUTSIDE, Family, HostAddresses, MAIL, Netns, Topology, VIP_INLINE,
};
use injector_user::engine::inline::nat::{Backend, Ruleset, Service, TableName, ruleset};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::time::timeout;

/// The second mail host, on the same interface as [`MAIL`].
pub(crate) const OTHER_MAIL: HostAddresses =
    HostAddresses { v4: Ipv4Addr::new(10, 25, 0, 3), v6: Ipv6Addr::new(0xfd25, 0, 0, 0, 0, 0, 0, 3) };

/// The port of every service, and of the backends.
pub(crate) const PORT: u16 = 25;
pub(crate) const BACKEND_PORT: u16 = 2525;

/// Time limit of one connection and its greeting.
const LIMIT: Duration = Duration::from_secs(5);

/// The greeting of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Greeting {
    /// The server's address.
    pub(crate) server: SocketAddr,
    /// The client's address, as the server sees it.
    pub(crate) client: SocketAddr,
}

/// The three namespaces, with two mail hosts that listen on both families and that the client also
/// reaches directly.
pub(crate) struct Testbed {
    pub(crate) topology: Topology,
    pub(crate) runtime: Runtime,
}

impl Testbed {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let topology = Topology::new()?;
        topology.mail.ip(&["address", "add", &format!("{}/24", OTHER_MAIL.v4), "dev", "eth0"])?;
        topology.mail.ip(&["address", "add", &format!("{}/64", OTHER_MAIL.v6), "dev", "eth0", "nodad"])?;
        for (subnet, edge) in
            [("10.25.0.0/24", EDGE_OUTSIDE.v4.to_string()), ("fd25::/64", EDGE_OUTSIDE.v6.to_string())]
        {
            topology.client.ip(&["route", "add", subnet, "via", &edge])?;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let testbed = Self { topology, runtime };
        for family in Family::ALL {
            for place in [MAIL, OTHER_MAIL] {
                testbed.serve(&testbed.topology.mail, SocketAddr::new(place.of(family), BACKEND_PORT))?;
            }
        }
        Ok(testbed)
    }

    /// Serves there until the testbed is dropped: a [`Greeting`], then an echo of what it reads.
    pub(crate) fn serve(&self, netns: &Netns, at: SocketAddr) -> anyhow::Result<()> {
        let bind = || {
            let listener = std::net::TcpListener::bind(at)?;
            listener.set_nonblocking(true).map(|()| listener)
        };
        let listener: std::net::TcpListener = netns.run(bind)?.with_context(|| format!("bind {at}"))?;
        self.runtime.block_on(async {
            let listener = TcpListener::from_std(listener)?;
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(greet(stream));
                }
            });
            Ok(())
        })
    }

    /// Applies the rules for these services on the edge.
    pub(crate) fn apply(&self, services: &[Service]) -> anyhow::Result<()> {
        let rules = rules(services)?;
        self.on_edge(|| rules.apply())??;
        Ok(())
    }

    /// Runs `f` inside the edge.
    pub(crate) fn on_edge<T: Send>(&self, f: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        self.topology.edge.run(f)
    }

    /// Runs a future on its own runtime inside the edge, where its sockets belong.
    pub(crate) fn block_on_edge<F: Future<Output = anyhow::Result<()>>>(
        &self,
        make: impl FnOnce() -> F + Send,
    ) -> anyhow::Result<()> {
        self.on_edge(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async { make().await })
        })?
    }

    /// Connects from a namespace and reads the greeting.
    pub(crate) fn ask_from(&self, netns: &Netns, to: SocketAddr) -> anyhow::Result<Greeting> {
        let socket = socket(netns, to)?;
        self.runtime.block_on(async { Ok(greeted(socket, to).await?.0) })
    }

    /// Connects from the client and reads the greeting.
    pub(crate) fn ask(&self, to: SocketAddr) -> anyhow::Result<Greeting> {
        self.ask_from(&self.topology.client, to)
    }

    /// Runs nft on the edge and returns what it prints.
    pub(crate) fn nft(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = self.topology.edge.command("nft").args(args).output().context("nft")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "nft {}: {complaint}", args.join(" "));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// All tables of the edge, with handles.
    pub(crate) fn ruleset(&self) -> anyhow::Result<String> {
        self.nft(&["-a", "list", "ruleset"])
    }
}

async fn greet(mut stream: TcpStream) -> io::Result<()> {
    let greeting = format!("{} {}\n", stream.local_addr()?, stream.peer_addr()?);
    stream.write_all(greeting.as_bytes()).await?;
    let (mut read, mut write) = stream.split();
    tokio::io::copy(&mut read, &mut write).await?;
    Ok(())
}

/// A socket that belongs to a namespace, wherever it is used.
pub(crate) fn socket(netns: &Netns, to: SocketAddr) -> anyhow::Result<TcpSocket> {
    let make = if to.is_ipv4() { TcpSocket::new_v4 } else { TcpSocket::new_v6 };
    Ok(netns.run(make)??)
}

/// Connects and reads the greeting.
pub(crate) async fn greeted(
    socket: TcpSocket,
    to: SocketAddr,
) -> anyhow::Result<(Greeting, BufReader<TcpStream>)> {
    let conversation = async {
        let mut stream = BufReader::new(socket.connect(to).await?);
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let (server, client) = line.trim().split_once(' ').context("no greeting")?;
        anyhow::Ok((Greeting { server: server.parse()?, client: client.parse()? }, stream))
    };
    timeout(LIMIT, conversation)
        .await
        .with_context(|| format!("{to}: took too long"))?
        .with_context(|| to.to_string())
}

/// The table that the trials compare.
pub(crate) fn table() -> anyhow::Result<TableName> {
    Ok("injector-test".parse()?)
}

pub(crate) fn rules(services: &[Service]) -> anyhow::Result<Ruleset> {
    Ok(ruleset(&table()?, services)?)
}

/// A service from the inline engine's public addresses to [`MAIL`].
pub(crate) fn service() -> Service {
    Service {
        name: "smtp".to_owned(),
        listen: Family::ALL.map(vip).into(),
        backends: Family::ALL.map(|family| backend(MAIL, family, 1)).into(),
        masquerade: false,
    }
}

pub(crate) fn vip(family: Family) -> SocketAddr {
    SocketAddr::new(VIP_INLINE.of(family), PORT)
}

pub(crate) fn backend(place: HostAddresses, family: Family, weight: u32) -> Backend {
    Backend { address: SocketAddr::new(place.of(family), BACKEND_PORT), weight }
}

/// The same service, with the second mail host.
pub(crate) fn elsewhere() -> Service {
    Service { backends: Family::ALL.map(|family| backend(OTHER_MAIL, family, 1)).into(), ..service() }
}

/// The client address that the mail hosts see with masquerading.
pub(crate) fn edge_inside(family: Family) -> IpAddr {
    EDGE_INSIDE.of(family)
}
