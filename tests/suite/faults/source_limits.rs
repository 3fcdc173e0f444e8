//! Limits per source: one address takes what it can get, and others are served.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use injector_testbed::daemon::{ADMIN, Injector};
use injector_testbed::wait::wait_until;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::Run;
use crate::testbed::{
    Ending, LIMIT, Testbed, accept_with_header, client_ip, config, counted, ending, pass, patient,
    public_address,
};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("source/opens and holds", |testbed, engine| one_against_all(testbed, engine, Banner::Welcome)),
    ("source/is refused by the server, and holds", |testbed, engine| {
        one_against_all(testbed, engine, Banner::Refusal)
    }),
    ("source/limits of a listener, by reload", reload),
    ("source/rate", rate),
    ("source/TLS", tls),
];

/// Another client than the one of [`client_ip`].
const OTHER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 8);

/// What the backend says.
#[derive(Clone, Copy)]
enum Banner {
    /// It serves the client.
    Welcome,
    /// It refuses the client, and closes. The client does not.
    Refusal,
}

/// The first line that the injector sends on a connection.
fn first_line(stream: &mut TcpStream) -> anyhow::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') && stream.read(&mut byte)? == 1 {
        line.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

/// A connection from [`OTHER`].
fn connect_from_other() -> anyhow::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SockAddr::from(SocketAddr::new(OTHER.into(), 0)))?;
    socket.connect_timeout(&public_address().into(), LIMIT)?;
    let stream = TcpStream::from(socket);
    patient(&stream)?;
    Ok(stream)
}

/// Answers every client until `over`, and keeps the connections of those that it serves.
fn answer(backend: &TcpListener, banner: Banner, over: &AtomicBool) -> anyhow::Result<()> {
    backend.set_nonblocking(true)?;
    let mut open = Vec::new();
    while !over.load(Ordering::SeqCst) {
        let Ok((mut stream, _)) = backend.accept() else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        stream.set_nonblocking(false)?;
        patient(&stream)?;
        // The client detects any error here; it may also have gone.
        let answered = stream.read_exact(&mut [0; 28]).and_then(|()| match banner {
            Banner::Welcome => stream.write_all(b"220 hello\r\n"),
            Banner::Refusal => {
                stream.write_all(b"554 no service for you\r\n")?;
                stream.shutdown(Shutdown::Write)
            }
        });
        open.push((stream, answered));
    }
    Ok(())
}

/// One address opens more connections than there are, and keeps them all: without a limit no other is
/// served, with the default one and with a tighter one everybody is.
fn one_against_all(testbed: &Testbed, engine: &str, banner: Banner) -> anyhow::Result<()> {
    let client = &testbed.topology.client;
    client.ip(&["address", "add", &format!("{OTHER}/24"), "dev", "eth0"])?;
    let outcome = compare(testbed, engine, banner);
    client.ip(&["address", "del", &format!("{OTHER}/24"), "dev", "eth0"])?;
    outcome
}

fn compare(testbed: &Testbed, engine: &str, banner: Banner) -> anyhow::Result<()> {
    const PLACES: usize = 40;
    let limits = format!("[limits]\nmax_connections = {PLACES}");
    for (guard, expected) in [
        ("[guard]\nmax_connections_per_source = 1000", (PLACES, 0)),
        ("", (PLACES / 2, GOOD)),
        ("[guard]\nmax_connections_per_source = 10", (10, GOOD)),
    ] {
        let seen = contend(testbed, engine, banner, &format!("{limits}\n{guard}"))?;
        println!("  {seen:?} with {guard:?}");
        ensure!((seen.held, seen.served) == expected, "{guard}: {seen:?}");
    }
    Ok(())
}

/// How many good sessions are tried.
const GOOD: usize = 20;

#[derive(Debug)]
struct Contention {
    /// Places that one address holds.
    held: usize,
    /// Sessions of another address that are served.
    served: usize,
}

fn contend(testbed: &Testbed, engine: &str, banner: Banner, limits: &str) -> anyhow::Result<Contention> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", &format!("\n\n{limits}"))?;
    let over = AtomicBool::new(false);
    let served = |line: &str| line.starts_with("220") || line.starts_with("554");
    std::thread::scope(|scope| {
        let answering = scope.spawn(|| answer(&backend, banner, &over));
        let contend = || -> anyhow::Result<Contention> {
            let mut held = Vec::new();
            let mut refused = 0;
            for _ in 0..60 {
                let mut hog = testbed.client()?;
                let line = first_line(&mut hog)?;
                refused += usize::from(line.starts_with("421 4.7.0 Too many connections from your network"));
                held.push((hog, served(&line)));
            }
            let mut good = 0;
            for _ in 0..GOOD {
                let mut other = testbed.topology.client.run(connect_from_other)??;
                good += usize::from(served(&first_line(&mut other)?));
            }
            if limits.ends_with("_per_source = 10") {
                let rejected = [("reason", "source_connections")];
                counted(&injector, "injector_connections_rejected_total", &rejected, f64::from(50))?;
                ensure!(refused == 50, "{refused} were given the reason");
                let log = injector.log();
                let named = format!(
                    "\"source\":\"{}/32\",\"reason\":\"source_connections\",\"limit\":10",
                    client_ip()
                );
                ensure!(
                    log.matches("their source is at its limit").count() == 1 && log.contains(&named),
                    "{log}"
                );
            }
            Ok(Contention { held: held.iter().filter(|(_, served)| *served).count(), served: good })
        };
        let outcome = contend();
        over.store(true, Ordering::SeqCst);
        answering.join().map_err(|_| anyhow::anyhow!("the backend panicked"))??;
        outcome
    })
}

