//! Where clients and backends are: devices that change, and every kind of route to a backend.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use injector_testbed::bpf::ForeignProgram;
use injector_testbed::netns::{Family, HostAddresses, Netns};
use injector_testbed::wait::wait_until;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::SiteRun;
use crate::site::{INSIDE, OUTSIDE, Site, address, events, join, on, veth, vip};
use crate::testbed::{BACKEND_PORT, LIMIT, counted, greeted, is_inline, patient, works};
use crate::wire_testbed::{Forwarding, through};

/// Both families each.
pub(crate) const TRIALS: &[(&str, SiteRun)] = &[
    ("a renamed device", renamed),
    ("a device that is deleted and made again", made_again),
    ("a device becomes a bridge's port", becomes_a_port),
    ("a bridge towards the backend", bridge),
    ("macvlan and its parent", macvlan),
    ("a VLAN and its parent", vlan),
    ("VXLAN towards the backend", vxlan),
    ("two next hops", two_next_hops),
    ("a policy route", policy_route),
    ("a backend in a pod with a route of its own", pod),
    ("one device for clients and backends", one_armed),
    ("another program in front, tcx", in_front_tcx),
    ("another program in front, clsact", in_front_clsact),
    ("PROXY ports are reached by peers alone", peers),
    ("MPTCP", mptcp),
    ("IPv6 BIG TCP", big_tcp),
    ("a backend behind a narrow link", narrow),
];

const BACKEND: HostAddresses = on(INSIDE, 2);

fn renamed() -> anyhow::Result<()> {
    let site = Site::joined()?;
    for devices in ["devices = [\"outside\", \"inside\"]", ""] {
        let injector = site.start(BACKEND, devices)?;
        let backend = site.listen(BACKEND, Family::V4)?;
        let (mut client, mut server) = site.inlined(Family::V4, &backend)?;
        for (from, to) in [("inside", "in"), ("outside", "out")] {
            site.edge.ip(&["link", "set", from, "name", to])?;
            works(&mut client, &mut server).with_context(|| format!("{from} is now {to}"))?;
        }
        drop(backend);
        site.serves(&injector, BACKEND)?;
        works(&mut client, &mut server)?;
        for (from, to) in [("in", "inside"), ("out", "outside")] {
            site.edge.ip(&["link", "set", from, "name", to])?;
        }
        works(&mut client, &mut server)?;
    }
    Ok(())
}

/// Waits until new connections are inline's.
fn becomes_inline(site: &Site, family: Family, backend: HostAddresses) -> anyhow::Result<()> {
    let listener = site.listen(backend, family)?;
    let inline = || is_inline(&site.pair(family, &listener)?.1);
    wait_until("inline", inline, |inline| *inline).map(drop)
}

fn made_again() -> anyhow::Result<()> {
    let site = Site::joined()?;
    let injector = site.start(BACKEND, "devices = [\"outside\", \"inside\"]")?;
    site.serves(&injector, BACKEND)?;
    site.edge.ip(&["link", "del", "inside"])?;
    join((&site.mail, "eth0"), (&site.edge, "inside"), INSIDE)?;
    becomes_inline(&site, Family::V4, BACKEND)?;
    site.serves(&injector, BACKEND)?;
    site.edge.ip(&["link", "del", "outside"])?;
    join((&site.client, "eth0"), (&site.edge, "outside"), OUTSIDE)?;
    site.route_to_vip(on(OUTSIDE, 1))?;
    becomes_inline(&site, Family::V6, BACKEND)?;
    site.serves(&injector, BACKEND)
}

/// Frames of other hosts pass a port; the program belongs to the bridge.
fn becomes_a_port() -> anyhow::Result<()> {
    let site = Site::joined()?;
    let injector = site.start(BACKEND, "")?;
    site.serves(&injector, BACKEND)?;
    let edge = &site.edge;
    edge.ip(&["link", "add", "br0", "type", "bridge", "forward_delay", "0"])?;
    edge.ip(&["link", "set", "br0", "up"])?;
    edge.ip(&["address", "flush", "dev", "inside"])?;
    edge.ip(&["link", "set", "inside", "master", "br0"])?;
    address((edge, "br0"), on(INSIDE, 1))?;
    becomes_inline(&site, Family::V4, BACKEND)?;
    becomes_inline(&site, Family::V6, BACKEND)?;
    site.serves(&injector, BACKEND)
}

