//! Limits per source, counted by the program and the daemon together.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use injector_common::guard::CountWord;
use injector_common::inline::Usage;
use injector_testbed::bpf::DaemonMap;
use injector_testbed::daemon::Injector;
use injector_testbed::netns::Family;
use injector_testbed::wait::wait_until;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::Run;
use crate::lifecycle::{serve, session};
use crate::testbed::{
    InlineInjector, LIMIT, Testbed, client_ip, counted, header, is_inline, patient, public_address, works,
};
use crate::wire_testbed::SysctlGuard;

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("source/both engines together, and after a kill", together),
    ("source/limit of a listener", of_listener),
    ("source/opens and holds", opens_and_holds),
    ("source/rate", rate),
    ("source/allowed", allowed),
    ("source/nothing is left of 1,000 short sessions", |testbed, family| {
        short_sessions(testbed, family, 1000)
    }),
];

/// For one family: it takes the time after which the program forgets a handshake.
pub(crate) const ABANDONED: (&str, Run) = ("source/a handshake that comes to nothing", abandoned);

/// For one family, and only on request.
pub(crate) const SLOW_TRIALS: &[(&str, Run)] =
    &[("source/nothing is left of 100,000 short sessions", |testbed, family| {
        short_sessions(testbed, family, 100_000)
    })];

const TOO_MANY: &str = "421 4.7.0 Too many connections from your network, try again later\r\n";

fn start(testbed: &Testbed, listener: &str, guard: &str) -> anyhow::Result<(InlineInjector, String)> {
    let config = testbed.config_with("", "smtp", listener) + "\n[guard]\n" + guard;
    Ok((testbed.start(&config)?, config))
}

fn reply(mut client: TcpStream) -> anyhow::Result<String> {
    let mut line = String::new();
    client.read_to_string(&mut line)?;
    Ok(line)
}

fn refused(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let line = reply(testbed.client(family)?)?;
    ensure!(line == TOO_MANY, "{line:?}");
    Ok(())
}

/// Waits until this many connections are open.
fn settled(injector: &Injector, count: f64) -> anyhow::Result<()> {
    let active = || Ok(injector.metrics()?.sum("injector_connections_active", &[]));
    wait_until("open connections", active, |active| (*active - count).abs() < 0.5).map(drop)
}

fn becomes(testbed: &Testbed, family: Family, backend: &TcpListener, inline: bool) -> anyhow::Result<()> {
    let is = || is_inline(&testbed.joined(family, backend)?.1);
    wait_until("the other engine", is, |is| *is == inline).map(drop)
}

/// How many entries the map of the program at this pin has.
fn entries(pin: &Path, map: &str) -> anyhow::Result<usize> {
    DaemonMap::pinned(&pin.join("v7/maps").join(map))?.entries()
}

fn no_entries(testbed: &Testbed) -> anyhow::Result<()> {
    for map in ["SOURCE_COUNTS", "SOURCE_SESSIONS"] {
        wait_until(map, || entries(testbed.bpffs.path(), map), |entries| *entries == 0)?;
    }
    Ok(())
}

