//! Addresses that no device has, clients whose address was lost on the way, and two edge hosts with one
//! backend: what a cluster makes of an edge.

use std::fmt::Write as _;
use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::{ADMIN, Injector};
use injector_testbed::kube_proxy::{self, Mode, ServicePort};
use injector_testbed::netns::{Family, HostAddresses, Netns};
use injector_testbed::sockets::accept_within;
use injector_testbed::wait::wait_until;

use crate::SiteRun;
use crate::accelerator::refused;
use crate::site::{INSIDE, OUTSIDE, address, events, join, listen, on, veth};
use crate::testbed::{
    BACKEND_PORT, InlineInjector, LIMIT, PORT, TLS_PORT, connect, counted, greeted, header, is_inline, works,
};
use crate::wire_testbed::Forwarding;

pub(crate) const TRIALS: &[(&str, SiteRun)] = &[
    ("a virtual address, and a reload of it", virtual_address),
    ("bans at a virtual address that is translated", banned_at_virtual_address),
    ("sources that were translated are refused", translated_source),
    ("two edges let each other pass, and no other host", two_edges),
    ("kube-proxy leads to another edge's socket", other_socket),
];

/// The address that clients use; no device has it.
const VIP: HostAddresses = HostAddresses {
    v4: Ipv4Addr::new(203, 0, 113, 10),
    v6: Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 0x10),
};
/// Another one.
const OTHER_VIP: HostAddresses = HostAddresses {
    v4: Ipv4Addr::new(203, 0, 113, 11),
    v6: Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 0x11),
};
/// The link between the client and the second edge.
const OUTSIDE_TWO: u8 = 33;
/// The link between the edges; the first is host 1, the second host 2.
const NODES: u8 = 34;
const ONE: HostAddresses = on(NODES, 1);
const TWO: HostAddresses = on(NODES, 2);
/// Behind the second edge.
const POD: HostAddresses = on(INSIDE, 2);

/// A client, two edges that a load balancer leads it to, and a pod of the second one, behind the bridge
/// of a CNI.
#[derive(Debug)]
struct Edges {
    client: Netns,
    one: Netns,
    two: Netns,
    pod: Netns,
    bpffs: [BpfFs; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Edge {
    One,
    Two,
}

/// Lines of a configuration.
#[derive(Clone, Copy, Debug, Default)]
struct Lines<'a> {
    /// Of the file, before the listeners.
    file: &'a str,
    inline: &'a str,
    /// Of each listener.
    listener: &'a str,
}

impl Edges {
    fn new() -> anyhow::Result<Self> {
        let edges = Self {
            client: Netns::new("edges-client")?,
            one: Netns::new("edges-one")?,
            two: Netns::new("edges-two")?,
            pod: Netns::new("edges-pod")?,
            bpffs: [BpfFs::mount()?, BpfFs::mount()?],
        };
        let Self { client, one, two, pod, .. } = &edges;
        for netns in [client, one, two, pod] {
            for which in ["all", "default"] {
                netns.sysctl(&format!("net/ipv4/conf/{which}/rp_filter"), "0")?;
            }
        }
        join((client, "eth0"), (one, "outside"), OUTSIDE)?;
        join((client, "eth1"), (two, "outside"), OUTSIDE_TWO)?;
        join((two, "nodes"), (one, "nodes"), NODES)?;
        two.ip(&["link", "add", "cni0", "type", "bridge", "forward_delay", "0"])?;
        two.ip(&["link", "set", "cni0", "up"])?;
        veth((pod, "eth0"), (two, "veth1"))?;
        two.ip(&["link", "set", "veth1", "master", "cni0"])?;
        address((two, "cni0"), on(INSIDE, 1))?;
        address((pod, "eth0"), POD)?;
        for node in [one, two] {
            // They are nodes, and stay routers until the namespace ends.
            std::mem::forget(Forwarding::new(node)?);
        }
        for family in Family::ALL {
            let net = network(INSIDE, family);
            one.ip(&["route", "add", &net, "via", &TWO.of(family).to_string()])?;
            pod.ip(&["route", "add", "default", "via", &on(INSIDE, 1).of(family).to_string()])?;
        }
        edges.lead_to(Edge::One)?;
        Ok(edges)
    }

    fn netns(&self, edge: Edge) -> &Netns {
        match edge {
            Edge::One => &self.one,
            Edge::Two => &self.two,
        }
    }