/// As a bridge CNI joins pods, with netfilter seeing bridged packets, as kubeadm demands it.
fn bridge() -> anyhow::Result<()> {
    let site = Site::with_client()?;
    let edge = &site.edge;
    edge.ip(&["link", "add", "cni0", "type", "bridge", "forward_delay", "0"])?;
    edge.ip(&["link", "set", "cni0", "up"])?;
    veth((&site.mail, "eth0"), (edge, "veth1"))?;
    edge.ip(&["link", "set", "veth1", "master", "cni0"])?;
    address((edge, "cni0"), on(INSIDE, 1))?;
    address((&site.mail, "eth0"), BACKEND)?;
    for key in ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"] {
        if edge.sysctl(key, "1").is_err() {
            eprintln!("    without {key}: this kernel has no br_netfilter");
        }
    }
    let injector = site.start(BACKEND, "")?;
    site.serves(&injector, BACKEND)
}

/// The client's gateway is the child; another client's is the parent.
fn macvlan() -> anyhow::Result<()> {
    let site = Site::joined()?;
    let edge = &site.edge;
    edge.ip(&["link", "add", "child", "link", "outside", "type", "macvlan", "mode", "bridge"])?;
    edge.ip(&["link", "set", "child", "up"])?;
    // An address of the parent's link, answered by the child alone.
    let own = on(OUTSIDE, 9);
    edge.ip(&["address", "add", &format!("{}/32", own.v4), "dev", "child"])?;
    edge.ip(&["address", "add", &format!("{}/128", own.v6), "dev", "child", "nodad"])?;
    for device in ["outside", "child"] {
        edge.sysctl(&format!("net/ipv4/conf/{device}/arp_ignore"), "1")?;
    }
    let injector = site.start(BACKEND, "")?;
    site.serves(&injector, BACKEND)?;
    site.route_to_vip(own)?;
    site.serves(&injector, BACKEND)?;
    let opened = counted(&injector, "opened")?;
    ensure!(opened == 4, "{opened} were opened for four clients");
    Ok(())
}

fn vlan() -> anyhow::Result<()> {
    let site = Site::joined()?;
    for (netns, device, host) in [(&site.client, "eth0", 2), (&site.edge, "outside", 1)] {
        if let Err(error) = netns.ip(&["link", "add", "vlan5", "link", device, "type", "vlan", "id", "5"]) {
            eprintln!("    not run: no VLANs here ({error:#})");
            return Ok(());
        }
        netns.ip(&["link", "set", "vlan5", "up"])?;
        address((netns, "vlan5"), on(35, host))?;
    }
    let injector = site.start(BACKEND, "")?;
    site.serves(&injector, BACKEND)?;
    site.route_to_vip(on(35, 1))?;
    site.serves(&injector, BACKEND)?;
    let opened = counted(&injector, "opened")?;
    ensure!(opened == 4, "{opened} were opened for four clients");
    Ok(())
}

fn vxlan() -> anyhow::Result<()> {
    const NET: u8 = 36;
    let site = Site::joined()?;
    for (netns, device, own, other) in [(&site.edge, "inside", 1, 2), (&site.mail, "eth0", 2, 1)] {
        let (local, remote) = (on(INSIDE, own).v4.to_string(), on(INSIDE, other).v4.to_string());
        netns.ip(&[
            "link", "add", "vx0", "type", "vxlan", "id", "42", "dev", device, "local", &local, "remote",
            &remote, "dstport", "4789",
        ])?;
        netns.ip(&["link", "set", "vx0", "up"])?;
        address((netns, "vx0"), on(NET, own))?;
    }
    let injector = site.start(on(NET, 2), "")?;
    site.serves(&injector, on(NET, 2))
}

/// Routes to an address of the mail host that is on none of its links.
fn route(edge: &Netns, to: HostAddresses, words: impl Fn(Family) -> Vec<String>) -> anyhow::Result<()> {
    for family in Family::ALL {
        let to = to.of(family).to_string();
        let words = words(family);
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        edge.ip(&[&["route", "add", &to], &words[..]].concat())?;
    }
    Ok(())
}

/// An address on `lo`.
fn own_address(netns: &Netns, addresses: HostAddresses) -> anyhow::Result<()> {
    netns.ip(&["address", "add", &format!("{}/32", addresses.v4), "dev", "lo"])?;
    netns.ip(&["address", "add", &format!("{}/128", addresses.v6), "dev", "lo", "nodad"])
}

