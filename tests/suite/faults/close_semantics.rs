//! How connections end when both sides, or their processes, close at unfavourable moments.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use injector_testbed::daemon::Injector;
use socket2::SockRef;

use crate::Run;
use crate::killable_backend::{Behaviour, KillableBackend, sent};
use crate::testbed::{
    Ending, Testbed, accept_with_header, backend_address, ended, ending, expect, finished, pass, patient,
};
use crate::transfers::{introduced, joined, pattern, receive_all, send_all};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("killed/backend process in an upload", killed_in_upload),
    ("killed/backend process in a download, commands unread", killed_in_download),
    ("killed/backend process in a download, nothing unread", killed_orderly),
    ("close/both sides at once", crossing),
    ("close/FIN and last data in one segment", corked),
    ("close/client before the banner", before_the_banner),
    ("close/backend with its banner", with_the_banner),
    ("close/forwarded within 5 ms", prompt),
];

/// Maximum time until the client is notified, in the median of [`KILLS`].
const KNOWS_WITHIN: Duration = Duration::from_millis(100);
const KILLS: usize = 5;

/// A client that has exchanged the first messages with a killable backend.
fn with_backend_process(
    testbed: &Testbed,
    behaviour: Behaviour,
) -> anyhow::Result<(KillableBackend, TcpStream)> {
    let backend_process = KillableBackend::start(testbed, behaviour)?;
    let mut client = testbed.client()?;
    expect(&mut client, b"220 hello\r\n")?;
    client.write_all(b"EHLO client\r\n")?;
    expect(&mut client, b"250 go on\r\n")?;
    Ok((backend_process, client))
}

/// Kills the backend process several times while `transfer` runs, which returns how the client saw
/// the end. It must be a reset every time.
fn kill_during(
    testbed: &Testbed,
    injector: &Injector,
    behaviour: Behaviour,
    transfer: fn(&mut TcpStream) -> anyhow::Result<ErrorKind>,
) -> anyhow::Result<()> {
    let mut took = Vec::new();
    for _ in 0..KILLS {
        let (mut backend_process, mut client) = with_backend_process(testbed, behaviour)?;
        let (end, after) = std::thread::scope(|scope| {
            let transferring = scope.spawn(move || (transfer(&mut client), Instant::now()));
            // In the middle: megabytes have been transferred.
            std::thread::sleep(Duration::from_millis(100));
            let killed = Instant::now();
            backend_process.kill()?;
            let (end, at) = transferring.join().map_err(|_| anyhow::anyhow!("panicked"))?;
            anyhow::Ok((end?, at.saturating_duration_since(killed)))
        })?;
        ensure!(end == ErrorKind::ConnectionReset, "the client saw {end:?} after {after:?}");
        took.push(after);
    }
    took.sort_unstable();
    println!("  the client knew after {took:?}");
    ensure!(
        took.get(KILLS / 2).is_some_and(|median| *median <= KNOWS_WITHIN),
        "the client knew after {took:?}"
    );
    for session in finished(injector, KILLS)? {
        ensure!(session.field("reason").as_deref() == Some("backend_reset"), "{session:?}");
    }
    Ok(())
}

/// Sends until an error. After an end of file the error would be EPIPE (tcp_reset,
/// net/ipv4/tcp_input.c).
fn upload(client: &mut TcpStream) -> anyhow::Result<ErrorKind> {
    let bytes = pattern(29, 1 << 20);
    loop {
        if let Err(error) = client.write_all(&bytes) {
            return Ok(error.kind());
        }
    }
}

/// Reads until an error or an end of file, which is returned as an unexpected end; the bytes must
/// be the ones sent.
fn download(client: &mut TcpStream) -> anyhow::Result<ErrorKind> {
    let mut buffer = vec![0; 64 << 10];
    // Repeated from the start, so that every read is a slice of it.
    let (period, mut sent, mut at) = (sent().len(), sent().repeat(2), 0);
    sent.truncate(period + buffer.len());
    loop {
        match client.read(&mut buffer) {
            Ok(0) => return Ok(ErrorKind::UnexpectedEof),
            Ok(count) => {
                ensure!(buffer.get(..count) == sent.get(at..at + count), "other bytes came than were sent");
                at = (at + count) % period;
            }
            Err(error) => return Ok(error.kind()),
        }
    }
}

