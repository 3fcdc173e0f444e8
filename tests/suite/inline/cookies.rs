//! A backend that uses SYN cookies stores nothing about a SYN, and takes a segment of a closed
//! connection for the beginning of a new one if its numbers fit. The length of the header shifts
//! them: they fit at another position than the client's.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use injector_common::inline::{ACK, FIN, PSH, SYN};
use injector_testbed::netns::Family;
use socket2::SockRef;

use crate::WireRun;
use crate::frame::{Frame, forged_header};
use crate::testbed::{LIMIT, accept, expect, header, patient};
use crate::wire::{Direction, Fate, Side};
use crate::wire_testbed::{self, SysctlGuard, WireTestbed};

pub(crate) const TRIALS: &[(&str, WireRun)] = &[
    ("SYN cookies: a reset connection is not reopened", |testbed, family| again(testbed, family, End::Reset)),
    ("SYN cookies: a closed connection is not reopened", |testbed, family| again(testbed, family, End::Fin)),
    ("SYN cookies: a number close to the initial one", nearly_first),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Reset,
    Fin,
}

/// The state of a hand-made client.
pub(crate) struct Client {
    pub(crate) frame: Frame,
    first: u32,
    /// The sequence number of the backend's first byte.
    pub(crate) answered: u32,
}

/// The client has the backend's answer to its SYN.
pub(crate) fn client(testbed: &WireTestbed, family: Family, port: u16) -> anyhow::Result<Client> {
    let ip: IpAddr = match family {
        Family::V4 => Ipv4Addr::new(203, 0, 113, 99).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0xee, 0, 0, 0, 0, 99).into(),
    };
    let sequence = 0x1000_0000 + u32::from(port);
    let source = SocketAddr::new(ip, port);
    opening(testbed, Frame { source, sequence, ..Frame::of_a_client(testbed, family)? })
}

/// The same of the client whose first byte such a frame would have.
pub(crate) fn opening(testbed: &WireTestbed, frame: Frame) -> anyhow::Result<Client> {
    let (first, [from, to]) = (frame.sequence, [frame.source, frame.destination]);
    let (sender, answers) = mpsc::channel();
    let _watching = testbed.wire.faults(move |seen| {
        if seen.at(Side::Client, Direction::ToClient)
            && seen.is_syn_ack()
            && seen.source() == to
            && seen.tcp.destination_port() == from.port()
        {
            let _ = sender.send(seen.tcp.sequence_number().wrapping_add(1));
        }
        Fate::Pass
    });
    testbed.wire.watch(from.port());
    let sequence = first.wrapping_sub(1);
    let syn = Frame { flags: SYN, sequence, options: vec![2, 4, 5, 0xA0], ..frame.clone() };
    testbed.wire.inject(Side::Client, Direction::ToBackend, &syn.whole())?;
    let answered = answers.recv_timeout(LIMIT).context("the SYN was not answered")?;
    Ok(Client { frame, first, answered })
}

pub(crate) fn with_cookies<'a>(
    testbed: &'a WireTestbed,
    family: Family,
) -> anyhow::Result<(SysctlGuard<'a>, TcpListener)> {
    let cookies = SysctlGuard::new(testbed.backend_side(), "net/ipv4/tcp_syncookies", "2")?;
    Ok((cookies, testbed.backend(family)?))
}

