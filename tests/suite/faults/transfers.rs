//! Payload, complete and in order: both directions, half-closes, resets.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use injector_testbed::sockets::{AT_ONCE, LIMIT};
use injector_testbed::wait::wait_until;
use socket2::SockRef;

use crate::Run;
use crate::peer_timeouts::{Side, Silence};
use crate::testbed::{Ending, Testbed, accept_with_header, ended, ending, expect, finished, pass};

/// Enough to fill every buffer on the way many times.
const BULK: usize = 24 << 20;

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("transfer/both directions at once", |testbed, engine| both_ways(testbed, engine, "")),
    ("transfer/both directions at once, low water marks", |testbed, engine| {
        both_ways(testbed, engine, SMALL_MARKS)
    }),
    ("transfer/a long first payload", large_first_payload),
    ("transfer/client closes first", client_half_closes),
    ("transfer/backend closes first", backend_half_closes),
    ("transfer/backend sends its last reply and closes", last_reply),
    ("transfer/byte by byte", byte_by_byte),
    ("stalled/backend reads nothing for a while", |testbed, engine| {
        stalled(testbed, engine, Reader::Backend)
    }),
    ("stalled/client reads nothing for a while", |testbed, engine| stalled(testbed, engine, Reader::Client)),
    ("stalled/resumed by the kernel", resumed),
    ("stalled/the sender closes meanwhile", stalled_fin),
    ("stalled/the reader resets", stalled_reader_resets),
    ("transfer/backend resets", backend_resets),
    ("transfer/client resets", client_resets),
    ("idle/aborted after the timeout", idle),
    ("idle/payload keeps it alive", kept_alive),
    ("idle/half closed", half_closed_idle),
];

/// Trials that only the splice engine has.
pub(crate) const SPLICE_TRIALS: &[(&str, Run)] = &[
    ("transfer/by the kernel when it pays off", enrolled_when_it_pays),
    ("transfer/by the kernel once the backend keeps up", enrolled_once_it_keeps_up),
];

/// A client and a backend that have exchanged their first messages.
pub(crate) fn joined(
    testbed: &Testbed,
    engine: &str,
    extra: &str,
) -> anyhow::Result<(injector_testbed::daemon::Injector, TcpStream, TcpStream)> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", extra)?;
    let (client, server) = introduced(testbed, &backend)?;
    Ok((injector, client, server))
}

/// The same with a running injector.
pub(crate) fn introduced(testbed: &Testbed, backend: &TcpListener) -> anyhow::Result<(TcpStream, TcpStream)> {
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(backend)?;
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    pass(&mut client, &mut server, b"EHLO client\r\n")?;
    Ok((client, server))
}

/// Bytes that repeat only after 251 × 256: a lost, duplicated or swapped piece is detected.
pub(crate) fn pattern(seed: usize, len: usize) -> Vec<u8> {
    let byte = |at: usize| {
        let [low, ..] = ((at + seed) % 251).to_le_bytes();
        let [_, high, ..] = at.to_le_bytes();
        low ^ high
    };
    let period: Vec<u8> = (0..251 * 256).map(byte).collect();
    let mut bytes = period.repeat(len.div_ceil(period.len()));
    bytes.truncate(len);
    bytes
}

pub(crate) fn send_all(mut stream: &TcpStream, bytes: &[u8]) -> anyhow::Result<()> {
    stream.write_all(bytes).context("sending")?;
    Ok(stream.shutdown(Shutdown::Write)?)
}

pub(crate) fn receive_all(mut stream: &TcpStream, bytes: &[u8]) -> anyhow::Result<()> {
    let mut seen = Vec::with_capacity(bytes.len());
    stream.read_to_end(&mut seen).with_context(|| format!("after {} bytes", seen.len()))?;
    if seen == bytes {
        return Ok(());
    }
    let same = seen.iter().zip(bytes).take_while(|(seen, sent)| seen == sent).count();
    bail!("{} of {} bytes, the same up to {same}", seen.len(), bytes.len());
}

