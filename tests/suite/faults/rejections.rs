//! Clients that are rejected: by a protocol-level reply in clear text, by a reset in TLS, each
//! counted by reason.

use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::ensure;
use injector_testbed::daemon::Injector;
use injector_testbed::netns::EDGE_INSIDE;
use injector_testbed::wait::wait_until;

use crate::Run;
use crate::testbed::{
    Ending, Testbed, accept, accept_with_header, client_ip, counted, ended, ending, finished, pass,
};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("backend refuses/smtp", |testbed, engine| backend_refuses(testbed, engine, "smtp", Some("421 4.3.2 "))),
    ("backend refuses/imap", |testbed, engine| backend_refuses(testbed, engine, "imap", Some("* BYE "))),
    ("backend refuses/pop3", |testbed, engine| backend_refuses(testbed, engine, "pop3", Some("-ERR "))),
    ("backend refuses/submissions", |testbed, engine| backend_refuses(testbed, engine, "submissions", None)),
    ("backend silent", backend_silent),
    ("backend unresolved", backend_unresolved),
    ("backend closes before its banner", backend_closes_early),
    ("backend resets before its banner", backend_resets_early),
    ("the next backend is tried", next_backend),
    ("the header is read as commands", header_misread),
    ("the header is read as commands, after the banner", header_misread_later),
    ("no source port is left", no_source_port),
    ("source addresses take turns", source_addresses),
    ("too many connections", too_many),
    ("a full backend", full_backend),
    ("forged header/v2", |testbed, engine| {
        forged(testbed, engine, b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", 64)
    }),
    ("forged header/v1", |testbed, engine| {
        forged(testbed, engine, b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n", 64)
    }),
    ("forged header/byte by byte", |testbed, engine| {
        forged(testbed, engine, b"\r\n\r\n\0\r\nQUIT\n\x21\x11", 1)
    }),
    ("forged header/in front of TLS", forged_tls),
    ("almost a header is not a header", almost_forged),
];

fn refused(testbed: &Testbed, line: Option<&str>) -> anyhow::Result<()> {
    let Some(mut client) = testbed.client_unless_reset()? else {
        ensure!(line.is_none(), "reset where {line:?} was expected");
        return Ok(());
    };
    match (line, ending(&mut client)?) {
        (Some(start), Ending::Fin(seen)) => {
            let seen = String::from_utf8_lossy(&seen).into_owned();
            ensure!(
                seen.starts_with(start) && seen.ends_with("\r\n"),
                "{seen:?} where {start:?} was expected"
            );
        }
        (None, Ending::Reset(seen)) => ensure!(seen.is_empty(), "bytes before the reset: {seen:?}"),
        (line, ending) => anyhow::bail!("{ending:?} where {line:?} was expected"),
    }
    Ok(())
}

fn backend_refuses(
    testbed: &Testbed,
    engine: &str,
    protocol: &str,
    line: Option<&str>,
) -> anyhow::Result<()> {
    let injector = testbed.injector(engine, protocol, "")?;
    refused(testbed, line)?;
    ended(&injector, "backend_refused")?;
    counted(&injector, "injector_connections_rejected_total", &[("reason", "backend_refused")], 1.0)
}

fn backend_silent(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    // A neighbour that does not exist causes three seconds of silence.
    let extra = "backends = [\"10.25.0.77:25\"]\n[listener.timeouts]\nconnect = \"300ms\"";
    let injector = testbed.injector(engine, "smtp", extra)?;
    refused(testbed, Some("421 4.3.2 "))?;
    ended(&injector, "connect_timeout")?;
    counted(&injector, "injector_connections_rejected_total", &[("reason", "connect_timeout")], 1.0)
}

fn backend_unresolved(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let injector = testbed.injector(engine, "smtp", "backends = [\"nowhere.invalid:25\"]")?;
    refused(testbed, Some("421 4.3.2 "))?;
    ended(&injector, "backend_unresolved")?;
    counted(&injector, "injector_connections_rejected_total", &[("reason", "backend_unresolved")], 1.0)
}

fn backend_closes_early(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    let closing = std::thread::spawn(move || accept_with_header(&backend).map(drop));
    refused(testbed, Some("421 4.3.2 "))?;
    closing.join().map_err(|_| anyhow::anyhow!("the backend panicked"))??;
    ended(&injector, "no_banner")?;
    counted(&injector, "injector_connections_rejected_total", &[("reason", "no_banner")], 1.0)
}

fn backend_resets_early(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "imap", "")?;
    // Closing with the header unread causes a reset.
    let closing = std::thread::spawn(move || accept(&backend).map(drop));
    refused(testbed, Some("* BYE "))?;
    closing.join().map_err(|_| anyhow::anyhow!("the backend panicked"))??;
    ended(&injector, "no_banner")?;
    Ok(())
}