    /// The load balancer announces its addresses there.
    fn lead_to(&self, edge: Edge) -> anyhow::Result<()> {
        let via = if edge == Edge::One { on(OUTSIDE, 1) } else { on(OUTSIDE_TWO, 1) };
        for family in Family::ALL {
            for vip in [VIP, OTHER_VIP] {
                let (vip, via) = (vip.of(family).to_string(), via.of(family).to_string());
                self.client.ip(&["route", "replace", &vip, "via", &via])?;
            }
        }
        Ok(())
    }

    /// A daemon on one of the edges, which listens on all its addresses: one listener where the server
    /// speaks first, and one where the client does.
    fn start(&self, edge: Edge, engine: &str, lines: Lines<'_>) -> anyhow::Result<InlineInjector> {
        let pin = self.pin(edge);
        InlineInjector::start(self.netns(edge), pin, &self.config(edge, engine, lines))
    }

    fn pin(&self, edge: Edge) -> &std::path::Path {
        let [one, two] = &self.bpffs;
        if edge == Edge::One { one.path() } else { two.path() }
    }

    fn config(&self, edge: Edge, engine: &str, lines: Lines<'_>) -> String {
        let Lines { file, inline, listener } = lines;
        let pin = self.pin(edge).display();
        let [b4, b6] = Family::ALL.map(|family| SocketAddr::new(POD.of(family), BACKEND_PORT));
        let mut text = format!(
            "[metrics]\nlisten = \"127.0.0.1:9147\"\n\n{ADMIN}\n[inline]\npin = \"{pin}\"\n{inline}\n\n{file}\n"
        );
        for (port, protocol) in [(PORT, "smtp"), (TLS_PORT, "submissions")] {
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "\n[[listener]]\nname = \"{protocol}\"\nbind = [\"[::]:{port}\"]\nprotocol = \"{protocol}\"\n\
                 engine = \"{engine}\"\nbackends = [\"{b4}\", \"{b6}\"]\n{listener}\n"
            );
        }
        text
    }

    fn listen(&self, family: Family) -> anyhow::Result<TcpListener> {
        listen(&self.pod, POD.of(family))
    }

    fn connect(&self, vip: HostAddresses, family: Family) -> anyhow::Result<TcpStream> {
        connect(&self.client, SocketAddr::new(vip.of(family), PORT))
    }

    /// A client and its connection at the backend, whose header is right, by inline.
    fn inlined(
        &self,
        injector: &Injector,
        vip: HostAddresses,
        family: Family,
    ) -> anyhow::Result<(TcpStream, TcpStream)> {
        let backend = self.listen(family)?;
        let joined = || greeted(self.connect(vip, family)?, &backend);
        let (client, server) = joined()
            .with_context(|| format!("{}: {}", family.name(), events(injector).unwrap_or_default()))?;
        ensure!(is_inline(&server)?, "served by the socket, from {}", server.peer_addr()?);
        Ok((client, server))
    }

    /// Whether a SYN of the client's gets an answer soon.
    fn reaches(&self, to: SocketAddr) -> anyhow::Result<bool> {
        let connect = || TcpStream::connect_timeout(&to, Duration::from_millis(300)).is_ok();
        self.client.run(connect)
    }
}

fn network(net: u8, family: Family) -> String {
    match family {
        Family::V4 => format!("{}/24", on(net, 0).v4),
        Family::V6 => format!("{}/64", on(net, 0).v6),
    }
}

/// The networks of these links, both families, as a list in the configuration.
fn networks(nets: &[u8]) -> String {
    let all = nets.iter().flat_map(|net| Family::ALL.map(|family| network(*net, family)));
    format!("{:?}", all.collect::<Vec<_>>())
}

/// Both addresses, as a list in the configuration.
fn addresses(of: HostAddresses) -> String {
    format!("[\"{}\", \"{}\"]", of.v4, of.v6)
}

/// Nothing came to the backend.
fn none_came(backend: &TcpListener) -> anyhow::Result<()> {
    backend.set_nonblocking(true)?;
    match backend.accept() {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
        Err(error) => Err(error.into()),
        Ok((_, peer)) => bail!("{peer} came to the backend"),
    }
}

fn rejected(injector: &Injector, reason: &str) -> anyhow::Result<f64> {
    Ok(injector.metrics()?.sum("injector_connections_rejected_total", &[("reason", reason)]))
}