/// The daemon's default rules of enrolment.
const DEFAULTS: &str = "\n\n[splice]\n";

/// With these water marks every direction is paused early, so that the data path changes in the
/// middle of the stream.
const SMALL_MARKS: &str = "\n\n[splice]\nhigh_water = 65536\nlow_water = 16384\n\
                           enrol_after_messages = 1";

fn both_ways(testbed: &Testbed, engine: &str, marks: &str) -> anyhow::Result<()> {
    let (injector, client, server) = joined(testbed, engine, marks)?;
    let (up, down) = (pattern(1, BULK), pattern(7, BULK));
    std::thread::scope(|scope| {
        let tasks = [
            scope.spawn(|| send_all(&client, &up)),
            scope.spawn(|| receive_all(&server, &up)),
            scope.spawn(|| send_all(&server, &down)),
            scope.spawn(|| receive_all(&client, &down)),
        ];
        tasks.into_iter().try_for_each(|task| task.join().map_err(|_| anyhow::anyhow!("panicked"))?)
    })
    .with_context(|| format!("logged:\n{}", injector.log()))?;
    let sessions = finished(&injector, 1)?;
    let session = sessions.first().context("no line")?;
    ensure!(
        ["client_closed", "backend_closed"].contains(&session.field("reason").unwrap_or_default().as_str()),
        "{session:?}"
    );
    let bulk = BULK as u64;
    ensure!(session.number("bytes_to_backend") == Some(bulk + 13), "{session:?}");
    ensure!(session.number("bytes_to_client") == Some(bulk + 11), "{session:?}");
    // The share of the kernel depends on which side keeps up. After the kernel, no pipe carries
    // bytes.
    for (plane, of) in [("spliced", "splice"), ("piped", "relay")] {
        for direction in ["to_backend", "to_client"] {
            let carried = session.number(&format!("{plane}_{direction}")).unwrap_or_default();
            ensure!((carried > 0) == (engine == of) && carried <= bulk, "{plane}: {session:?}");
        }
    }
    Ok(())
}

/// By default a direction is enrolled after 16 payloads and no sooner; then the kernel forwards
/// even bulk.
fn enrolled_when_it_pays(testbed: &Testbed, _engine: &str) -> anyhow::Result<()> {
    const ENROL_AFTER: u64 = 16;
    for messages in [ENROL_AFTER - 1, ENROL_AFTER + 4] {
        let (injector, mut client, mut server) = joined(testbed, "splice", DEFAULTS)?;
        for _ in 1..messages {
            pass(&mut server, &mut client, b"250 ok\r\n")?;
            pass(&mut client, &mut server, b"NOOP\r\n")?;
        }
        let bulk = pattern(3, BULK);
        std::thread::scope(|scope| {
            let sending = scope.spawn(|| send_all(&client, &bulk));
            receive_all(&server, &bulk)?;
            sending.join().map_err(|_| anyhow::anyhow!("panicked"))?
        })?;
        drop(server);
        let sessions = finished(&injector, 1)?;
        let session = sessions.first().context("no line")?;
        let carried = |field: &str| session.number(field).unwrap_or_default();
        let (enrolled, piped) = (carried("spliced_to_backend") > 0, carried("piped_to_backend") > 0);
        ensure!((enrolled, piped) == (messages >= ENROL_AFTER, messages < ENROL_AFTER), "{session:?}");
        ensure!((carried("spliced_to_client") > 0) == (messages > ENROL_AFTER), "{session:?}");
        drop(injector);
    }
    Ok(())
}