fn next_backend(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let extra = "backends = [\"10.25.0.2:12599\", \"10.25.0.2:12500\"]";
    let injector = testbed.injector(engine, "smtp", extra)?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut client, b"220 second\r\n")?;
    drop((client, server));
    let sessions = finished(&injector, 1)?;
    ensure!(sessions[0].field("backend").as_deref() == Some("10.25.0.2:12500"), "{sessions:?}");
    Ok(())
}

/// A standard port: it answers the lines of the header. The client gets a temporary failure alone.
fn header_misread(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", DEFAULT_ENROLMENT)?;
    let mut client = testbed.client()?;
    let mut server = accept(&backend)?;
    server.write_all(b"220 mail ESMTP\r\n500 5.5.2 Error: bad syntax\r\n221 2.0.0 Bye\r\n")?;
    check_misread(&injector, &mut client)
}

fn header_misread_later(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", DEFAULT_ENROLMENT)?;
    let mut client = testbed.client()?;
    let mut server = accept(&backend)?;
    pass(&mut server, &mut client, b"220 mail ESMTP\r\n")?;
    server.write_all(b"502 5.5.2 Error: command not recognized\r\n")?;
    check_misread(&injector, &mut client)
}

/// After this many messages, the kernel forwards: its bytes are not seen.
const DEFAULT_ENROLMENT: &str = "\n\n[splice]\n";

fn check_misread(injector: &Injector, client: &mut TcpStream) -> anyhow::Result<()> {
    let line = b"421 4.3.2 Mail service not available, try again later\r\n";
    let (seen, expected) = (ending(client)?, Ending::Fin(line.to_vec()));
    ensure!(seen == expected, "{seen:?} in place of {expected:?}");
    let session = ended(injector, "header_misread")?;
    ensure!(session.field("error").is_some_and(|error| error.starts_with("50")), "{session:?}");
    counted(injector, "injector_connections_rejected_total", &[("reason", "header_misread")], 1.0)?;
    counted(injector, "injector_backend_headers_misread_total", &[], 1.0)?;
    let log = injector.log();
    ensure!(log.contains("port 12500 is not a PROXY port"), "{log}");
    let (status, detail) = injector.readiness()?;
    ensure!(status == 200 && detail.contains("reads the PROXY header as commands"), "{status} {detail}");
    Ok(())
}

/// A range that no other trial has used, outside of the default one: a port may be in TIME_WAIT for a minute.
fn four_ports(engine: &str, trial: usize) -> &'static str {
    const RANGES: [[&str; 2]; 2] = [["20000 20003", "20100 20103"], ["20200 20203", "20300 20303"]];
    RANGES[usize::from(engine == "relay")][trial]
}

/// Every port of the edge host is in use towards the backend.
fn no_source_port(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const RANGE: &str = "net/ipv4/ip_local_port_range";
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    testbed.topology.edge.sysctl(RANGE, four_ports(engine, 0))?;
    let hold = || -> anyhow::Result<()> {
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push((testbed.client()?, accept_with_header(&backend)?));
        }
        refused(testbed, Some("421 4.3.2 "))?;
        let session = ended(&injector, "no_source_ports")?;
        let error = session.field("error").unwrap_or_default();
        ensure!(error.contains("no source port of this host is left"), "{session:?}");
        counted(&injector, "injector_connections_rejected_total", &[("reason", "no_source_ports")], 1.0)
    };
    let outcome = hold();
    testbed.topology.edge.sysctl(RANGE, "32768 60999")?;
    outcome
}

/// With a second source address there are twice as many.
fn source_addresses(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const RANGE: &str = "net/ipv4/ip_local_port_range";
    let backend = testbed.backend()?;
    let (first, second) = (EDGE_INSIDE.v4, "10.25.0.9");
    let edge = &testbed.topology.edge;
    edge.ip(&["addr", "add", &format!("{second}/32"), "dev", "lo"])?;
    testbed.topology.mail.ip(&["route", "add", second, "via", &first.to_string()])?;
    let serve = || -> anyhow::Result<()> {
        let _injector =
            testbed.injector(engine, "smtp", &format!("source_addresses = [\"{first}\", \"{second}\"]"))?;
        edge.sysctl(RANGE, four_ports(engine, 1))?;
        let mut held = Vec::new();
        for _ in 0..8 {
            held.push((testbed.client()?, accept_with_header(&backend)?));
        }
        let sources: Vec<_> =
            held.iter().map(|(_, (server, ..))| server.peer_addr()).collect::<Result<_, _>>()?;
        let from = |ip: &str| sources.iter().filter(|source| source.ip().to_string() == ip).count();
        ensure!((from(&first.to_string()), from(second)) == (4, 4), "{sources:?}");
        refused(testbed, Some("421 4.3.2 "))
    };
    let outcome = serve();
    edge.sysctl(RANGE, "32768 60999")?;
    testbed.topology.mail.ip(&["route", "del", second])?;
    edge.ip(&["addr", "del", &format!("{second}/32"), "dev", "lo"])?;
    outcome
}