/// Inline's connections and the sessions of another engine share the limit. After a kill, inline's are
/// still there, and the sessions are not.
fn together(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    const MOST: usize = 6;
    let backend = testbed.backend(family)?;
    let guard = format!("max_connections_per_source = {MOST}\n");
    // Another listener keeps the engine loaded.
    let other = "[[listener]]\nname = \"other\"\nbind = [\"127.0.0.1:2999\"]\nprotocol = \"smtp\"\n\
                 engine = \"inline\"\nbackends = [\"10.25.0.2:12500\"]\n";
    let config = testbed.config_with("", "smtp", "") + "\n" + other + "\n[guard]\n" + &guard;
    let _detached = testbed.attached();
    let injector = Injector::start(&testbed.topology.edge, &config)?;
    let mut first = testbed.inlined(family, &backend)?;
    let load = |config: &str| -> anyhow::Result<()> {
        injector.rewrite(config)?;
        injector.command(&["reload"]).map(drop)
    };
    load(&config.replacen("engine = \"inline\"", "engine = \"relay\"", 1))?;
    becomes(testbed, family, &backend, false)?;
    let relayed = testbed.joined(family, &backend)?;
    load(&config)?;
    becomes(testbed, family, &backend, true)?;
    settled(&injector, 2.0)?;
    let mut open =
        (2..MOST).map(|_| testbed.inlined(family, &backend)).collect::<anyhow::Result<Vec<_>>>()?;
    let before = counted(&injector, "to_socket_source_limit")?;
    refused(testbed, family)?;
    ensure!(counted(&injector, "to_socket_source_limit")? == before + 1, "not counted");
    // A place of either engine is a place for either.
    drop(relayed);
    settled(&injector, 5.0)?;
    open.push(testbed.inlined(family, &backend)?);
    refused(testbed, family)?;
    open.pop();
    settled(&injector, 5.0)?;
    load(&config.replacen("engine = \"inline\"", "engine = \"relay\"", 1))?;
    let relayed = loop {
        let one = testbed.joined(family, &backend)?;
        if !is_inline(&one.1)? {
            break one;
        }
        drop(one);
        settled(&injector, 5.0)?;
    };
    refused(testbed, family)?;
    // SIGKILL: the session is gone, inline's connections are not.
    let sessions = || entries(testbed.bpffs.path(), "SOURCE_SESSIONS");
    ensure!(sessions()? == 1, "the session is not the program's to see");
    drop(injector);
    let again = Injector::start_next(&testbed.topology.edge, &config).context("started again")?;
    ensure!(sessions()? == 0, "the session of the killed daemon counts");
    drop(relayed);
    works(&mut first.0, &mut first.1)?;
    becomes(testbed, family, &backend, true)?;
    settled(&again, 5.0)?;
    let last = testbed.inlined(family, &backend)?;
    refused(testbed, family)?;
    drop((first, open, last));
    settled(&again, 0.0)?;
    no_entries(testbed)?;
    drop(again);
    Ok(())
}

/// A listener's limit holds beside that of all, and the lower one counts.
fn of_listener(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let limit = "[listener.guard]\nmax_connections_per_source = 2\n";
    let (injector, config) = start(testbed, limit, "max_connections_per_source = 3\n")?;
    let mut open = vec![testbed.inlined(family, &backend)?, testbed.inlined(family, &backend)?];
    refused(testbed, family)?;
    // Without the listener's, one more of all.
    injector.rewrite(&config.replacen("max_connections_per_source = 2", "", 1))?;
    injector.command(&["reload"])?;
    open.push(testbed.inlined(family, &backend)?);
    refused(testbed, family)?;
    drop(open);
    settled(&injector, 0.0)?;
    no_entries(testbed)
}

/// Another client than that of [`client_ip`]; the same source as that, if it is IPv6.
fn other_ip(family: Family) -> SocketAddr {
    let other = match family {
        Family::V4 => "198.51.100.8:0",
        Family::V6 => "[2001:db8:c::8]:0",
    };
    other.parse().unwrap_or_else(|_| SocketAddr::new(client_ip(family), 0))
}

fn connect_from_other(family: Family) -> anyhow::Result<TcpStream> {
    let domain = if family == Family::V4 { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::STREAM, None)?;
    socket.bind(&SockAddr::from(other_ip(family)))?;
    socket.connect_timeout(&public_address(family).into(), LIMIT)?;
    let stream = TcpStream::from(socket);
    patient(&stream)?;
    Ok(stream)
}

/// The first byte of a banner or of a refusal.
fn first_byte(client: &mut TcpStream) -> anyhow::Result<u8> {
    let mut byte = [0];
    client.read_exact(&mut byte)?;
    Ok(byte[0])
}