/// The backend acknowledges nothing while it is time to enrol the direction.
fn enrolled_once_it_keeps_up(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const MESSAGES: usize = 20;
    let marks = "\n\n[splice]\nlow_water = 2000\nenrol_after_messages = 15";
    let (injector, mut client, mut server) = joined(testbed, engine, marks)?;
    let enrolled = || Ok(injector.metrics()?.sum("injector_enrolments_total", &[]));
    let silence = Silence::of_side(testbed, Side::Backend)?;
    let mut sent = Vec::new();
    for number in 0..MESSAGES {
        let message = pattern(number, 500);
        client.write_all(&message)?;
        sent.extend(message);
        // Each is read alone.
        std::thread::sleep(Duration::from_millis(5));
    }
    let early = enrolled()?;
    ensure!(early < 0.5, "{early} directions were enrolled although the backend acknowledges nothing");
    drop(silence);
    expect(&mut server, &sent)?;
    // With a message of the client's after the backend's acknowledgement.
    let next = || {
        pass(&mut client, &mut server, b"NOOP\r\n")?;
        enrolled()
    };
    wait_until("enrolments", next, |enrolled| *enrolled > 0.5)?;
    Ok(())
}

/// More than one read takes, before enrolment: no segment is carried by both data paths.
fn large_first_payload(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    for len in [65_536, 65_537, 100_000, 400_000] {
        let backend = testbed.backend()?;
        let injector = testbed.injector(engine, "imaps", "")?;
        let client = testbed.client()?;
        let bytes = pattern(19, len);
        std::thread::scope(|scope| {
            let sending = scope.spawn(|| send_all(&client, &bytes));
            let (server, _, mut seen) = accept_with_header(&backend)?;
            (&server).read_to_end(&mut seen)?;
            let same = seen.iter().zip(&bytes).take_while(|(seen, sent)| seen == sent).count();
            ensure!(seen.len() == len && same == len, "{} of {len} bytes, the same up to {same}", seen.len());
            sending.join().map_err(|_| anyhow::anyhow!("panicked"))?
        })?;
        drop((client, backend, injector));
    }
    Ok(())
}

/// The backend responds late to a client that has closed its sending side.
fn client_half_closes(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, mut client, mut server) = joined(testbed, engine, "")?;
    client.write_all(b"DATA and more\r\n")?;
    client.shutdown(Shutdown::Write)?;
    ensure!(
        ending(&mut server)? == Ending::Fin(b"DATA and more\r\n".to_vec()),
        "the backend did not get it all"
    );
    std::thread::sleep(Duration::from_millis(100));
    for _ in 0..3 {
        pass(&mut server, &mut client, b"250 taken\r\n")?;
    }
    drop(server);
    ensure!(ending(&mut client)? == Ending::Fin(Vec::new()), "the client did not get the end");
    ended(&injector, "client_closed")?;
    Ok(())
}

fn backend_half_closes(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, mut client, mut server) = joined(testbed, engine, "")?;
    server.write_all(b"221 bye\r\n")?;
    server.shutdown(Shutdown::Write)?;
    ensure!(ending(&mut client)? == Ending::Fin(b"221 bye\r\n".to_vec()), "the client did not get it all");
    std::thread::sleep(Duration::from_millis(100));
    pass(&mut client, &mut server, b"last words\r\n")?;
    drop(client);
    ensure!(ending(&mut server)? == Ending::Fin(Vec::new()), "the backend did not get the end");
    ended(&injector, "backend_closed")?;
    Ok(())
}

/// A closed backend responds to further data with a reset (TLS clients send close_notify). What it
/// sent before still reaches the client, however slowly the client reads.
fn last_reply(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const LAST: usize = 300_000;
    let (injector, mut client, mut server) = joined(testbed, engine, "")?;
    let last = pattern(3, LAST);
    server.write_all(&last)?;
    drop(server);
    std::thread::sleep(Duration::from_millis(50));
    // Provokes the reset of the closed backend.
    client.write_all(b"goodbye\r\n")?;
    std::thread::sleep(Duration::from_millis(50));
    let mut seen = Vec::new();
    // Then a FIN, or a reset because of the unread data.
    let _ = client.read_to_end(&mut seen);
    ensure!(seen == last, "{} of {LAST} bytes", seen.len());
    drop(client);
    ended(&injector, "backend_closed")?;
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reader {
    Client,
    Backend,
}

/// Writes `pattern` until nothing is accepted for half a second; returns the accepted bytes.
fn fill(mut stream: &TcpStream, bytes: &[u8]) -> anyhow::Result<usize> {
    stream.set_nonblocking(true)?;
    let (mut written, mut last) = (0, Instant::now());
    while written < bytes.len() && last.elapsed() < Duration::from_millis(500) {
        match stream.write(bytes.get(written..).unwrap_or_default()) {
            Ok(count) => (written, last) = (written + count, Instant::now()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1))
            }
            Err(error) => return Err(error.into()),
        }
    }
    stream.set_nonblocking(false)?;
    Ok(written)
}

