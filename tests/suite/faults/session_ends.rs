//! What a session costs when one side has nothing more to say: a client that stays after its
//! backend, a client that never spoke, and bytes that are held.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use anyhow::ensure;
use injector_testbed::daemon::Injector;

use crate::Run;
use crate::peer_timeouts::{Side, Silence};
use crate::testbed::{Ending, Testbed, accept_with_header, counted, ended, ending, finished, pass};
use crate::transfers::{introduced, joined, pattern, receive_all, send_all};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("client FIN/clients that stay are closed", clients_that_stay),
    ("client FIN/the backend's host vanishes after its FIN", backend_vanishes),
    ("client FIN/a slow reader gets every byte", slow_reader),
    ("never spoke/the backend is reset once the client has the banner", never_spoke),
    ("never spoke/a backend without a banner gets the FIN", without_banner),
    ("quit/the backend closes first", backend_closes_first),
    ("quit/a backend that waits for the FIN gets it", backend_waits_for_fin),
    ("pipelining/a client that reads no answer is given up", never_reads),
    ("first bytes/an empty line is forwarded", empty_line),
    ("first bytes/a forged header in slow pieces is found", forged_slowly),
];

const SHORT: &str = "[listener.timeouts]\nclient_fin = \"300ms\"";

/// The backend's host answers, and the clients do not: until their time is over, they hold their
/// places.
fn clients_that_stay(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const CLIENTS: usize = 20;
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", SHORT)?;
    let mut pairs = Vec::new();
    for _ in 0..CLIENTS {
        pairs.push(introduced(testbed, &backend)?);
    }
    for (_, server) in &pairs {
        server.shutdown(Shutdown::Write)?;
    }
    for (client, server) in &mut pairs {
        ensure!(ending(client)? == Ending::Fin(Vec::new()), "the client did not get the backend's FIN");
        ensure!(ending(server)? == Ending::Reset(Vec::new()), "the backend's connection was not reset");
    }
    for session in finished(&injector, CLIENTS)? {
        ensure!(session.field("reason").as_deref() == Some("client_fin"), "{session:?}");
    }
    counted(&injector, "injector_connections_active", &[], 0.0)
}

fn backend_vanishes(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, mut client, server) = joined(testbed, engine, SHORT)?;
    server.shutdown(Shutdown::Write)?;
    ensure!(ending(&mut client)? == Ending::Fin(Vec::new()), "the client did not get the backend's FIN");
    let silence = Silence::of_side(testbed, Side::Backend)?;
    ended(&injector, "client_fin")?;
    drop(silence);
    Ok(())
}

/// The client's time counts from the delivery, and neither it nor the half-closed timeout ends a
/// delivery that goes on.
fn slow_reader(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let limits = "[listener.timeouts]\nclient_fin = \"300ms\"\nhalf_closed = \"1500ms\"";
    let (injector, client, server) = joined(testbed, engine, limits)?;
    let bytes = pattern(71, 6 << 20);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| send_all(&server, &bytes));
        let mut slow = &client;
        let (mut read, mut buffer) = (0, vec![0; 128 << 10]);
        // Slower than both timeouts.
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(150));
            let count = slow.read(&mut buffer)?;
            ensure!(bytes.get(read..read + count) == buffer.get(..count), "other bytes than were sent");
            read += count;
        }
        receive_all(&client, &bytes[read..])?;
        sending.join().map_err(|_| anyhow::anyhow!("panicked"))?
    })?;
    ended(&injector, "client_fin")?;
    Ok(())
}

/// The client finishes before the banner, as one that only tests the port.
fn never_spoke(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    let mut client = testbed.client()?;
    client.shutdown(Shutdown::Write)?;
    let (mut server, ..) = accept_with_header(&backend)?;
    nothing_comes(&mut server, Duration::from_millis(200))?;
    server.write_all(b"220 hello\r\n")?;
    ensure!(
        ending(&mut client)? == Ending::Fin(b"220 hello\r\n".to_vec()),
        "the client did not get the banner"
    );
    ensure!(ending(&mut server)? == Ending::Reset(Vec::new()), "the backend's connection was not reset");
    ended(&injector, "client_closed")?;
    Ok(())
}

