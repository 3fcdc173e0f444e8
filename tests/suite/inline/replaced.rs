//! Connections that have the same addresses and ports, one after another: once the later one has them, nothing
//! of the earlier one's client reaches the backend, which would take it for the later one's.

use std::io::{ErrorKind, Read as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;

use anyhow::{Context as _, ensure};
use injector_common::inline::{ACK, PSH, RST};
use injector_testbed::netns::Family;
use injector_testbed::wait::wait_until;

use crate::WireRun;
use crate::cookies::{Client, client, opening, with_cookies};
use crate::frame::Frame;
use crate::testbed::{LIMIT, accept, expect, header, patient};
use crate::wire::{Direction, Fate, FaultGuard, Side};
use crate::wire_testbed::{self, WireTestbed};

pub(crate) const TRIALS: &[(&str, WireRun)] = &[
    ("the earlier connection of a port has ended", ended),
    ("the earlier connection of a client is open", open),
];

/// Where connections keep the client's address and port.
pub(crate) const AS_CLIENT: &[(&str, WireRun)] =
    &[("two listeners, and one address and port towards the backend", two_listeners)];

/// Data of a client, as if it had sent as much before.
fn data(client: &Client, sent: &[u8], bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let sequence = client.frame.sequence.wrapping_add(u32::try_from(sent.len())?);
    let (flags, acknowledgement) = (ACK | PSH, client.answered);
    Ok(Frame { flags, sequence, acknowledgement, payload: bytes.to_vec(), ..client.frame.clone() }.whole())
}

fn send(testbed: &WireTestbed, frame: &[u8]) -> anyhow::Result<()> {
    Ok(testbed.wire.inject(Side::Client, Direction::ToBackend, frame)?)
}

/// The client ends its handshake, and the backend has the header.
fn established(testbed: &WireTestbed, listener: &TcpListener, client: &Client) -> anyhow::Result<TcpStream> {
    let ack = Frame { flags: ACK, acknowledgement: client.answered, ..client.frame.clone() };
    send(testbed, &ack.whole())?;
    let mut server = accept(listener)?;
    patient(&server)?;
    let (named, _) = header(&mut server)?;
    ensure!(named == client.frame.source, "the header names {named}");
    Ok(server)
}

/// The payloads that leave to the backend, while the guard exists.
fn payloads(testbed: &WireTestbed, port: u16) -> (FaultGuard<'_>, mpsc::Receiver<(SocketAddr, Vec<u8>)>) {
    let (sender, seen) = mpsc::channel();
    let watching = testbed.wire.faults(move |seen| {
        if seen.at(Side::Backend, Direction::ToBackend) && seen.is_data() {
            let _ = sender.send((seen.source(), seen.tcp.payload().to_vec()));
        }
        Fate::Pass
    });
    testbed.wire.watch(port);
    (watching, seen)
}

/// Waits for this payload, before which no such other may be.
fn first_of(
    seen: &mpsc::Receiver<(SocketAddr, Vec<u8>)>,
    awaited: &[u8],
    other: &[u8],
) -> anyhow::Result<()> {
    loop {
        let (source, payload) = seen.recv_timeout(LIMIT).context("nothing has come")?;
        let has = |bytes: &[u8]| payload.windows(bytes.len()).any(|part| part == bytes);
        ensure!(!has(other), "the earlier client's bytes have left to the backend, from {source}");
        if has(awaited) {
            return Ok(());
        }
    }
}

/// The client comes again from the same port, and gets the one towards the backend that it had. What it sent
/// before, and what comes only now, is dropped from the backend's answer on.
fn ended(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    const PORT: u16 = 9500;
    let listener = testbed.backend(family)?;
    let before = testbed.counted("superseded")?;
    let first = client(testbed, family, PORT)?;
    let mut server = established(testbed, &listener, &first)?;
    let port = server.peer_addr()?.port();
    send(testbed, &Frame { flags: RST, ..first.frame.clone() }.whole())?;
    let end = server.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{end:?}");
    let sequence = first.frame.sequence.wrapping_add(1 << 20);
    let second = opening(testbed, Frame { sequence, ..first.frame.clone() })?;
    let (_watching, seen) = payloads(testbed, port);
    // Both of the window that the backend had opened.
    send(testbed, &data(&first, b"", b"late")?)?;
    send(testbed, &data(&first, b"late", b"late")?)?;
    let mut server = established(testbed, &listener, &second)?;
    ensure!(server.peer_addr()?.port() == port, "another port: {}", server.peer_addr()?);
    send(testbed, &data(&second, b"", b"the first words")?)?;
    expect(&mut server, b"the first words")?;
    first_of(&seen, b"the first words", b"late")?;
    let superseded = testbed.counted("superseded")? - before;
    ensure!(superseded == 1, "{superseded} were counted as superseded");
    Ok(())
}

/// The client has forgotten its connection, and opens another one with the same port: the backend gets a reset.
fn open(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    const PORT: u16 = 9501;
    let listener = testbed.backend(family)?;
    let before = testbed.counted("superseded")?;
    let first = client(testbed, family, PORT)?;
    let mut earlier = established(testbed, &listener, &first)?;
    let sequence = first.frame.sequence.wrapping_add(1 << 20);
    let second = opening(testbed, Frame { sequence, ..first.frame.clone() })?;
    // Until the client ends the other handshake, anybody may have sent that SYN.
    send(testbed, &data(&first, b"", b"still here")?)?;
    expect(&mut earlier, b"still here")?;
    let mut server = established(testbed, &listener, &second)?;
    let end = earlier.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{end:?}");
    is_logged(testbed, &first)?;
    send(testbed, &data(&second, b"", b"the first words")?)?;
    expect(&mut server, b"the first words")?;
    let superseded = testbed.counted("superseded")? - before;
    ensure!(superseded == 1, "{superseded} were counted as superseded");
    Ok(())
}

/// The client's connections to two listeners are one to their backend. One that answers by SYN cookies
/// answers both, and both handshakes end.
fn two_listeners(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    const PORT: u16 = 9502;
    let (_settings, listener) = with_cookies(testbed, family)?;
    let before = testbed.counted("superseded")?;
    let first = client(testbed, family, PORT)?;
    let sequence = first.frame.sequence.wrapping_add(1 << 20);
    let destination = wire_testbed::tls(family);
    let second = opening(testbed, Frame { sequence, destination, ..first.frame.clone() })?;
    let mut server = established(testbed, &listener, &first)?;
    ensure!(server.peer_addr()? == first.frame.source, "from {}", server.peer_addr()?);
    send(testbed, &data(&first, b"", b"before")?)?;
    expect(&mut server, b"before")?;
    let (_watching, seen) = payloads(testbed, PORT);
    send(testbed, &data(&second, b"", b"the later one")?)?;
    send(testbed, &data(&first, b"before", b"after")?)?;
    send(testbed, &data(&second, b"the later one", b"and more")?)?;
    first_of(&seen, b"the later one", b"after")?;
    first_of(&seen, b"and more", b"after")?;
    is_logged(testbed, &first)?;
    let superseded = || Ok(testbed.counted("superseded")? - before);
    wait_until("the count", superseded, |count| *count == 1).map(drop)
}

/// The end of this client's connection has a line in the log.
fn is_logged(testbed: &WireTestbed, client: &Client) -> anyhow::Result<()> {
    let line = testbed.session(client.frame.source, client.frame.destination)?;
    ensure!(line.field("reason").as_deref() == Some("client_timed_out"), "{line:?}");
    Ok(())
}
