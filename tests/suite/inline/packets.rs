//! What a router owes to packets: hop limits, segment sizes, and those that are not for it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::ensure;
use etherparse::{NetSlice, TcpOptionElement};
use fastrand::Rng;
use injector_common::inline::{ACK, PSH, SYN};
use injector_testbed::netns::Family;

use crate::WireRun;
use crate::cookies;
use crate::frame::{Extra, Frame};
use crate::testbed::{BACKEND_PORT, LIMIT, accept, expect, header, patient};
use crate::wire::{Direction, Fate, Seen, Side};
use crate::wire_testbed::{self, FirstSpeaker, Forwarding, WireTestbed};

pub(crate) const TRIALS: &[(&str, WireRun)] = &[
    ("the hop limit", hop_limit),
    ("the segment size is that of the narrower way", segment_size),
    ("padded frames", padded),
    ("fragments and extension headers go to other ports alone", unreadable),
];

/// A port of the backend's that is no PROXY port.
const OTHER_PORT: u16 = BACKEND_PORT + 7;

/// What `note` finds in every packet of a connection.
fn noted<T: Send + 'static>(
    testbed: &WireTestbed,
    family: Family,
    note: impl Fn(&Seen<'_>) -> Option<T> + Send + 'static,
) -> anyhow::Result<Vec<(Side, Direction, T)>> {
    let all = Arc::new(Mutex::new(Vec::new()));
    let seen_all = Arc::clone(&all);
    let faulty = testbed.wire.faults(move |seen| {
        if let Some(noted) = note(seen) {
            let mut all = seen_all.lock().unwrap_or_else(PoisonError::into_inner);
            all.push((seen.side, seen.direction, noted));
        }
        Fate::Pass
    });
    testbed.connection(family, FirstSpeaker::Server)?.finish(1000)?;
    drop(faulty);
    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(std::mem::take(&mut *all))
}

fn hop_limit(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let limit = |seen: &Seen<'_>| match seen.ip {
        NetSlice::Ipv4(ip) => Some(ip.header().ttl()),
        NetSlice::Ipv6(ip) => Some(ip.header().hop_limit()),
        _ => None,
    };
    for (side, direction, limit) in noted(testbed, family, limit)? {
        let sent = matches!(
            (side, direction),
            (Side::Client, Direction::ToBackend) | (Side::Backend, Direction::ToClient)
        );
        let expected = if sent { 64 } else { 63 };
        ensure!(limit == expected, "{side:?} {direction:?} has {limit}");
    }
    Ok(())
}

fn segment_size(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let headers = if family == Family::V4 { 40 } else { 60 };
    for (device, mtu) in [("wire-inside", 1300), ("wire-outside", 1290), ("wire-inside", 1500)] {
        testbed.edge().ip(&["link", "set", device, "mtu", &mtu.to_string()])?;
        let size = |seen: &Seen<'_>| {
            let mut options = seen.tcp.options_iterator();
            options.find_map(|option| match option {
                Ok(TcpOptionElement::MaximumSegmentSize(size)) => Some(size),
                _ => None,
            })
        };
        let sizes = noted(testbed, family, size);
        testbed.edge().ip(&["link", "set", device, "mtu", "1500"])?;
        let sizes = sizes?;
        ensure!(sizes.len() == 4, "{sizes:?}");
        for (side, direction, size) in sizes {
            let sent = matches!(
                (side, direction),
                (Side::Client, Direction::ToBackend) | (Side::Backend, Direction::ToClient)
            );
            let expected = if sent { 1500 } else { mtu } - headers;
            ensure!(size == expected, "{device} {mtu}: {side:?} {direction:?} has {size}");
        }
    }
    Ok(())
}

/// Ethernet pads short frames, and what it pads them with is no payload.
fn padded(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let listener = testbed.backend(family)?;
    let cookies::Client { frame, answered, .. } = cookies::client(testbed, family, 9400)?;
    let frame = Frame { flags: ACK, acknowledgement: answered, padding: 6, ..frame };
    let sequence = frame.sequence;
    let inject = |frame: &Frame| testbed.wire.inject(Side::Client, Direction::ToBackend, &frame.whole());
    inject(&frame)?;
    let mut server = accept(&listener)?;
    patient(&server)?;
    let (named, _) = header(&mut server)?;
    ensure!(named == frame.source, "the header names {named}");
    inject(&frame)?;
    inject(&Frame { flags: ACK | PSH, payload: b"first".to_vec(), ..frame.clone() })?;
    inject(&Frame { sequence: sequence.wrapping_add(5), ..frame.clone() })?;
    let next = Frame { sequence: sequence.wrapping_add(5), flags: ACK | PSH, ..frame };
    inject(&Frame { payload: b"second".to_vec(), ..next })?;
    expect(&mut server, b"firstsecond")?;
    socket2::SockRef::from(&server).set_linger(Some(Duration::ZERO))?;
    Ok(())
}

