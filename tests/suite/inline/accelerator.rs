//! Inline is an accelerator in front of listening sockets: what it does not take, the socket serves at
//! the same address, or refuses in the client's protocol.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use injector_testbed::bpf;
use injector_testbed::daemon::Injector;
use injector_testbed::netns::{EDGE_OUTSIDE, Family, MAIL};
use injector_testbed::wait::wait_until;

use crate::Run;
use crate::lifecycle::{serve, session};
use crate::testbed::{
    BACKEND_PORT, PORT, Testbed, accept, backend_address, connect, counted, expect, greeted, is_inline,
    own_header, public_address, works,
};
use crate::wire_testbed::Forwarding;

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("no backend is up", no_backend),
    ("one of two backends refuses", one_refuses),
    ("one of two backends is unreachable", one_unreachable),
    ("drain and resume", drain),
    ("a drain without time, and connections after it", drain_at_once),
    ("limit of the listener, both engines together", |testbed, family| limit(testbed, family, false)),
    ("limit of all listeners, both engines together", |testbed, family| limit(testbed, family, true)),
    ("limit after 2,000 short sessions", limit_after_sessions),
    ("no room for another connection", full),
    ("connections of the host itself", own_connections),
    ("a wildcard address takes only what is addressed to this host", wildcard),
    ("a backend on this host", backend_here),
    ("a client's address towards backends", as_client),
    ("forwarding of the host is turned off", forwarding_off),
    ("the host's firewall is named, if it would refuse clients", firewall),
];

/// Trials that take seconds: for one family.
pub(crate) const SLOW_TRIALS: &[(&str, Run)] = &[
    ("a silent backend", silent_backend),
    ("the program is detached", |testbed, family| detached(testbed, family, Way::Link)),
    ("the program's pins are removed", |testbed, family| detached(testbed, family, Way::Pins)),
    ("the program's qdisc is removed", |testbed, family| detached(testbed, family, Way::Qdisc)),
];

const QUICK_CHECK: &str = "[listener.health]\ncheck = \"tcp\"\ninterval = \"100ms\"\ntimeout = \"1s\"\nrise = 2\n\
                           fall = 2\neject_after = 0\n";

/// The client gets this refusal, and the end.
pub(crate) fn refused(mut client: TcpStream, text: &str) -> anyhow::Result<()> {
    expect(&mut client, text.as_bytes())?;
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).context("after the refusal")?;
    Ok(())
}

fn no_backend(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let injector = testbed.start(&testbed.config_with("", "smtp", QUICK_CHECK))?;
    let up = || Ok(injector.metrics()?.sum("injector_backend_up", &[]));
    wait_until("backends", up, |up| *up < 0.5)?;
    wait_until("the program's table", || no_table(testbed, &injector, family), |count| *count > 0)?;
    let backend = testbed.backend(family)?;
    wait_until("backends", up, |up| *up > 0.5)?;
    let inline = || {
        let mut client = testbed.client(family)?;
        // Beside the connections of checks, which send nothing.
        let mut server = accept(&backend)?;
        while server.peek(&mut [0])? == 0 {
            server = accept(&backend)?;
        }
        own_header(&mut server, &client)?;
        works(&mut client, &mut server)?;
        is_inline(&server)
    };
    wait_until("inline", inline, |inline| *inline).map(drop)
}

/// How many SYNs of this refused client were left to the socket for want of a backend.
fn no_table(testbed: &Testbed, injector: &Injector, family: Family) -> anyhow::Result<u64> {
    let before = counted(injector, "to_socket_no_backend")?;
    refused(testbed.client(family)?, "421 4.3.2 Mail service not available")?;
    Ok(counted(injector, "to_socket_no_backend")? - before)
}

/// Another host that listens where no header is needed.
fn second_backend(family: Family) -> SocketAddr {
    SocketAddr::new(MAIL.of(family), BACKEND_PORT + 1)
}

