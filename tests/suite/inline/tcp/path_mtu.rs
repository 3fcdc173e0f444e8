//! Narrower links than the edge's.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::ensure;
use etherparse::{Icmpv4Type, Icmpv6Type, NetSlice, PacketBuilder, icmpv4::DestUnreachableHeader};
use injector_testbed::netns::Family;

use super::BYTES;
use crate::wire::{Direction, Fate, Layer, Seen, Side};
use crate::wire_testbed::{Connection, FirstSpeaker, WireTestbed, through};

const MTU: u16 = 1300;

/// A router in front of a narrower link behind the edge, or in front of the client, sends ICMP errors:
/// the sender must get them with its own sequence numbers, accept them, and send less at once. (Linux
/// accepts any number in flight; other systems need not.)
pub(super) fn path_mtu(testbed: &WireTestbed, family: Family, direction: Direction) -> anyhow::Result<()> {
    let answers = Arc::new(AtomicU32::new(0));
    let (count, layer) = (Arc::clone(&answers), testbed.layer);
    let (near, far) = links(direction);
    transfer(testbed, family, direction, move |seen| {
        if seen.side == far { narrow(seen, (far, direction), layer, MTU, &count) } else { Fate::Pass }
    })?;
    let answers = answers.load(Ordering::Relaxed);
    eprintln!("    {answers} packets were too big");
    ensure!(answers > 0, "nothing was too big");
    ensure!(!testbed.wire.quoted(near).is_empty(), "the sender got no ICMP error");
    Ok(())
}

/// The edge's own device has become narrower since the handshake: it answers what is too long itself,
/// though it does not forward.
pub(super) fn own_answer(testbed: &WireTestbed, family: Family, direction: Direction) -> anyhow::Result<()> {
    let before = testbed.counted("too_big")?;
    let device = if direction == Direction::ToBackend { "wire-inside" } else { "wire-outside" };
    let connection = testbed.connection(family, FirstSpeaker::Server)?;
    let mtu = |mtu: &str| testbed.edge().ip(&["link", "set", device, "mtu", mtu]);
    mtu("1300")?;
    // Longer than a route is used.
    std::thread::sleep(Duration::from_millis(1100));
    let outcome = transfer_by(testbed, &connection, direction, |_| Fate::Pass);
    mtu("1500")?;
    outcome?;
    ensure!(testbed.counted("too_big")? > before, "nothing was too big");
    Ok(())
}

/// The link of the sender, and that of the receiver.
fn links(direction: Direction) -> (Side, Side) {
    match direction {
        Direction::ToBackend => (Side::Client, Side::Backend),
        Direction::ToClient => (Side::Backend, Side::Client),
    }
}

fn transfer(
    testbed: &WireTestbed,
    family: Family,
    direction: Direction,
    faults: impl FnMut(&Seen<'_>) -> Fate + Send + 'static,
) -> anyhow::Result<()> {
    let connection = testbed.connection(family, FirstSpeaker::Server)?;
    transfer_by(testbed, &connection, direction, faults)
}

/// The transfer is fast, and ICMP errors to the sender quote only numbers that it has sent.
fn transfer_by(
    testbed: &WireTestbed,
    connection: &Connection,
    direction: Direction,
    mut faults: impl FnMut(&Seen<'_>) -> Fate + Send + 'static,
) -> anyhow::Result<()> {
    let sent = Arc::new(Mutex::new(HashSet::new()));
    let sending = Arc::clone(&sent);
    let (near, _) = links(direction);
    let _faulty = testbed.wire.faults(move |seen| {
        if seen.at(near, direction) && seen.is_data() {
            sending.lock().unwrap_or_else(PoisonError::into_inner).insert(seen.tcp.sequence_number());
        }
        faults(seen)
    });
    for stream in [&connection.client, &connection.server] {
        testbed.wire.watch(stream.local_addr()?.port());
        testbed.wire.watch(stream.peer_addr()?.port());
    }
    let start = Instant::now();
    let (from, to) = match direction {
        Direction::ToBackend => (&connection.client, &connection.server),
        Direction::ToClient => (&connection.server, &connection.client),
    };
    through(from, to, BYTES, 0)?;
    let took = start.elapsed();
    eprintln!("    1 MiB in {took:.0?}");
    ensure!(took < Duration::from_secs(2), "it took {took:?}");
    let quoted = testbed.wire.quoted(near);
    let sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(quoted.iter().all(|number| sent.contains(number)), "of {quoted:?} the sender has sent {sent:?}");
    forget_path_mtu(testbed)
}

/// A narrower link behind the edge, whose router responds to packets that are too big, and counts
/// them.
pub(crate) fn narrow_link(seen: &Seen<'_>, layer: Layer, mtu: u16, answers: &AtomicU32) -> Fate {
    narrow(seen, (Side::Backend, Direction::ToBackend), layer, mtu, answers)
}

fn narrow(seen: &Seen<'_>, at: (Side, Direction), layer: Layer, mtu: u16, answers: &AtomicU32) -> Fate {
    let too_big = seen.frame.len() - seen.ip_at > usize::from(mtu);
    if !seen.at(at.0, at.1) || !too_big {
        return Fate::Pass;
    }
    answers.fetch_add(1, Ordering::Relaxed);
    too_big_for(seen, layer, mtu).map_or(Fate::Drop, Fate::Answer)
}

/// Hosts store the path MTU for ten minutes; other trials must start without it.
pub(crate) fn forget_path_mtu(testbed: &WireTestbed) -> anyhow::Result<()> {
    let flush = ["route", "flush", "cache"];
    for netns in [testbed.client_side(), testbed.backend_side()] {
        netns.ip(&flush)?;
        netns.ip(&[&["-6"], &flush[..]].concat())?;
    }
    Ok(())
}

/// The router's ICMP error: RFC 792 and 1191, RFC 4443 section 3.2.
fn too_big_for(seen: &Seen<'_>, layer: Layer, mtu: u16) -> Option<Vec<u8>> {
    let packet = &seen.frame[seen.ip_at..];
    let quote = &packet[..packet.len().min(500)];
    let link = match layer {
        Layer::Ethernet => {
            let [to, from] = [seen.frame.first_chunk()?, seen.frame.get(6..)?.first_chunk()?];
            Some(PacketBuilder::ethernet2(*to, *from))
        }
        Layer::Ip => None,
    };
    let mut frame = Vec::new();
    match seen.ip {
        NetSlice::Ipv4(ip) => {
            let to = ip.header().source();
            let router = Ipv4Addr::new(10, 26, 0, 2).octets();
            let kind = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                next_hop_mtu: mtu,
            });
            let step = match link {
                Some(link) => link.ipv4(router, to, 64),
                None => PacketBuilder::ipv4(router, to, 64),
            };
            step.icmpv4(kind).write(&mut frame, quote).ok()?;
        }
        NetSlice::Ipv6(ip) => {
            let (from, to) = (ip.header().destination(), ip.header().source());
            let kind = Icmpv6Type::PacketTooBig { mtu: u32::from(mtu) };
            let step = match link {
                Some(link) => link.ipv6(from, to, 64),
                None => PacketBuilder::ipv6(from, to, 64),
            };
            step.icmpv6(kind).write(&mut frame, quote).ok()?;
        }
        _ => return None,
    }
    Some(frame)
}