fn served(testbed: &Testbed, backend: &TcpListener) -> anyhow::Result<(TcpStream, TcpStream)> {
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(backend)?;
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    Ok((client, server))
}

/// A reload sets a listener's limit, and lifts it for a network. A connection that has ended leaves its
/// place.
fn reload(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const TOO_MANY: &[u8] = b"421 4.7.0 Too many connections from your network, try again later\r\n";
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", &format!("\n\n[guard]\n{ADMIN}"))?;
    let load = |own: &str, guard: &str| -> anyhow::Result<()> {
        injector.rewrite(&config(engine, "smtp", &format!("{own}\n\n[guard]\n{guard}\n{ADMIN}")))?;
        injector.command(&["reload"]).map(drop)
    };
    let uncounted = served(testbed, &backend)?;
    load("[listener.guard]\nmax_connections_per_source = 1", "")?;
    let held = served(testbed, &backend)?;
    refused(testbed, TOO_MANY)?;
    drop(held);
    active(&injector, 1.0)?;
    let held = served(testbed, &backend)?;
    refused(testbed, TOO_MANY)?;
    load(
        "[listener.guard]\nmax_connections_per_source = 1",
        &format!("allow = [\"{}/24\"]", client_network()),
    )?;
    let exempt = [served(testbed, &backend)?, served(testbed, &backend)?];
    load("", "max_connections_per_source = 3")?;
    // Of all listeners together those from before count, except the two that were allowed.
    let overall = served(testbed, &backend)?;
    refused(testbed, TOO_MANY)?;
    drop((uncounted, held, exempt, overall));
    active(&injector, 0.0)?;
    let last = [served(testbed, &backend)?, served(testbed, &backend)?, served(testbed, &backend)?];
    refused(testbed, TOO_MANY)?;
    drop(last);
    counted(&injector, "injector_connections_rejected_total", &[("reason", "source_connections")], 4.0)
}

fn client_network() -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, 0)
}

fn refused(testbed: &Testbed, line: &[u8]) -> anyhow::Result<()> {
    let seen = ending(&mut testbed.client()?)?;
    ensure!(seen == Ending::Fin(line.to_vec()), "{seen:?}");
    Ok(())
}

fn active(injector: &Injector, count: f64) -> anyhow::Result<()> {
    let read = || Ok(injector.metrics()?.sum("injector_connections_active", &[]));
    wait_until("open connections", read, |active| (*active - count).abs() < 0.5).map(drop)
}

/// Beyond the burst, a source opens one connection in each interval.
fn rate(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const BURST: usize = 5;
    let backend = testbed.backend()?;
    let guard = format!("[guard]\nmax_rate_per_source = 1\nburst_per_source = {BURST}");
    let injector = testbed.injector(engine, "smtp", &format!("\n\n{guard}"))?;
    let over = AtomicBool::new(false);
    let (admitted, refused, took) = std::thread::scope(|scope| {
        let answering = scope.spawn(|| answer(&backend, Banner::Welcome, &over));
        let connect = || -> anyhow::Result<_> {
            let start = Instant::now();
            let (mut admitted, mut refused) = (0, 0);
            for _ in 0..4 * BURST {
                let line = first_line(&mut testbed.client()?)?;
                admitted += usize::from(line == "220 hello\r\n");
                let reply = "421 4.7.0 Too many new connections from your network, try again later\r\n";
                refused += usize::from(line == reply);
            }
            Ok((admitted, refused, start.elapsed()))
        };
        let outcome = connect();
        over.store(true, Ordering::SeqCst);
        answering.join().map_err(|_| anyhow::anyhow!("the backend panicked"))??;
        outcome
    })?;
    // The machine may be slow.
    let later = usize::try_from(took.as_secs()).context("too slow")? + 1;
    ensure!((BURST..=BURST + later).contains(&admitted), "{admitted} admitted in {took:?}");
    ensure!(admitted + refused == 4 * BURST, "{admitted} admitted, {refused} refused");
    let rejected = [("reason", "source_rate")];
    counted(&injector, "injector_connections_rejected_total", &rejected, f64::from(u32::try_from(refused)?))
}

/// Inside TLS there is no line that a client would understand.
fn tls(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "imaps", "\n\n[guard]\nmax_connections_per_source = 1")?;
    let mut client = testbed.client()?;
    client.write_all(b"\x16\x03\x01 hello")?;
    let (mut server, _, first) = accept_with_header(&backend)?;
    ensure!(first == b"\x16\x03\x01 hello", "{first:?}");
    if let Some(mut second) = testbed.client_unless_reset()? {
        let seen = ending(&mut second)?;
        ensure!(matches!(&seen, Ending::Reset(bytes) if bytes.is_empty()), "{seen:?}");
    }
    pass(&mut server, &mut client, b"goes on")?;
    counted(&injector, "injector_connections_rejected_total", &[("reason", "source_connections")], 1.0)
}