/// SYNs that the program cannot read, to the backend's host: a host behind the edge may use whatever the
/// edge forwards, except for PROXY ports.
fn unreadable(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let _listener = testbed.backend(family)?;
    let other = std::net::SocketAddr::new(wire_testbed::backend(family).ip(), OTHER_PORT);
    let _other = testbed.backend_side().run(|| std::net::TcpListener::bind(other))??;
    let _forwarding = Forwarding::new(testbed.edge())?;
    let template = Frame { flags: SYN, options: vec![2, 4, 5, 0xA0], ..Frame::of_a_client(testbed, family)? };
    let mut rng = Rng::with_seed(7);
    let before = testbed.counted("unreadable")?;
    for (number, port) in (9500..).zip([OTHER_PORT, BACKEND_PORT].into_iter().cycle().take(8)) {
        let mut source = template.source;
        source.set_port(number);
        let mut destination = other;
        destination.set_port(port);
        let frame = Frame { source, destination, sequence: number.into(), ..template.clone() };
        let frames = if (number - 9500) % 4 < 2 {
            vec![Frame { extra: Extra::Extension, ..frame }.whole()]
        } else {
            // The first one has the whole TCP header (RFC 7112).
            let frame = Frame { options: vec![1; 12], payload: vec![0; 16], ..frame };
            let least = frame.link.len() + if family == Family::V4 { 20 } else { 48 } + 32;
            let whole = |frames: &Vec<Vec<u8>>| frames.len() == 1 || frames[0].len() >= least;
            std::iter::repeat_with(|| frame.fragments(&mut rng)).find(whole).unwrap_or_default()
        };
        let (sender, answers) = std::sync::mpsc::channel();
        let _watching = testbed.wire.faults(move |seen| {
            if seen.at(Side::Backend, Direction::ToClient) && seen.is_syn_ack() {
                let _ = sender.send(seen.tcp.source_port());
            }
            Fate::Pass
        });
        testbed.wire.watch(number);
        for frame in frames {
            testbed.wire.inject(Side::Client, Direction::ToBackend, &frame)?;
        }
        let limit = Duration::from_millis(if port == OTHER_PORT { 2000 } else { 100 });
        let answered = answers.recv_timeout(limit);
        ensure!(answered.is_ok() == (port == OTHER_PORT), "port {port}: {answered:?}");
    }
    let dropped = testbed.counted("unreadable")? - before;
    ensure!(dropped == 4, "{dropped} were counted");
    if family == Family::V6 {
        let other = Frame { destination: other, ..template };
        hidden(testbed, &other)?;
    }
    Ok(())
}

/// A PROXY port behind more headers than the program reads, after a packet whose port it has read.
fn hidden(testbed: &WireTestbed, other: &Frame) -> anyhow::Result<()> {
    const PACKETS: u16 = 16;
    let before = testbed.counted("unreadable")?;
    let (sender, answers) = std::sync::mpsc::channel();
    let _watching = testbed.wire.faults(move |seen| {
        if seen.at(Side::Backend, Direction::ToClient) && seen.is_syn_ack() {
            let _ = sender.send(seen.tcp.source_port());
        }
        Fate::Pass
    });
    for number in 9600..9600 + PACKETS {
        let mut source = other.source;
        source.set_port(number);
        let mut destination = other.destination;
        destination.set_port(BACKEND_PORT);
        let other = Frame { source, sequence: number.into(), ..other.clone() };
        let hidden = Frame { destination, extra: Extra::ManyExtensions, ..other.clone() };
        testbed.wire.watch(number);
        for frame in [other, hidden] {
            testbed.wire.inject(Side::Client, Direction::ToBackend, &frame.whole())?;
        }
        let answer = answers.recv_timeout(LIMIT)?;
        ensure!(answer == OTHER_PORT, "port {answer} has answered");
    }
    ensure!(answers.recv_timeout(Duration::from_millis(100)).is_err(), "a PROXY port has answered");
    let dropped = testbed.counted("unreadable")? - before;
    ensure!(dropped == u64::from(PACKETS), "{dropped} were counted");
    Ok(())
}