/// Maximum in flight for one stalled reader: the water marks, four socket buffers, and what arrives
/// until the notification is handled. Without back-pressure it would be everything.
const ON_ITS_WAY: usize = 24 << 20;
const MORE_THAN_FITS: usize = 96 << 20;

/// The sender is slowed down, memory stays bounded, and no data is lost when the reader continues.
fn stalled(testbed: &Testbed, engine: &str, reader: Reader) -> anyhow::Result<()> {
    let (injector, client, server) = joined(testbed, engine, "")?;
    let (from, to) = if reader == Reader::Client { (&server, &client) } else { (&client, &server) };
    let bytes = pattern(11, MORE_THAN_FITS);
    let taken = fill(from, &bytes)?;
    ensure!(taken < ON_ITS_WAY, "{taken} bytes were taken for a reader that reads nothing");
    let changes =
        |change| anyhow::Ok(injector.metrics()?.sum("injector_plane_changes_total", &[("change", change)]));
    if engine == "splice" {
        ensure!(changes("paused")? > 0.5, "the source was not paused");
    }
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| receive_all(to, &bytes));
        send_all(from, bytes.get(taken..).unwrap_or_default())?;
        receiving.join().map_err(|_| anyhow::anyhow!("panicked"))?
    })
    .with_context(|| format!("logged:\n{}", injector.log()))?;
    if engine == "splice" {
        ensure!(changes("moved_to_user_space")? > 0.5, "the source was not moved to user space");
    }
    drop((client, server));
    finished(&injector, 1)?;
    let waiting = injector.metrics()?.sum("injector_backlog_bytes", &[]);
    ensure!(waiting.abs() < 0.5, "{waiting} bytes are still counted as backlog");
    Ok(())
}

/// When the target has caught up and payload arrives in small pieces, the kernel forwards it again.
fn resumed(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, client, mut server) = joined(testbed, engine, "")?;
    let bytes = pattern(19, MORE_THAN_FITS);
    let taken = fill(&client, &bytes)?;
    let mut seen = vec![0; taken];
    server.read_exact(&mut seen)?;
    ensure!(seen.iter().zip(&bytes).all(|(seen, sent)| seen == sent), "not what was sent");
    let mut client = client;
    for _ in 0..20 {
        pass(&mut client, &mut server, b"NOOP\r\n")?;
        pass(&mut server, &mut client, b"250 ok\r\n")?;
    }
    let changes = [("change", "resumed")];
    let resumed = || anyhow::Ok(injector.metrics()?.sum("injector_plane_changes_total", &changes) > 0.5);
    if engine == "splice" {
        // User space may be notified after the payload has passed.
        wait_until("resumed", resumed, |resumed| *resumed)?;
    } else {
        ensure!(!resumed()?, "{engine} has nothing to resume");
    }
    drop((client, server));
    finished(&injector, 1).map(drop)
}

/// A FIN while the source is paused: the kernel does not resume the source, user space reads the
/// rest.
fn stalled_fin(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, client, server) = joined(testbed, engine, "")?;
    let bytes = pattern(13, MORE_THAN_FITS);
    let taken = fill(&client, &bytes)?;
    client.shutdown(Shutdown::Write)?;
    std::thread::sleep(Duration::from_millis(50));
    receive_all(&server, bytes.get(..taken).unwrap_or_default())?;
    drop((client, server));
    ended(&injector, "client_closed")?;
    Ok(())
}