/// One address opens more connections than there are, and keeps them: how many it holds, and how many
/// sessions of another one are served.
fn opens_and_holds(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let prefix = if family == Family::V4 { 24 } else { 64 };
    let other = format!("{}/{prefix}", other_ip(family).ip());
    let client = &testbed.topology.client;
    let nodad = if family == Family::V4 { &[][..] } else { &["nodad"] };
    client.ip(&[&["address", "add", &other, "dev", "eth0"], nodad].concat())?;
    let outcome = (|| {
        let limits = "[limits]\nmax_connections = 40\n";
        // The other IPv6 client is in the same network of 64 bits.
        let served = if family == Family::V4 { 20 } else { 0 };
        for (guard, expected) in [
            ("[guard]\nmax_connections_per_source = 1000\n", (40, 0)),
            ("", (20, served)),
            ("[guard]\nmax_connections_per_source = 10\n", (10, served)),
        ] {
            let seen = contend(testbed, family, &format!("{limits}{guard}"))?;
            println!("  (held, others served) {seen:?} with {guard:?}");
            ensure!(seen == expected, "{guard}: {seen:?}");
        }
        Ok(())
    })();
    client.ip(&["address", "del", &other, "dev", "eth0"])?;
    outcome
}

fn contend(testbed: &Testbed, family: Family, limits: &str) -> anyhow::Result<(usize, usize)> {
    let backend = testbed.backend(family)?;
    backend.set_nonblocking(true)?;
    let _injector = testbed.start(&(testbed.config_with("", "smtp", "") + "\n" + limits))?;
    served_while(&backend, || {
        let mut hogs = Vec::new();
        let mut held = 0;
        for _ in 0..60 {
            let mut hog = testbed.client(family)?;
            held += usize::from(first_byte(&mut hog)? == b'2');
            hogs.push(hog);
        }
        let mut served = 0;
        for _ in 0..20 {
            let mut other = testbed.topology.client.run(|| connect_from_other(family))??;
            served += usize::from(first_byte(&mut other)? == b'2');
        }
        Ok((held, served))
    })
}

/// Runs `clients` while a backend greets every client, and keeps its connections.
fn served_while<T>(backend: &TcpListener, clients: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| -> anyhow::Result<()> {
            let mut open = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let Ok((mut server, _)) = backend.accept() else {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                };
                server.set_nonblocking(false)?;
                patient(&server)?;
                header(&mut server)?;
                server.write_all(b"220 hello\r\n")?;
                open.push(server);
            }
            Ok(())
        });
        let outcome = clients();
        over.store(true, Ordering::Relaxed);
        serving.join().map_err(|_| anyhow::anyhow!("the backend panicked"))??;
        outcome
    })
}

/// Beyond the burst one connection in each interval, whichever engine has it.
fn rate(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    const BURST: usize = 5;
    let backend = testbed.backend(family)?;
    backend.set_nonblocking(true)?;
    let (injector, _) =
        start(testbed, "", &format!("max_rate_per_source = 1\nburst_per_source = {BURST}\n"))?;
    let (admitted, took) = served_while(&backend, || {
        let start = Instant::now();
        let mut admitted = 0;
        for _ in 0..4 * BURST {
            admitted += usize::from(first_byte(&mut testbed.client(family)?)? == b'2');
        }
        Ok((admitted, start.elapsed()))
    })?;
    let later = usize::try_from(took.as_secs()).context("too slow")? + 1;
    ensure!((BURST..=BURST + later).contains(&admitted), "{admitted} admitted in {took:?}");
    let rejected =
        injector.metrics()?.sum("injector_connections_rejected_total", &[("reason", "source_rate")]);
    ensure!(rejected > 0.5 && counted(&injector, "to_socket_source_limit")? > 0, "{rejected} rejected");
    Ok(())
}

/// A network that is allowed has no limit.
fn allowed(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let allow = format!("allow = [\"{}\"]\nmax_connections_per_source = 1\n", client_ip(family));
    let (injector, _) = start(testbed, "", &allow)?;
    let open = (0..4).map(|_| testbed.joined(family, &backend)).collect::<anyhow::Result<Vec<_>>>()?;
    drop(open);
    settled(&injector, 0.0)?;
    no_entries(testbed)
}