/// The client's next SYN goes to the socket, where the other backend is tried.
fn one_refuses(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    const CLIENTS: usize = 12;
    let backends = format!("backends = [\"{}\", \"{}\"]\n", backend_address(family), second_backend(family));
    let injector = testbed.start(&testbed.config_with("", "smtp", &backends))?;
    let backend = testbed.backend(family)?;
    let over = AtomicBool::new(false);
    backend.set_nonblocking(true)?;
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| serve(&backend, &over));
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| session(testbed, family))).collect();
        let outcome = clients
            .into_iter()
            .try_for_each(|client| client.join().map_err(|_| anyhow!("panicked"))?.context("a client"));
        over.store(true, Ordering::Relaxed);
        serving.join().map_err(|_| anyhow!("panicked"))?.and(outcome)
    })?;
    let (refused, left) = (counted(&injector, "refused")?, counted(&injector, "to_socket_unanswered")?);
    ensure!(refused > 0 && refused == left, "{refused} refused, {left} left to the socket");
    Ok(())
}

/// The same, where a router says that there is no way to one of them.
fn one_unreachable(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let mail = &testbed.topology.mail;
    // An answer for each client: by default a host sends one a second to another.
    mail.sysctl("net/ipv4/icmp_ratelimit", "0")?;
    mail.sysctl("net/ipv6/icmp/ratelimit", "0")?;
    mail.nft(&format!(
        "add table inet unreachable; \
         add chain inet unreachable input {{ type filter hook input priority 0; }}; \
         add rule inet unreachable input tcp dport {} reject with icmpx type host-unreachable",
        second_backend(family).port()
    ))?;
    let outcome = one_refuses(testbed, family);
    mail.nft("delete table inet unreachable")?;
    outcome
}

/// The client's third SYN, after two or three seconds, goes to the socket.
fn silent_backend(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let mail = &testbed.topology.mail;
    mail.nft(&format!(
        "add table inet silent; add chain inet silent input {{ type filter hook input priority 0; }}; \
         add rule inet silent input tcp dport {BACKEND_PORT} drop"
    ))?;
    let run = || {
        let injector =
            testbed.start(&testbed.config_with("", "smtp", "[listener.timeouts]\nconnect = \"300ms\"\n"))?;
        let start = Instant::now();
        refused(testbed.client(family)?, "421 ")?;
        let took = start.elapsed();
        ensure!((1900..4500).contains(&took.as_millis()), "after {took:?}");
        let left = counted(&injector, "to_socket_unanswered")?;
        ensure!(left == 1, "{left} SYNs were left to the socket");
        Ok(())
    };
    let outcome = run();
    mail.nft("delete table inet silent")?;
    outcome
}

fn drain(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let injector = testbed.injector("smtp", "")?;
    let (mut client, mut server) = testbed.inlined(family, &backend)?;
    injector.command(&["drain"])?;
    // The program learns of it a moment later; meanwhile a client may still reach the backend.
    let is_refused = || {
        let client = testbed.client(family)?;
        client.set_read_timeout(Some(Duration::from_millis(200)))?;
        refused(client, "421 4.3.2 Service shutting down")
    };
    wait_until("a refusal", is_refused, |()| true)?;
    backend.set_nonblocking(true)?;
    while backend.accept().is_ok() {}
    works(&mut client, &mut server)?;
    injector.command(&["resume"])?;
    wait_until("inline", || is_inline(&testbed.joined(family, &backend)?.1), |inline| *inline)?;
    works(&mut client, &mut server)
}

/// The deadline is over before the engine has followed.
fn drain_at_once(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let injector = testbed.injector("smtp", "")?;
    let (mut client, mut server) = testbed.inlined(family, &backend)?;
    injector.command(&["drain", "--deadline", "1ms"])?;
    let broken = || Ok(works(&mut client, &mut server).is_err());
    wait_until("the reset", broken, |broken| *broken)?;
    injector.command(&["resume"])?;
    wait_until("inline", || is_inline(&testbed.joined(family, &backend)?.1), |inline| *inline)?;
    let (mut client, mut server) = testbed.inlined(family, &backend)?;
    // Connections from before the drain are reset once more.
    std::thread::sleep(Duration::from_millis(1500));
    works(&mut client, &mut server)
}