fn download_with_commands_unread(client: &mut TcpStream) -> anyhow::Result<ErrorKind> {
    client.write_all(b"NOOP\r\n")?;
    download(client)
}

/// The server is killed with unread data: its kernel resets, and the client is notified at once.
fn killed_in_upload(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let injector = testbed.injector(engine, "smtp", "")?;
    kill_during(testbed, &injector, Behaviour::Read, upload)?;
    check_planes(&injector, engine, "spliced_to_backend")
}

/// The same with bulk in the other direction: unread commands make the server's kernel reset.
fn killed_in_download(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let injector = testbed.injector(engine, "smtp", "")?;
    kill_during(testbed, &injector, Behaviour::Send, download_with_commands_unread)?;
    check_planes(&injector, engine, "spliced_to_client")
}

fn check_planes(injector: &Injector, engine: &str, spliced: &str) -> anyhow::Result<()> {
    for session in finished(injector, KILLS)? {
        ensure!((session.number(spliced) > Some(0)) == (engine == "splice"), "{session:?}");
    }
    Ok(())
}

/// A killed server that has read everything: its kernel sends a FIN after all written data, as for
/// any process. A proxy cannot know better; the client sees the same as without one.
fn killed_orderly(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let direct = testbed.topology.edge.run(|| -> anyhow::Result<ErrorKind> {
        let mut backend_process = KillableBackend::start(testbed, Behaviour::Send)?;
        let mut client = TcpStream::connect(backend_address())?;
        patient(&client)?;
        client.write_all(b"in place of a header")?;
        expect(&mut client, b"220 hello\r\n")?;
        client.write_all(b"EHLO client\r\n")?;
        expect(&mut client, b"250 go on\r\n")?;
        backend_process.kill()?;
        download(&mut client)
    })??;
    let injector = testbed.injector(engine, "smtp", "")?;
    let (mut backend_process, mut client) = with_backend_process(testbed, Behaviour::Send)?;
    backend_process.kill()?;
    let through = download(&mut client)?;
    ensure!(through == direct && direct == ErrorKind::UnexpectedEof, "{through:?}, directly {direct:?}");
    drop(client);
    ended(&injector, "backend_closed")?;
    Ok(())
}

/// The FINs cross, with data in flight in both directions: each side gets every byte and the
/// other's FIN.
fn crossing(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const SIZES: [usize; 6] = [0, 1, 1_448, 70_000, 400_000, 3_000_000];
    const ROUNDS: usize = 5;
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    for size in SIZES.repeat(ROUNDS) {
        let (client, server) = introduced(testbed, &backend)?;
        let (up, down) = (pattern(31, size), pattern(37, size));
        let start = Arc::new(Barrier::new(2));
        let send = |stream: &TcpStream, bytes: &[u8]| {
            start.wait();
            send_all(stream, bytes)
        };
        std::thread::scope(|scope| {
            let tasks = [
                scope.spawn(|| send(&client, &up)),
                scope.spawn(|| send(&server, &down)),
                scope.spawn(|| receive_all(&server, &up)),
                scope.spawn(|| receive_all(&client, &down)),
            ];
            tasks.into_iter().try_for_each(|task| task.join().map_err(|_| anyhow::anyhow!("panicked"))?)
        })
        .with_context(|| format!("{size} bytes each way; logged:\n{}", injector.log()))?;
    }
    for session in finished(&injector, SIZES.len() * ROUNDS)? {
        let end = session.field("reason").unwrap_or_default();
        ensure!(["client_closed", "backend_closed"].contains(&end.as_str()), "{session:?}");
    }
    Ok(())
}