/// The reader resets: the sender is notified at once, not after a timeout.
fn stalled_reader_resets(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, mut client, server) = joined(testbed, engine, "")?;
    fill(&client, &pattern(17, MORE_THAN_FITS))?;
    let start = Instant::now();
    reset(server)?;
    ensure!(matches!(ending(&mut client)?, Ending::Reset(_)), "the sender saw a clean end");
    ensure!(start.elapsed() < AT_ONCE, "after {:?}", start.elapsed());
    ended(&injector, "backend_reset")?;
    Ok(())
}

fn byte_by_byte(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (_injector, mut client, mut server) = joined(testbed, engine, "")?;
    let bytes = pattern(5, 2000);
    for byte in bytes.chunks(1) {
        client.write_all(byte)?;
        server.write_all(byte)?;
    }
    expect(&mut server, &bytes)?;
    expect(&mut client, &bytes)
}

/// Closes with a reset.
fn reset(stream: TcpStream) -> anyhow::Result<()> {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    Ok(())
}

/// A reset on one side causes a reset on the other, at once, and never a clean end.
fn backend_resets(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, mut client, mut server) = joined(testbed, engine, "")?;
    pass(&mut server, &mut client, b"250 half of a sent")?;
    let start = Instant::now();
    reset(server)?;
    ensure!(ending(&mut client)? == Ending::Reset(Vec::new()), "the client saw a clean end");
    ensure!(start.elapsed() < AT_ONCE, "after {:?}", start.elapsed());
    ended(&injector, "backend_reset")?;
    Ok(())
}

fn client_resets(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, mut client, mut server) = joined(testbed, engine, "")?;
    pass(&mut client, &mut server, b"DATA half of a sent")?;
    let start = Instant::now();
    reset(client)?;
    ensure!(ending(&mut server)? == Ending::Reset(Vec::new()), "the backend saw a clean end");
    ensure!(start.elapsed() < AT_ONCE, "after {:?}", start.elapsed());
    ended(&injector, "client_reset")?;
    Ok(())
}

fn idle(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, mut client, mut server) =
        joined(testbed, engine, "[listener.timeouts]\nidle = \"400ms\"")?;
    let start = Instant::now();
    ensure!(ending(&mut client)? == Ending::Reset(Vec::new()), "no reset");
    let after = start.elapsed();
    ensure!(after > Duration::from_millis(300) && after < LIMIT, "after {after:?}");
    ensure!(ending(&mut server)? == Ending::Reset(Vec::new()), "no reset at the backend");
    ended(&injector, "idle")?;
    Ok(())
}

/// Also when no byte passes through user space.
fn kept_alive(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, mut client, mut server) =
        joined(testbed, engine, "[listener.timeouts]\nidle = \"400ms\"")?;
    for _ in 0..8 {
        std::thread::sleep(Duration::from_millis(150));
        pass(&mut client, &mut server, b"NOOP\r\n")?;
    }
    ensure!(injector.sessions()?.is_empty(), "aborted although it was active");
    ensure!(ending(&mut client)? == Ending::Reset(Vec::new()), "no reset");
    ended(&injector, "idle")?;
    Ok(())
}

fn half_closed_idle(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, client, mut server) =
        joined(testbed, engine, "[listener.timeouts]\nhalf_closed = \"300ms\"")?;
    client.shutdown(Shutdown::Write)?;
    let start = Instant::now();
    ensure!(ending(&mut server)? == Ending::Fin(Vec::new()), "the FIN did not pass");
    ended(&injector, "half_closed")?;
    let after = start.elapsed();
    // The first check is after five seconds at the latest: until then the idle timeout applies.
    ensure!(after < LIMIT, "after {after:?}");
    drop(client);
    Ok(())
}