/// Two by inline, two by the socket, and no more.
fn limit(testbed: &Testbed, family: Family, of_all: bool) -> anyhow::Result<()> {
    const TOO_MANY: &str = "421 4.3.2 Too many connections";
    let backend = testbed.backend(family)?;
    let (listener, table) =
        if of_all { ("", "\n[limits]\nmax_connections = 4\n") } else { ("max_connections = 4\n", "") };
    let config = testbed.config_with("", "smtp", listener) + table;
    let injector = testbed.start(&config)?;
    let first = testbed.inlined(family, &backend)?;
    let _second = testbed.inlined(family, &backend)?;
    let edge = &testbed.topology.edge;
    let by_socket = || greeted(connect(edge, public_address(family))?, &backend);
    let (third, _fourth) = (by_socket()?, by_socket()?);
    ensure!(!is_inline(&third.1)?, "the host's own connection was taken");
    let before = counted(&injector, "to_socket_limit")?;
    refused(testbed.client(family)?, TOO_MANY)?;
    refused(connect(edge, public_address(family))?, TOO_MANY)?;
    ensure!(counted(&injector, "to_socket_limit")? == before + 1, "not counted");
    // A place of either engine is a place for either.
    let active = || Ok(injector.metrics()?.sum("injector_connections_active", &[]));
    drop(third);
    wait_until("a place", active, |active| *active < 3.5)?;
    let _fifth = testbed.inlined(family, &backend)?;
    drop(first);
    wait_until("a place", active, |active| *active < 3.5)?;
    by_socket()?;
    Ok(())
}

/// Every connection that has ended has left its place.
fn limit_after_sessions(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    const SESSIONS: usize = 1000;
    const THREADS: usize = 4;
    let backend = testbed.backend(family)?;
    backend.set_nonblocking(true)?;
    let injector = testbed.start(&testbed.config_with("", "smtp", "max_connections = 8\n"))?;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Half of them on the other side's turn to close first.
        let serving: Vec<_> = (0..2).map(|_| scope.spawn(|| serve(&backend, &over))).collect();
        let sessions = || (0..SESSIONS / THREADS).try_for_each(|_| session(testbed, family));
        let clients: Vec<_> = (0..THREADS).map(|_| scope.spawn(sessions)).collect();
        let mut outcome = Ok(());
        for client in clients {
            outcome = outcome.and(client.join().map_err(|_| anyhow!("panicked"))?.context("a client"));
        }
        over.store(true, Ordering::Relaxed);
        for server in serving {
            outcome = outcome.and(server.join().map_err(|_| anyhow!("panicked"))?);
        }
        outcome
    })?;
    backend.set_nonblocking(false)?;
    let active = || Ok(injector.metrics()?.sum("injector_connections_active", &[]));
    wait_until("connections", active, |active| *active < 0.5)?;
    let open = (0..8).map(|_| testbed.inlined(family, &backend)).collect::<anyhow::Result<Vec<_>>>()?;
    refused(testbed.client(family)?, "421 4.3.2 Too many connections")?;
    drop(open);
    Ok(())
}

/// `inline.flows` limits what inline takes, not what is served.
fn full(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    const FLOWS: usize = 16;
    let backend = testbed.backend(family)?;
    let injector = testbed.injector("smtp", &format!("flows = {FLOWS}"))?;
    let mut open = Vec::new();
    for _ in 0..FLOWS + 4 {
        open.push(testbed.joined(family, &backend)?);
    }
    let by_inline = open.iter().filter(|(_, server)| is_inline(server).unwrap_or_default()).count();
    ensure!(by_inline == FLOWS, "{by_inline} were taken");
    let left = counted(&injector, "to_socket_full")?;
    ensure!(left == 4, "{left} SYNs were left to the socket");
    open.iter_mut().try_for_each(|(client, server)| works(client, server))
}