fn again(testbed: &WireTestbed, family: Family, end: End) -> anyhow::Result<()> {
    let (_settings, listener) = with_cookies(testbed, family)?;
    let port = if end == End::Reset { 9100 } else { 9200 };
    let Client { frame, first, answered } = client(testbed, family, port)?;
    let answer = Frame { flags: ACK, acknowledgement: answered, ..frame.clone() };
    testbed.wire.inject(Side::Client, Direction::ToBackend, &answer.whole())?;
    let mut server = accept(&listener)?;
    patient(&server)?;
    let (named, _) = header(&mut server)?;
    ensure!(named == frame.source, "the header names {named}");
    // So many bytes that the client's numbers fit again, one header length away.
    let victim = if family == Family::V4 { "127.0.0.1:4444" } else { "[::1]:4444" };
    let forged = forged_header(victim.parse()?, wire_testbed::public(family));
    let len = u32::try_from(forged.len())?;
    server.write_all(&forged)?;
    std::thread::sleep(Duration::from_millis(10));
    let mut acknowledgement = answered.wrapping_add(len);
    if end == End::Reset {
        SockRef::from(&server).set_linger(Some(Duration::ZERO))?;
        drop(server);
    } else {
        // The client closes first: then the backend forgets the connection with the last
        // acknowledgement.
        let fin = Frame { flags: ACK | FIN, acknowledgement, ..frame.clone() };
        testbed.wire.inject(Side::Client, Direction::ToBackend, &fin.whole())?;
        ensure!(server.read(&mut [0; 8])? == 0, "bytes in place of an end");
        drop(server);
        std::thread::sleep(Duration::from_millis(10));
        acknowledgement = acknowledgement.wrapping_add(1);
        let last = Frame { flags: ACK, sequence: first.wrapping_add(1), acknowledgement, ..frame.clone() };
        testbed.wire.inject(Side::Client, Direction::ToBackend, &last.whole())?;
    }
    std::thread::sleep(Duration::from_millis(20));
    for at in 0..3 {
        for acknowledgement in [acknowledgement, answered.wrapping_add(len)] {
            let sequence = first.wrapping_add(at);
            let again = Frame {
                flags: ACK | PSH,
                sequence,
                acknowledgement,
                payload: forged.clone(),
                ..frame.clone()
            };
            testbed.wire.inject(Side::Client, Direction::ToBackend, &again.whole())?;
        }
    }
    nothing_new(&listener)
}

/// The backend accepts any of a few numbers as the first one, and would start in the middle of the
/// header.
fn nearly_first(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let (_settings, listener) = with_cookies(testbed, family)?;
    let len: u32 = if family == Family::V4 { 28 } else { 52 };
    // As they are, and shifted by the header.
    let offs = [1, 2, 3, 1_u32.wrapping_neg(), 2_u32.wrapping_neg()];
    let offs = offs.into_iter().chain(offs.map(|off| off.wrapping_sub(len)));
    for (port, off) in (9300..).zip(offs) {
        let Client { frame, first, answered } = client(testbed, family, port)?;
        let answer = Frame { flags: ACK, acknowledgement: answered, ..frame.clone() };
        let early = Frame { sequence: first.wrapping_add(off), ..answer.clone() };
        let data = Frame { flags: ACK | PSH, payload: b"the first words".to_vec(), ..answer };
        testbed.wire.inject(Side::Client, Direction::ToBackend, &early.whole())?;
        testbed.wire.inject(Side::Client, Direction::ToBackend, &data.whole())?;
        let mut server = accept(&listener)?;
        patient(&server)?;
        let (named, _) = header(&mut server).with_context(|| format!("{} off", off.cast_signed()))?;
        ensure!(named == frame.source, "the header names {named}");
        expect(&mut server, b"the first words")?;
        SockRef::from(&server).set_linger(Some(Duration::ZERO))?;
    }
    Ok(())
}

/// Checks that the backend has no connection that no client opened.
fn nothing_new(listener: &TcpListener) -> anyhow::Result<()> {
    listener.set_nonblocking(true)?;
    std::thread::sleep(Duration::from_millis(100));
    let mut stream: TcpStream = match listener.accept() {
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
        accepted => accepted?.0,
    };
    stream.set_nonblocking(true)?;
    let mut bytes = [0; 256];
    let len = stream.read(&mut bytes).unwrap_or(0);
    bail!("FORGED: the backend has another connection, which begins with {:02x?}", &bytes[..len])
}