fn virtual_address() -> anyhow::Result<()> {
    let edges = Edges::new()?;
    // The route to the pod leads through the other edge, which has no injector.
    let line = format!("virtual_addresses = {}", addresses(VIP));
    let injector = edges.start(Edge::One, "inline", Lines { listener: &line, ..Lines::default() })?;
    let status = injector.status()?;
    ensure!(
        status["listeners"][0]["virtual_addresses"] == serde_json::json!([VIP.v4, VIP.v6]),
        "status: {status}"
    );
    let mut pairs = Vec::new();
    for family in Family::ALL {
        pairs.push(edges.inlined(&injector, VIP, family)?);
        let other = SocketAddr::new(OTHER_VIP.of(family), PORT);
        ensure!(!edges.reaches(other)?, "{other} is no address of the listener");
    }
    let line = format!("virtual_addresses = {}", addresses(OTHER_VIP));
    injector.rewrite(&edges.config(Edge::One, "inline", Lines { listener: &line, ..Lines::default() }))?;
    injector.command(&["reload"])?;
    for family in Family::ALL {
        let reached = |vip: HostAddresses| edges.reaches(SocketAddr::new(vip.of(family), PORT));
        let _backend = edges.listen(family)?;
        wait_until("the new address", || reached(OTHER_VIP), |reached| *reached)?;
        wait_until("the end of the old address", || reached(VIP), |reached| !*reached)?;
    }
    for (client, server) in &mut pairs {
        works(client, server).context("a connection from before the reload")?;
    }
    for family in Family::ALL {
        edges.inlined(&injector, OTHER_VIP, family)?;
    }
    Ok(())
}

/// The guard sees packets before the host translates them.
fn banned_at_virtual_address() -> anyhow::Result<()> {
    let edges = Edges::new()?;
    let client = on(OUTSIDE, 2);
    for family in Family::ALL {
        // Without translation the address would be forwarded.
        edges.one.ip(&["route", "add", "default", "via", &on(OUTSIDE, 9).of(family).to_string()])?;
    }
    let guard = format!("[guard]\npin = \"{}/guard\"\n", edges.pin(Edge::One).display());
    let line = format!("virtual_addresses = {}", addresses(VIP));
    let lines = Lines { file: &guard, listener: &line, ..Lines::default() };
    let injector = edges.start(Edge::One, "relay", lines)?;
    // As kube-proxy with an endpoint on the same node.
    let leads_here = |family: Family| ServicePort {
        external: SocketAddr::new(VIP.of(family), PORT),
        endpoints: vec![SocketAddr::new(ONE.of(family), PORT)],
    };
    kube_proxy::write(&edges.one, Mode::Iptables, &Family::ALL.map(leads_here))?;
    let dropped =
        || anyhow::Ok(injector.metrics()?.sum("injector_guard_dropped_packets_total", &[("hook", "tc")]));
    for family in Family::ALL {
        let to = SocketAddr::new(VIP.of(family), PORT);
        ensure!(edges.reaches(to)?, "{}", injector.log());
        injector.command(&["ban", &client.of(family).to_string()])?;
        let before = dropped()?;
        ensure!(!edges.reaches(to)?, "a banned client's SYN is answered");
        ensure!(dropped()? > before, "another than the guard dropped it");
    }
    let without = Lines { file: &guard, ..Lines::default() };
    injector.rewrite(&edges.config(Edge::One, "relay", without))?;
    injector.command(&["reload"])?;
    // The socket resets what the guard lets through now.
    let reset = || rejected(&injector, "banned");
    for family in Family::ALL {
        let before = reset()?;
        let to = SocketAddr::new(VIP.of(family), PORT);
        wait_until(
            "a reset by the socket",
            || {
                edges.reaches(to)?;
                reset()
            },
            |now| *now > before,
        )?;
    }
    Ok(())
}

/// Whether a connection is reset, now or at once.
fn is_reset(netns: &Netns, to: SocketAddr) -> anyhow::Result<bool> {
    let connect = || TcpStream::connect_timeout(&to, LIMIT).and_then(|mut client| client.read(&mut [0]));
    Ok(netns.run(connect)?.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset))
}