/// How an administrator takes the program away.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `bpftool link detach`.
    Link,
    /// `rm -r` of the pins.
    Pins,
    /// `tc qdisc del dev … clsact`.
    Qdisc,
}

/// Its connections break, new ones are served, and the program comes back.
fn detached(testbed: &Testbed, family: Family, way: Way) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let attachment = if way == Way::Qdisc { "clsact" } else { "tcx" };
    let injector = testbed.injector("smtp", &format!("attachment = \"{attachment}\""))?;
    drop(testbed.inlined(family, &backend)?);
    let edge = &testbed.topology.edge;
    let links =
        || edge.run(|| anyhow::Ok([bpf::tcx_links("outside")?, bpf::tcx_links("inside")?].concat()))?;
    let attached = links()?;
    match way {
        Way::Link => edge.run(|| attached.iter().copied().try_for_each(bpf::detach_link))??,
        Way::Pins => std::fs::remove_dir_all(testbed.bpffs.path().join("v7"))?,
        Way::Qdisc => {
            for device in ["outside", "inside"] {
                let status = edge.command("tc").args(["qdisc", "del", "dev", device, "clsact"]).status()?;
                ensure!(status.success(), "tc qdisc del");
            }
        }
    }
    // The kernel detaches a program some time after its last pin is gone (bpf_link_put_deferred,
    // kernel/bpf/syscall.c): a connection that begins before it never gets its answer.
    wait_until("the detached links", links, |now| !now.iter().any(|link| attached.contains(link)))?;
    // By whichever engine: the daemon may have been fast.
    drop(testbed.joined(family, &backend)?);
    wait_until("the program", || is_inline(&testbed.joined(family, &backend)?.1), |inline| *inline)?;
    if way == Way::Link {
        ensure!(injector.log().contains("another program had detached inline"), "{}", injector.log());
    }
    Ok(())
}

/// Health checks, connections of other programs, and sessions of the socket, while inline has some to the
/// same backend.
fn own_connections(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let _injector = testbed.injector("smtp", "")?;
    let mut by_inline = testbed.inlined(family, &backend)?;
    let edge = &testbed.topology.edge;
    let mut own = connect(edge, backend_address(family))?;
    let mut server = accept(&backend)?;
    own.write_all(b"a check")?;
    expect(&mut server, b"a check")?;
    let mut by_socket = greeted(connect(edge, public_address(family))?, &backend)?;
    ensure!(!is_inline(&by_socket.1)?, "the host's own connection was taken");
    for (client, server) in [&mut by_inline, &mut by_socket] {
        works(client, server)?;
    }
    crate::wire_testbed::through(&own, &server, 1 << 20, 0)?;
    crate::wire_testbed::through(&server, &own, 1 << 20, 0)
}

/// What this host forwards to the same port of another host passes untouched.
fn wildcard(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let topology = &testbed.topology;
    let _forwarding = Forwarding::new(&topology.edge)?;
    let backend = testbed.backend(family)?;
    let config = testbed.config("smtp", "");
    let bind = config.lines().find(|line| line.starts_with("bind = ")).context("no bind")?;
    let config = config.replace(bind, &format!("bind = [\"[::]:{PORT}\"]"));
    let injector = testbed.start(&config)?;
    // Every address of the host.
    drop(testbed.inlined(family, &backend)?);
    let outside = SocketAddr::new(EDGE_OUTSIDE.of(family), PORT);
    let (_client, server) = greeted(connect(&topology.client, outside)?, &backend)?;
    ensure!(is_inline(&server)?, "{outside} is served by the socket");
    // Another host, where no header belongs.
    let other = SocketAddr::new(MAIL.of(family), PORT);
    let listener = topology.mail.run(|| TcpListener::bind(other))??;
    let (prefix, via) = match family {
        Family::V4 => ("10.25.0.0/24", EDGE_OUTSIDE.v4.to_string()),
        Family::V6 => ("fd25::/64", EDGE_OUTSIDE.v6.to_string()),
    };
    topology.client.ip(&["route", "replace", prefix, "via", &via])?;
    let before = counted(&injector, "opened")?;
    let outcome = connect(&topology.client, other).and_then(|mut client| {
        let mut server = accept(&listener)?;
        ensure!(server.peer_addr()? == client.local_addr()?, "from {}", server.peer_addr()?);
        client.write_all(b"EHLO")?;
        expect(&mut server, b"EHLO")?;
        works(&mut client, &mut server)
    });
    topology.client.ip(&["route", "del", prefix, "via", &via])?;
    outcome?;
    ensure!(counted(&injector, "opened")? == before, "the program has taken it");
    Ok(())
}