/// Both are used, and answers come back by either.
fn two_next_hops() -> anyhow::Result<()> {
    const SECOND: u8 = 32;
    let backend = on(40, 9);
    let site = Site::joined()?;
    join((&site.mail, "eth1"), (&site.edge, "inside2"), SECOND)?;
    own_address(&site.mail, backend)?;
    for key in ["net/ipv4/fib_multipath_hash_policy", "net/ipv6/fib_multipath_hash_policy"] {
        site.edge.sysctl(key, "1")?;
    }
    route(&site.edge, backend, |family| {
        let hops = [(INSIDE, "inside"), (SECOND, "inside2")];
        let hop = |(net, device): (u8, &str)| {
            let via = on(net, 2).of(family).to_string();
            ["nexthop".to_owned(), "via".to_owned(), via, "dev".to_owned(), device.to_owned()]
        };
        hops.into_iter().flat_map(hop).collect()
    })?;
    let injector = site.start(backend, "")?;
    let received = |device: &str| -> anyhow::Result<u64> {
        let path = format!("/sys/class/net/{device}/statistics/rx_packets");
        let mut command = site.mail.command("cat");
        Ok(String::from_utf8(command.arg(path).output()?.stdout)?.trim().parse()?)
    };
    let before = [received("eth0")?, received("eth1")?];
    for family in Family::ALL {
        let listener = site.listen(backend, family)?;
        for _ in 0..12 {
            site.inlined(family, &listener).with_context(|| events(&injector).unwrap_or_default())?;
        }
    }
    let now = [received("eth0")?, received("eth1")?];
    ensure!(now.iter().zip(before).all(|(now, before)| now - before > 12), "{before:?}, then {now:?}");
    site.serves(&injector, backend)
}

/// What the main table has would lead nowhere.
fn policy_route() -> anyhow::Result<()> {
    let backend = on(41, 9);
    let site = Site::joined()?;
    own_address(&site.mail, backend)?;
    for family in Family::ALL {
        let to = backend.of(family).to_string();
        let inet = if family == Family::V4 { "-4" } else { "-6" };
        site.edge.ip(&[inet, "route", "add", "unreachable", &to])?;
        let via = on(INSIDE, 2).of(family).to_string();
        site.edge.ip(&[inet, "route", "add", &to, "via", &via, "table", "100"])?;
        site.edge.ip(&[inet, "rule", "add", "to", &to, "lookup", "100"])?;
    }
    let injector = site.start(backend, "")?;
    site.serves(&injector, backend)
}

/// As Calico and Cilium join pods: the host's end has no address, and the pod's gateway is on no link.
fn pod() -> anyhow::Result<()> {
    let backend = on(42, 9);
    const MAC: &str = "ee:ee:ee:ee:ee:ee";
    let site = Site::with_client()?;
    veth((&site.mail, "eth0"), (&site.edge, "cali1"))?;
    site.edge.ip(&["link", "set", "cali1", "address", MAC])?;
    site.mail.ip(&["address", "add", &format!("{}/32", backend.v4), "dev", "eth0"])?;
    site.mail.ip(&["address", "add", &format!("{}/128", backend.v6), "dev", "eth0", "nodad"])?;
    route(&site.edge, backend, |_| vec!["dev".to_owned(), "cali1".to_owned()])?;
    site.mail.ip(&["neigh", "add", "169.254.1.1", "lladdr", MAC, "dev", "eth0"])?;
    site.mail.ip(&["route", "add", "169.254.1.1", "dev", "eth0", "scope", "link"])?;
    site.mail.ip(&["route", "add", "default", "via", "169.254.1.1", "dev", "eth0"])?;
    site.edge.ip(&["address", "add", "fe80::1/64", "dev", "cali1", "nodad"])?;
    site.mail.ip(&["-6", "route", "add", "default", "via", "fe80::1", "dev", "eth0"])?;
    let injector = site.start(backend, "")?;
    site.serves(&injector, backend)
}

/// What comes in leaves by the same device.
fn one_armed() -> anyhow::Result<()> {
    let site = Site::new()?;
    let switch = Netns::new("site-switch")?;
    switch.ip(&["link", "add", "br0", "type", "bridge", "forward_delay", "0"])?;
    switch.ip(&["link", "set", "br0", "up"])?;
    for (netns, port, host) in [(&site.edge, "p1", 1), (&site.mail, "p2", 2), (&site.client, "p3", 3)] {
        veth((netns, "eth0"), (&switch, port))?;
        switch.ip(&["link", "set", port, "master", "br0"])?;
        address((netns, "eth0"), on(INSIDE, host))?;
    }
    site.route_to_vip(on(INSIDE, 1))?;
    let injector = site.start(BACKEND, "devices = [\"eth0\"]")?;
    site.serves(&injector, BACKEND)
}