/// The client sends its last command and its FIN at once. In user space, at the backend.
fn quitting(testbed: &Testbed, engine: &str) -> anyhow::Result<(Injector, TcpStream, TcpStream)> {
    let (injector, mut client, mut server) = joined(testbed, engine, "")?;
    client.write_all(b"QUIT\r\n")?;
    client.shutdown(Shutdown::Write)?;
    let mut command = [0; 6];
    server.read_exact(&mut command)?;
    ensure!(&command == b"QUIT\r\n", "{command:?}");
    Ok((injector, client, server))
}

/// Otherwise the edge host would keep the connection in TIME_WAIT.
fn backend_closes_first(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, mut client, mut server) = quitting(testbed, engine)?;
    // What the kernel has forwarded is not known.
    if engine == "relay" {
        nothing_comes(&mut server, Duration::from_millis(200))?;
    }
    server.write_all(b"221 bye\r\n")?;
    server.shutdown(Shutdown::Write)?;
    ensure!(ending(&mut server)? == Ending::Fin(Vec::new()), "the backend did not get the client's FIN");
    ensure!(
        ending(&mut client)? == Ending::Fin(b"221 bye\r\n".to_vec()),
        "the client did not get the answer"
    );
    ended(&injector, "client_closed")?;
    Ok(())
}

fn backend_waits_for_fin(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (injector, mut client, mut server) = quitting(testbed, engine)?;
    ensure!(ending(&mut server)? == Ending::Fin(Vec::new()), "the backend did not get the client's FIN");
    server.write_all(b"221 bye\r\n")?;
    drop(server);
    ensure!(
        ending(&mut client)? == Ending::Fin(b"221 bye\r\n".to_vec()),
        "the client did not get the answer"
    );
    ended(&injector, "client_closed")?;
    Ok(())
}

fn nothing_comes(stream: &mut TcpStream, within: Duration) -> anyhow::Result<()> {
    stream.set_read_timeout(Some(within))?;
    let read = stream.read(&mut [0]);
    ensure!(read.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "{read:?} too early");
    crate::testbed::patient(stream)?;
    Ok(())
}

fn without_banner(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", SHORT)?;
    let client = testbed.client()?;
    client.shutdown(Shutdown::Write)?;
    let (mut server, ..) = accept_with_header(&backend)?;
    ensure!(ending(&mut server)? == Ending::Fin(Vec::new()), "the FIN did not pass");
    drop(server);
    ended(&injector, "client_closed")?;
    Ok(())
}

/// The client sends commands and reads nothing: neither side can go on, and the kernel gives up the
/// closed window.
fn never_reads(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let limits = "[listener.timeouts]\nuser_timeout = \"1s\"\nkeepalive = \"1h\"";
    let (injector, mut client, server) = joined(testbed, engine, limits)?;
    let answer = vec![b'x'; 64 << 10];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut reading, mut writing, mut commands) = (&server, &server, [0; 64]);
            while reading.read(&mut commands).is_ok_and(|count| count > 0)
                && writing.write_all(&answer).is_ok()
            {}
        });
        let commands = b"NOOP\r\n".repeat(1000);
        while client.write_all(&commands).is_ok() {}
    });
    ended(&injector, "client_timed_out")?;
    Ok(())
}

/// CRLF is a prefix of the signature.
fn empty_line(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let _injector = testbed.injector(engine, "smtp", "")?;
    for prefix in [&b"\r\n"[..], b"PROX"] {
        let mut client = testbed.client()?;
        let (mut server, ..) = accept_with_header(&backend)?;
        pass(&mut server, &mut client, b"220 hello\r\n")?;
        let start = Instant::now();
        pass(&mut client, &mut server, prefix)?;
        let after = start.elapsed();
        ensure!(
            (Duration::from_millis(900)..Duration::from_millis(4500)).contains(&after),
            "after {after:?}"
        );
        pass(&mut server, &mut client, b"500 5.5.2 what?\r\n")?;
        pass(&mut client, &mut server, b"NOOP\r\n")?;
    }
    Ok(())
}

/// What was forwarded is remembered.
fn forged_slowly(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    pass(&mut client, &mut server, b"\r\n\r\n")?;
    client.write_all(b"\0\r\nQUIT\n\x21\x11\0\x0c")?;
    ensure!(ending(&mut client)? == Ending::Reset(Vec::new()), "the forging client was not reset");
    ensure!(ending(&mut server)? == Ending::Reset(Vec::new()), "the backend read the rest");
    ended(&injector, "forged_header")?;
    Ok(())
}