/// Sends data and a FIN in one segment.
pub(crate) fn send_with_fin(stream: &TcpStream, bytes: &[u8]) -> anyhow::Result<()> {
    let sent = SockRef::from(stream).send_with_flags(bytes, libc::MSG_MORE)?;
    ensure!(sent == bytes.len(), "{sent} of {} bytes were taken", bytes.len());
    Ok(stream.shutdown(Shutdown::Write)?)
}

/// The program handles a segment with data and FIN.
fn corked(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    let sizes = [1, 100, 1_448, 5_000, 60_000];
    for size in sizes {
        let (client, server) = introduced(testbed, &backend)?;
        let bytes = pattern(41, size);
        send_with_fin(&client, &bytes)?;
        receive_all(&server, &bytes).with_context(|| format!("{size} bytes to the backend"))?;
        send_with_fin(&server, &bytes)?;
        receive_all(&client, &bytes).with_context(|| format!("{size} bytes to the client"))?;
    }
    for session in finished(&injector, sizes.len())? {
        ensure!(session.field("reason").as_deref() == Some("client_closed"), "{session:?}");
    }
    Ok(())
}

/// A client that has sent everything and closed before the backend accepts: nothing is enrolled.
fn before_the_banner(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    for size in [13, 1_448, 50_000] {
        let backend = testbed.backend()?;
        let injector = testbed.injector(engine, "smtp", "")?;
        let mut client = testbed.client()?;
        let early = pattern(43, size);
        send_with_fin(&client, &early)?;
        std::thread::sleep(Duration::from_millis(20));
        let (mut server, _, mut seen) = accept_with_header(&backend)?;
        server.read_to_end(&mut seen)?;
        ensure!(seen == early, "{} of {size} early bytes", seen.len());
        for answer in [&b"220 late\r\n"[..], b"221 bye\r\n"] {
            pass(&mut server, &mut client, answer)?;
        }
        drop(server);
        ensure!(ending(&mut client)? == Ending::Fin(Vec::new()), "the client did not get the end");
        ended(&injector, "client_closed")?;
    }
    Ok(())
}

/// A backend that sends its FIN with its banner; what the client sends afterwards still reaches it.
fn with_the_banner(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    send_with_fin(&server, b"554 go away\r\n")?;
    ensure!(ending(&mut client)? == Ending::Fin(b"554 go away\r\n".to_vec()), "not the banner and a FIN");
    for words in [&b"QUIT\r\n"[..], b"really\r\n"] {
        pass(&mut client, &mut server, words)?;
    }
    drop(client);
    ensure!(ending(&mut server)? == Ending::Fin(Vec::new()), "the backend did not get the end");
    ended(&injector, "backend_closed")?;
    Ok(())
}

/// Time from one side's FIN to the other side's end of file, on idle connections: the median, and
/// repeated if another program used the processors.
fn prompt(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const CONNECTIONS: usize = 50;
    const TRIES: usize = 4;
    const WITHIN: Duration = Duration::from_millis(5);
    let (_injector, ..) = joined(testbed, engine, "")?;
    let mut medians = Vec::new();
    for _ in 0..TRIES {
        let backend = testbed.backend()?;
        let mut took = [Vec::new(), Vec::new()];
        for _ in 0..CONNECTIONS {
            let (mut client, mut server) = introduced(testbed, &backend)?;
            took[0].push(fin_passes(&client, &mut server)?);
            took[1].push(fin_passes(&server, &mut client)?);
        }
        let median = took.map(|mut took| {
            took.sort_unstable();
            took.get(CONNECTIONS / 2).copied().unwrap_or(Duration::MAX)
        });
        println!("  median to the backend {:?}, to the client {:?}", median[0], median[1]);
        if median.iter().all(|median| *median < WITHIN) {
            return Ok(());
        }
        medians.push(median);
    }
    bail!("medians of {CONNECTIONS}, to the backend and to the client: {medians:?}")
}

fn fin_passes(from: &TcpStream, to: &mut TcpStream) -> anyhow::Result<Duration> {
    let start = Instant::now();
    from.shutdown(Shutdown::Write)?;
    ensure!(to.read(&mut [0])? == 0, "bytes in place of a FIN");
    Ok(start.elapsed())
}