/// What another program accepts never reaches inline: clients are served by the socket, and inline moves
/// to the front again.
fn in_front_tcx() -> anyhow::Result<()> {
    let site = Site::joined()?;
    let injector = site.start(BACKEND, "attachment = \"tcx\"")?;
    site.serves(&injector, BACKEND)?;
    let attach = || ["outside", "inside"].into_iter().map(ForeignProgram::accepting).collect();
    let _foreign = site.edge.run::<anyhow::Result<Vec<_>>>(attach)??;
    moves_to_the_front(&site)?;
    ensure!(injector.log().contains("another program ran before inline"), "{}", injector.log());
    Ok(())
}

fn in_front_clsact() -> anyhow::Result<()> {
    let site = Site::joined()?;
    let injector = site.start(BACKEND, "attachment = \"clsact\"")?;
    site.serves(&injector, BACKEND)?;
    for device in ["outside", "inside"] {
        let mut command = site.edge.command("tc");
        let words = ["filter", "add", "dev", device, "ingress", "pref", "1", "protocol", "all", "matchall"];
        let output = command.args(words).args(["action", "pass"]).output()?;
        if !output.status.success() {
            eprintln!("    no filter in front: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    let listener = site.listen(BACKEND, Family::V4)?;
    for _ in 0..5 {
        site.pair(Family::V4, &listener)?;
    }
    Ok(())
}

fn moves_to_the_front(site: &Site) -> anyhow::Result<()> {
    let listener = site.listen(BACKEND, Family::V4)?;
    let (_client, server) = site.pair(Family::V4, &listener)?;
    eprintln!("    by inline at once: {}", is_inline(&server)?);
    let inline = || is_inline(&site.pair(Family::V4, &listener)?.1);
    wait_until("inline", inline, |inline| *inline).map(drop)
}

/// The edge forwards for other hosts. A PROXY port would believe them what they say of themselves.
fn peers() -> anyhow::Result<()> {
    let site = Site::joined()?;
    let _forwarding = Forwarding::new(&site.edge)?;
    for (netns, net, host) in [(&site.client, INSIDE, OUTSIDE), (&site.mail, OUTSIDE, INSIDE)] {
        for family in Family::ALL {
            let prefix = match family {
                Family::V4 => format!("{}/24", on(net, 0).v4),
                Family::V6 => format!("{}/64", on(net, 0).v6),
            };
            netns.ip(&["route", "add", &prefix, "via", &on(host, 1).of(family).to_string()])?;
        }
    }
    let reaches = |family: Family, port: u16| {
        let to = SocketAddr::new(BACKEND.of(family), port);
        let connect = || TcpStream::connect_timeout(&to, Duration::from_millis(300)).is_ok();
        site.client.run(connect)
    };
    for (peers, reached) in [("", false), ("peers = [\"10.30.0.0/24\", \"fd00:1e::/64\"]", true)] {
        let injector = site.start(BACKEND, peers)?;
        for family in Family::ALL {
            let listener = site.listen(BACKEND, family)?;
            let other = SocketAddr::new(BACKEND.of(family), BACKEND_PORT + 7);
            let _other = site.mail.run(|| std::net::TcpListener::bind(other))??;
            site.inlined(family, &listener)?;
            ensure!(reaches(family, other.port())?, "{}: another port is out of reach", family.name());
            ensure!(
                reaches(family, BACKEND_PORT)? == reached,
                "{}: not {reached} with {peers:?}",
                family.name()
            );
        }
        let dropped = counted(&injector, "proxy_port")?;
        ensure!((dropped == 0) == reached, "{dropped} were counted");
    }
    Ok(())
}

/// The options are taken out, so that both ends fall back to TCP.
fn mptcp() -> anyhow::Result<()> {
    const MPTCP: i32 = 262;
    const TCP_IS_MPTCP: i32 = 43;
    let site = Site::joined()?;
    let injector = site.start(BACKEND, "")?;
    for family in Family::ALL {
        let backend = SocketAddr::new(BACKEND.of(family), BACKEND_PORT);
        let socket = |address: SocketAddr| {
            Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::from(MPTCP)))
        };
        let listen = || {
            let listener = socket(backend)?;
            listener.set_reuse_address(true)?;
            listener.bind(&backend.into())?;
            listener.listen(8)?;
            std::io::Result::Ok(std::net::TcpListener::from(listener))
        };
        let listener = match site.mail.run(listen)? {
            Ok(listener) => listener,
            Err(error) => {
                eprintln!("    not run: no MPTCP here ({error})");
                return Ok(());
            }
        };
        let connect = || {
            let client = socket(vip(family))?;
            client.connect_timeout(&vip(family).into(), LIMIT)?;
            std::io::Result::Ok(TcpStream::from(client))
        };
        let client = site.client.run(connect)??;
        patient(&client)?;
        let (client, server) = greeted(client, &listener)?;
        ensure!(is_inline(&server)?, "served by the socket");
        let mut is_mptcp = 1_i32;
        let mut len = libc::socklen_t::try_from(size_of_val(&is_mptcp))?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&server);
        // SAFETY: the value is writable for `len` bytes.
        let result = unsafe {
            libc::getsockopt(fd, libc::IPPROTO_TCP, TCP_IS_MPTCP, (&raw mut is_mptcp).cast(), &raw mut len)
        };
        ensure!(result != 0 || is_mptcp == 0, "the backend has an MPTCP connection");
        through(&client, &server, 1 << 20, 0)?;
        through(&server, &client, 1 << 20, 0)?;
    }
    ensure!(counted(&injector, "established")? == 2, "{}", events(&injector)?);
    Ok(())
}