fn too_many(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let limit = "\n\n[limits]\nmax_connections = 1\n\n[log]\nlevel = \"debug\"";
    let injector = testbed.injector(engine, "smtp", limit)?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut client, b"220 one\r\n")?;
    refused(testbed, Some("421 4.3.2 Too many"))?;
    counted(&injector, "injector_connections_rejected_total", &[("reason", "too_many_connections")], 1.0)?;
    counted(&injector, "injector_connections_active", &[], 1.0)?;
    let log = injector.log();
    let has = |level: &str, text: &str| {
        let level = format!("\"level\":\"{level}\"");
        log.lines().any(|line| line.contains(&level) && line.contains(text))
    };
    let busiest = format!("\"busiest_source\":\"{}/32\",\"sessions_of_source\":1", client_ip());
    ensure!(has("WARN", &busiest), "{log}");
    let rejected = format!("\"message\":\"connection rejected\",\"client\":\"{}:", client_ip());
    ensure!(has("DEBUG", &rejected), "{log}");
    drop((client, server));
    finished(&injector, 1)?;
    // The connection limit has capacity again.
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut client, b"220 two\r\n")
}

/// One client waits until the backend has a place, the next one does not wait, and the last one waits in vain.
fn full_backend(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const QUEUE: Duration = Duration::from_millis(600);
    let backend = testbed.backend()?;
    let extra = "backends = [{ address = \"10.25.0.2:12500\", max_connections = 1 }]\nmax_queue = 1\n\
                 [listener.timeouts]\nqueue = \"600ms\"";
    let injector = testbed.injector(engine, "smtp", extra)?;
    let mut first = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut first, b"220 first\r\n")?;
    let mut second = testbed.client()?;
    wait_until(
        "the queue",
        || Ok(injector.metrics()?.sum("injector_backend_queue", &[])),
        |queue| *queue > 0.5,
    )?;
    refused(testbed, Some("421 4.3.2 Too many"))?;
    drop((first, server));
    let (mut server, header, _) = accept_with_header(&backend)?;
    ensure!(header.source == second.local_addr()?, "{header:?}");
    pass(&mut server, &mut second, b"220 second\r\n")?;
    let start = Instant::now();
    refused(testbed, Some("421 4.3.2 Too many"))?;
    ensure!(start.elapsed() >= QUEUE, "refused after {:?}", start.elapsed());
    counted(&injector, "injector_connections_rejected_total", &[("reason", "backend_full")], 2.0)
}

/// The backend reads the injector's header and nothing from the client, which is reset.
fn forged(testbed: &Testbed, engine: &str, bytes: &[u8], piece: usize) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    let mut client = testbed.client()?;
    let (mut server, header, rest) = accept_with_header(&backend)?;
    ensure!(header.source == client.local_addr()? && rest.is_empty(), "{header:?} {rest:?}");
    let mut reset = false;
    for piece in bytes.chunks(piece) {
        // A reset that was reported to the writer is not reported to the reader again.
        match client.write_all(piece) {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => reset = true,
            Err(_) if reset => break,
            written => written?,
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    ensure!(reset || ending(&mut client)? == Ending::Reset(Vec::new()), "the forging client was not reset");
    ensure!(ending(&mut server)? == Ending::Reset(Vec::new()), "the backend read something forged");
    ended(&injector, "forged_header")?;
    counted(&injector, "injector_connections_rejected_total", &[("reason", "forged_header")], 1.0)
}

/// If the client speaks first, the backend does not even get a header.
fn forged_tls(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "imaps", "")?;
    let mut client = testbed.client()?;
    let mut server = accept(&backend)?;
    client.write_all(b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c")?;
    ensure!(ending(&mut client)? == Ending::Reset(Vec::new()), "the forging client was not reset");
    ensure!(ending(&mut server)? == Ending::Reset(Vec::new()), "the backend read something");
    ended(&injector, "forged_header")?;
    Ok(())
}

fn almost_forged(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend: TcpListener = testbed.backend()?;
    let _injector = testbed.injector(engine, "smtp", "")?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    client.write_all(b"PRO")?;
    std::thread::sleep(std::time::Duration::from_millis(20));
    client.write_all(b"FIT\r\n")?;
    crate::testbed::expect(&mut server, b"PROFIT\r\n")
}