/// Every connection that has ended is counted no more.
fn short_sessions(testbed: &Testbed, family: Family, sessions: usize) -> anyhow::Result<()> {
    const THREADS: usize = 4;
    let backend = testbed.backend(family)?;
    backend.set_nonblocking(true)?;
    let limit = "[listener.guard]\nmax_connections_per_source = 8\n";
    let (injector, _) =
        start(testbed, limit, "max_connections_per_source = 8\nmax_rate_per_source = 1000000\n")?;
    // More than the client has ports, each of which a new connection may have after a second.
    let _reuse = SysctlGuard::new(&testbed.topology.client, "net/ipv4/tcp_tw_reuse", "1")?;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let serving: Vec<_> = (0..2).map(|_| scope.spawn(|| serve(&backend, &over))).collect();
        let some = || (0..sessions / THREADS).try_for_each(|_| session(testbed, family));
        let clients: Vec<_> = (0..THREADS).map(|_| scope.spawn(some)).collect();
        let mut outcome = Ok(());
        for client in clients {
            outcome =
                outcome.and(client.join().map_err(|_| anyhow::anyhow!("panicked"))?.context("a client"));
        }
        over.store(true, Ordering::Relaxed);
        for server in serving {
            outcome = outcome.and(server.join().map_err(|_| anyhow::anyhow!("panicked"))?);
        }
        outcome
    })?;
    settled(&injector, 0.0)?;
    no_entries(testbed)?;
    backend.set_nonblocking(false)?;
    let open = (0..8).map(|_| testbed.inlined(family, &backend)).collect::<anyhow::Result<Vec<_>>>()?;
    refused(testbed, family)?;
    drop(open);
    Ok(())
}

/// The backend refuses the SYN: the handshake counts until the program forgets it, and then no more.
fn abandoned(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let limit = "[listener.guard]\nmax_connections_per_source = 8\n[listener.health]\neject_after = 0\n";
    let (injector, _) = start(testbed, limit, "max_connections_per_source = 8\n")?;
    let line = reply(testbed.client(family)?)?;
    ensure!(line.starts_with("421 4.3.2 "), "{line:?}");
    ensure!(counted(&injector, "opened")? > 0, "the program has not opened it");
    ensure!(entries(testbed.bpffs.path(), "SOURCE_COUNTS")? == 2, "the handshake is not counted");
    no_entries(testbed)?;
    ensure!(counted(&injector, "abandoned")? > 0, "not by the sweep");
    Ok(())
}

/// Checks that sources have as many handshakes and connections as there are, where every source has a
/// limit: both numbers, of all listeners.
pub(crate) fn counts_are_exact(pin: &Path) -> anyhow::Result<()> {
    let maps = pin.join("v7/maps");
    let read = || -> anyhow::Result<[(u32, u32); 2]> {
        let usage = DaemonMap::pinned(&maps.join("USAGE"))?.pairs(size_of::<Usage>())?;
        let (_, all) = usage.into_iter().find(|(key, _)| key == &[0; 4]).context("USAGE")?;
        let number =
            |at: usize| all.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
        let existing = number(0).zip(number(4)).context("a short value")?;
        let mut counted = (0, 0);
        // A source may leave between its key and its value.
        for (key, value) in DaemonMap::pinned(&maps.join("SOURCE_COUNTS"))?.pairs(8).unwrap_or_default() {
            if key.ends_with(&[0; 4]) {
                let word = CountWord(u64::from_ne_bytes(value.try_into().unwrap_or_default()));
                counted = (counted.0 + word.pending(), counted.1 + word.established());
            }
        }
        Ok([existing, counted])
    };
    wait_until("counts of sources as the connections that exist", read, |[existing, counted]| {
        existing == counted
    })
    .map(drop)
}