/// By inline's listeners and by others, in clear text and where TLS comes first.
fn translated_source() -> anyhow::Result<()> {
    let edges = Edges::new()?;
    let own = networks(&[OUTSIDE]);
    for engine in ["inline", "relay"] {
        let with_own =
            |sources: &str| format!("virtual_addresses = {}\ntranslated_sources = {sources}", addresses(VIP));
        let lines = with_own(&own);
        let injector = edges.start(Edge::One, engine, Lines { listener: &lines, ..Lines::default() })?;
        for (done, family) in [(0.0, Family::V4), (2.0, Family::V6)] {
            let backend = edges.listen(family)?;
            let to = |port| SocketAddr::new(on(OUTSIDE, 1).of(family), port);
            let client = connect(&edges.client, to(PORT))?;
            refused(client, "421 4.3.5 Your address was lost on the way here, try again later\r\n")?;
            ensure!(is_reset(&edges.client, to(TLS_PORT))?, "with TLS the end is no reset");
            let counted_now = rejected(&injector, "translated_source")?;
            ensure!((counted_now - done - 2.0).abs() < 0.1, "{counted_now} were counted, after {done}");
            none_came(&backend)?;
        }
        let log = injector.log();
        ensure!(log.contains("translation on the way here has replaced the client's address"), "{log}");
        if engine == "inline" {
            let left = counted(&injector, "to_socket_translated_source")?;
            ensure!(left == 4, "{left} were left to the socket: {}", events(&injector)?);
            // Other sources are served, with the next reload the same ones.
            let lines = with_own(&networks(&[NODES]));
            let lines = Lines { listener: &lines, ..Lines::default() };
            injector.rewrite(&edges.config(Edge::One, engine, lines))?;
            injector.command(&["reload"])?;
            for family in Family::ALL {
                let backend = edges.listen(family)?;
                let by_inline = || is_inline(&greeted(edges.connect(VIP, family)?, &backend)?.1);
                wait_until("inline", by_inline, |inline| *inline)?;
            }
        }
    }
    Ok(())
}

/// The pod's node drops what others forward to a PROXY port, but not what another injector sends there.
fn two_edges() -> anyhow::Result<()> {
    let edges = Edges::new()?;
    let line = format!("virtual_addresses = {}", addresses(VIP));
    let peers = |of: HostAddresses| format!("peers = {}", addresses(of));
    let start = |edge, inline: &str| {
        edges.start(edge, "inline", Lines { inline, listener: &line, ..Lines::default() })
    };
    let one = start(Edge::One, &peers(TWO))?;
    {
        let two = start(Edge::Two, "")?;
        for (done, family) in [(0, Family::V4), (1, Family::V6)] {
            let backend = edges.listen(family)?;
            let client = connect_without_waiting(&edges.client, VIP.of(family))?;
            let dropped = || counted(&two, "proxy_port");
            wait_until("a dropped SYN of an unknown injector", dropped, |dropped| *dropped > done)?;
            none_came(&backend)?;
            drop(client);
        }
    }
    let two = start(Edge::Two, &peers(ONE))?;
    for by in [Edge::One, Edge::Two] {
        edges.lead_to(by)?;
        for family in Family::ALL {
            let injector = if by == Edge::One { &one } else { &two };
            let (mut client, mut server) =
                edges.inlined(injector, VIP, family).with_context(|| format!("by edge {by:?}"))?;
            works(&mut client, &mut server)?;
        }
    }
    for injector in [&one, &two] {
        for event in ["proxy_port", "invalid_segment", "route_lost", "rewrite_failed", "wrong_device"] {
            let count = counted(injector, event)?;
            ensure!(count == 0, "{event} was counted {count} times");
        }
    }
    // The client is no peer: neither edge leads it to the PROXY port.
    for (edge, injector, via) in [(Edge::One, &one, on(OUTSIDE, 1)), (Edge::Two, &two, on(OUTSIDE_TWO, 1))] {
        for family in Family::ALL {
            edges.client.ip(&[
                "route",
                "replace",
                &network(INSIDE, family),
                "via",
                &via.of(family).to_string(),
            ])?;
            let backend = edges.listen(family)?;
            let before = counted(injector, "proxy_port")?;
            let to = SocketAddr::new(POD.of(family), BACKEND_PORT);
            ensure!(!edges.reaches(to)?, "the client reaches {to} by edge {edge:?}");
            ensure!(counted(injector, "proxy_port")? > before, "edge {edge:?} has not counted it");
            none_came(&backend)?;
            // It is the port that is closed, not the host.
            let other = SocketAddr::new(POD.of(family), BACKEND_PORT + 7);
            let _other = edges.pod.run(|| TcpListener::bind(other))??;
            let reached = edges.reaches(other)?;
            ensure!(reached == (edge == Edge::Two), "another port of the pod by edge {edge:?}: {reached}");
        }
    }
    Ok(())
}

