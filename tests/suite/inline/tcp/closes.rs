//! How connections end, and what follows on the same ports.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use injector_testbed::daemon::Session;
use injector_testbed::netns::Family;
use injector_testbed::sockets::AT_ONCE;
use injector_testbed::wait::wait_until;
use socket2::SockRef;

use super::BYTES;
use crate::testbed::{accept, expect, own_header};
use crate::wire::{Direction, Fate, Side};
use crate::wire_testbed::{self, FirstSpeaker, WireTestbed, through};

/// One direction closes, the other continues.
pub(super) fn half_close(testbed: &WireTestbed, family: Family, direction: Direction) -> anyhow::Result<()> {
    let connection = testbed.connection(family, FirstSpeaker::Server)?;
    let (first, last) = match direction {
        Direction::ToBackend => (&connection.client, &connection.server),
        Direction::ToClient => (&connection.server, &connection.client),
    };
    through(first, last, 1000, 0)?;
    std::thread::sleep(Duration::from_millis(50));
    through(last, first, BYTES, 0)?;
    let session = testbed.session(connection.client.local_addr()?, wire_testbed::public(family))?;
    let end = if direction == Direction::ToBackend { "client_closed" } else { "backend_closed" };
    ensure!(session.field("reason").as_deref() == Some(end), "{session:?}");
    Ok(())
}

/// The FINs cross.
pub(super) fn simultaneous_close(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let _faulty = testbed.wire.faults(|seen| {
        if seen.tcp.fin() && seen.side == Side::Backend {
            Fate::Late(Duration::from_millis(30))
        } else {
            Fate::Pass
        }
    });
    let mut connection = testbed.connection(family, FirstSpeaker::Server)?;
    connection.client.shutdown(Shutdown::Write)?;
    connection.server.shutdown(Shutdown::Write)?;
    for stream in [&mut connection.client, &mut connection.server] {
        ensure!(stream.read(&mut [0; 8]).context("waiting for the FIN")? == 0, "bytes in place of an end");
    }
    testbed.session(connection.client.local_addr()?, wire_testbed::public(family))?;
    Ok(())
}

/// The other side sees the reset at once.
pub(super) fn reset(testbed: &WireTestbed, family: Family, direction: Direction) -> anyhow::Result<()> {
    let connection = testbed.connection(family, FirstSpeaker::Server)?;
    let address = connection.client.local_addr()?;
    let (goes, mut stays) = match direction {
        Direction::ToBackend => (connection.client, connection.server),
        Direction::ToClient => (connection.server, connection.client),
    };
    stays.write_all(b"not read")?;
    std::thread::sleep(Duration::from_millis(10));
    let start = Instant::now();
    SockRef::from(&goes).set_linger(Some(Duration::ZERO))?;
    drop(goes);
    let outcome = stays.read(&mut [0; 8]);
    ensure!(outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{outcome:?}");
    ensure!(start.elapsed() < AT_ONCE, "after {:?}", start.elapsed());
    let session = testbed.session(address, wire_testbed::public(family))?;
    let end = if direction == Direction::ToBackend { "client_reset" } else { "backend_reset" };
    ensure!(session.field("reason").as_deref() == Some(end), "{session:?}");
    Ok(())
}

/// The header is lost, then the client resets: the backend's connection is reset.
pub(super) fn early_reset(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let mut dropped = 0;
    let _faulty = testbed.wire.faults(move |seen| {
        dropped += u32::from(seen.is_header());
        if seen.is_header() && dropped < 4 { Fate::Drop } else { Fate::Pass }
    });
    let listener = testbed.backend(family)?;
    let mut client = testbed.client(family)?;
    // The first data opens the connection at the backend, without the header.
    client.write_all(b"EHLO")?;
    let mut server = accept(&listener)?;
    SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
    drop(client);
    let start = Instant::now();
    // It may get the header first, but never data without it, and no clean end.
    let mut seen = Vec::new();
    let outcome = server.read_to_end(&mut seen);
    ensure!(
        outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
        "{outcome:?}, {seen:02x?}"
    );
    ensure!(!seen.starts_with(b"EHLO"), "data without a header");
    ensure!(start.elapsed() < Duration::from_millis(1500), "after {:?}", start.elapsed());
    Ok(())
}

/// The client does not see the refusal: its next SYN goes to the socket, where it gets an answer. The
/// refusal is counted, and has no log line, because the source of the SYN is not verified.
pub(super) fn refused(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let labels = [("listener", "wire"), ("reason", "backend_refused")];
    let closed = || Ok(testbed.injector.metrics()?.sum("injector_connections_closed_total", &labels));
    let counts = || anyhow::Ok((testbed.counted("refused")?, testbed.counted("to_socket_unanswered")?));
    let (closed_before, before) = (closed()?, counts()?);
    let start = Instant::now();
    let mut client = testbed.client(family)?;
    expect(&mut client, b"421 ")?;
    let took = start.elapsed();
    // The client's second SYN follows after one second, and the third after three.
    ensure!(took < Duration::from_millis(2500), "after {took:?}");
    ensure!(counts()? == (before.0 + 1, before.1 + 1), "{:?} after {before:?}", counts()?);
    wait_until("refused connections", closed, |closed| *closed > closed_before + 0.5)?;
    let by_inline = |session: &Session| {
        session.field("reason").as_deref() == Some("backend_refused")
            && session.field("engine").as_deref() == Some("inline")
    };
    let line = testbed.injector.sessions()?.into_iter().find(by_inline);
    ensure!(line.is_none(), "a line for a SYN: {line:?}");
    Ok(())
}

/// The same addresses and ports are reused at once, several times.
pub(super) fn same_ports(testbed: &WireTestbed, family: Family, by_reset: bool) -> anyhow::Result<()> {
    let listener = testbed.backend(family)?;
    let mut port = 0;
    for turn in 0..5 {
        let mut client = again_from(testbed, family, port).with_context(|| format!("turn {turn}"))?;
        port = client.local_addr()?.port();
        let mut server = accept(&listener).with_context(|| format!("turn {turn}"))?;
        own_header(&mut server, &client).with_context(|| format!("turn {turn}"))?;
        server.write_all(b"220 hello")?;
        expect(&mut client, b"220 hello")?;
        if by_reset {
            client.write_all(b"QUIT")?;
            expect(&mut server, b"QUIT")?;
            SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
            drop(client);
            let outcome = server.read(&mut [0; 8]);
            ensure!(outcome.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "no reset");
        } else {
            // The backend sends its FIN first, so that the next round meets its TIME_WAIT.
            server.shutdown(Shutdown::Write)?;
            ensure!(client.read(&mut [0; 8])? == 0, "bytes in place of an end");
            through(&client, &server, 10_000, turn)?;
        }
    }
    Ok(())
}

/// Connects from this port, as soon as the client's kernel has seen the end of the previous
/// connection.
fn again_from(testbed: &WireTestbed, family: Family, port: u16) -> anyhow::Result<TcpStream> {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        let outcome = testbed.client_by(family, |socket| {
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::new(wire_testbed::client_ip(family), port).into())
        });
        match outcome {
            Err(error) if Instant::now() < deadline && is(&error, ErrorKind::AddrNotAvailable) => {
                std::thread::sleep(Duration::from_millis(2));
            }
            outcome => return outcome,
        }
    }
}

fn is(error: &anyhow::Error, kind: ErrorKind) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == kind)
}