/// Packets of more than 64 KiB, which carry a header of their own, are as fast as others.
fn big_tcp() -> anyhow::Result<()> {
    const BYTES: usize = 32 << 20;
    let site = Site::joined()?;
    let injector = site.start(BACKEND, "")?;
    let transfer = || {
        let listener = site.listen(BACKEND, Family::V6)?;
        let (client, server) = site.inlined(Family::V6, &listener)?;
        let start = Instant::now();
        through(&client, &server, BYTES, 0).with_context(|| events(&injector).unwrap_or_default())?;
        through(&server, &client, BYTES, 0).with_context(|| events(&injector).unwrap_or_default())?;
        anyhow::Ok(start.elapsed())
    };
    let before = transfer()?;
    for (netns, device) in
        [(&site.client, "eth0"), (&site.edge, "outside"), (&site.edge, "inside"), (&site.mail, "eth0")]
    {
        netns.ip(&["link", "set", device, "gso_max_size", "190000", "gro_max_size", "190000"])?;
    }
    let took = transfer()?;
    eprintln!("    {} MiB each way in {took:.2?}, without in {before:.2?}", BYTES >> 20);
    ensure!(took < 4 * before, "it took {took:?} in place of {before:?}");
    for event in ["rewrite_failed", "too_big"] {
        ensure!(counted(&injector, event)? == 0, "{}", events(&injector)?);
    }
    Ok(())
}

/// Neither end sends more than the narrower of the two ways takes.
fn narrow() -> anyhow::Result<()> {
    const MTU: u32 = 1280;
    let site = Site::joined()?;
    site.edge.ip(&["link", "set", "inside", "mtu", &MTU.to_string()])?;
    site.mail.ip(&["link", "set", "eth0", "mtu", &MTU.to_string()])?;
    // The mail host would announce that itself.
    for family in Family::ALL {
        let inet = if family == Family::V4 { "-4" } else { "-6" };
        let to = on(INSIDE, 1).of(family).to_string();
        site.mail.ip(&[inet, "route", "add", &to, "dev", "eth0", "advmss", "1400"])?;
    }
    let injector = site.start(BACKEND, "")?;
    for family in Family::ALL {
        let listener = site.listen(BACKEND, family)?;
        let (client, server) = site.inlined(family, &listener)?;
        let headers = if family == Family::V4 { 40 } else { 60 };
        for stream in [&client, &server] {
            let mss = SockRef::from(stream).tcp_mss()?;
            ensure!(mss <= MTU - headers, "an end sends {mss} bytes");
        }
        through(&client, &server, 1 << 20, 0)?;
        through(&server, &client, 1 << 20, 0)?;
    }
    for event in ["too_big", "rewrite_failed"] {
        ensure!(counted(&injector, event)? == 0, "{}", events(&injector)?);
    }
    Ok(())
}