/// A SYN, and what it becomes is not waited for.
fn connect_without_waiting(netns: &Netns, to: IpAddr) -> anyhow::Result<socket2::Socket> {
    let to = SocketAddr::new(to, PORT);
    let connect = || {
        let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        match socket.connect(&to.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
            _ => Ok(socket),
        }
    };
    Ok(netns.run(connect)??)
}

/// What inline does not take at the edge that got it goes where kube-proxy leads it: under a node's
/// address, which is refused there.
fn other_socket() -> anyhow::Result<()> {
    let edges = Edges::new()?;
    let nodes =
        format!("virtual_addresses = {}\ntranslated_sources = {}", addresses(VIP), networks(&[NODES]));
    let peers = |of: HostAddresses| format!("peers = {}", addresses(of));
    let (peer_two, peer_one) = (peers(TWO), peers(ONE));
    let lines = Lines { inline: &peer_two, listener: &nodes, ..Lines::default() };
    let one = edges.start(Edge::One, "inline", lines)?;
    let with_nodes = Lines { inline: &peer_one, listener: &nodes, ..Lines::default() };
    let two = edges.start(Edge::Two, "inline", with_nodes)?;
    let leads_to_two = |family: Family| ServicePort {
        external: SocketAddr::new(VIP.of(family), PORT),
        endpoints: vec![SocketAddr::new(TWO.of(family), PORT)],
    };
    for mode in [Mode::Iptables, Mode::Nftables] {
        kube_proxy::write(&edges.one, mode, &Family::ALL.map(leads_to_two))?;
        let before = rejected(&two, "translated_source")?;
        for family in Family::ALL {
            // Inline is in front of the rules.
            edges.inlined(&one, VIP, family).with_context(|| format!("{mode:?}"))?;
        }
        ensure!(rejected(&two, "translated_source")? <= before, "{mode:?}: {}", two.log());
        one.command(&["drain"])?;
        for family in Family::ALL {
            refused_by_two(&edges, &two, family).with_context(|| format!("{mode:?}"))?;
        }
        if mode == Mode::Iptables {
            kube_proxy::write(&edges.one, mode, &[])?;
            one.command(&["resume"])?;
            for family in Family::ALL {
                let taken = || Ok(edges.inlined(&one, VIP, family).is_ok());
                wait_until("inline", taken, |taken| *taken)?;
            }
        }
    }
    ensure!(counted(&two, "to_socket_translated_source")? >= 8, "{}", events(&two)?);
    // These rules do translate: without the list, the mail server would get a node's address.
    let without = Lines { inline: &peer_one, ..Lines::default() };
    two.rewrite(&edges.config(Edge::Two, "inline", without))?;
    two.command(&["reload"])?;
    for family in Family::ALL {
        let backend = edges.listen(family)?;
        let named = || {
            let _client = edges.connect(VIP, family)?;
            let mut server = accept_within(&backend, Duration::from_millis(500))?;
            Ok(header(&mut server)?.0.ip())
        };
        wait_until("a header with the node's address", named, |named| *named == ONE.of(family))?;
    }
    Ok(())
}

/// The second edge refuses the client, and no connection reaches the backend.
fn refused_by_two(edges: &Edges, two: &Injector, family: Family) -> anyhow::Result<()> {
    let backend = edges.listen(family)?;
    let is_refused = || {
        let client = edges.connect(VIP, family)?;
        client.set_read_timeout(Some(Duration::from_millis(300)))?;
        refused(client, "421 4.3.5 ")
    };
    wait_until("a refusal by the other edge", is_refused, |()| true)?;
    let before = rejected(two, "translated_source")?;
    backend.set_nonblocking(true)?;
    while backend.accept().is_ok() {}
    is_refused()?;
    none_came(&backend)?;
    ensure!(rejected(two, "translated_source")? > before, "not counted");
    Ok(())
}