/// A backend on this host is reached by the socket.
fn backend_here(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let here = SocketAddr::new(EDGE_OUTSIDE.of(family), BACKEND_PORT);
    let backend = testbed.topology.edge.run(|| TcpListener::bind(here))??;
    let injector = testbed.start(&testbed.config_with("", "smtp", &format!("backends = [\"{here}\"]\n")))?;
    let (_client, server) = testbed.joined(family, &backend)?;
    ensure!(!is_inline(&server)?, "from {}", server.peer_addr()?);
    ensure!(counted(&injector, "opened")? == 0, "the program has taken it");
    Ok(())
}

/// `source = "client"`: nothing but the header is added. Answers come back by the route.
fn as_client(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let injector = testbed.injector("smtp", "source = \"client\"")?;
    for _ in 0..3 {
        let client = testbed.client(family)?;
        let (mut client, mut server) = greeted(client, &backend)?;
        ensure!(server.peer_addr()? == client.local_addr()?, "from {}", server.peer_addr()?);
        works(&mut client, &mut server)?;
        crate::wire_testbed::through(&client, &server, 1 << 20, 0)?;
        crate::wire_testbed::through(&server, &client, 1 << 20, 0)?;
    }
    ensure!(counted(&injector, "established")? == 3, "not by the program");
    Ok(())
}

/// Another tool writes `net.ipv4.ip_forward`, which sets what the engine needs of `lo` as well.
fn forwarding_off(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let _injector = testbed.injector("smtp", "")?;
    let (mut client, mut server) = testbed.inlined(family, &backend)?;
    for (key, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv4/ip_forward", "0"),
        ("net/ipv6/conf/all/forwarding", "0"),
    ] {
        testbed.topology.edge.sysctl(key, value)?;
    }
    // By whichever engine.
    drop(testbed.joined(family, &backend)?);
    wait_until("inline", || is_inline(&testbed.joined(family, &backend)?.1), |inline| *inline)?;
    works(&mut client, &mut server)?;
    client.shutdown(Shutdown::Write)?;
    if server.read(&mut [0; 8])? != 0 {
        bail!("bytes in place of an end");
    }
    Ok(())
}

/// A chain with rules is named; one without is not.
fn firewall(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let edge = &testbed.topology.edge;
    let (filled, empty) = (format!("filled{family:?}"), format!("empty{family:?}"));
    for table in [&filled, &empty] {
        edge.nft(&format!(
            "add table inet {table}; add chain inet {table} bans {{ type filter hook input priority 0; }}"
        ))?;
    }
    edge.nft(&format!("add rule inet {filled} bans ip saddr 203.0.113.0/24 drop"))?;
    let observe = || {
        let injector = testbed.start(&testbed.config("smtp", ""))?;
        let named = |table: &str| format!("bans of table inet {table} (hook input)");
        wait_until("the warning", || Ok(injector.log()), |log| log.contains(&named(&filled)))?;
        ensure!(!injector.log().contains(&named(&empty)), "a chain without rules: {}", injector.log());
        Ok(())
    };
    let outcome = observe();
    edge.nft(&format!("delete table inet {filled}; delete table inet {empty}"))?;
    outcome
}
