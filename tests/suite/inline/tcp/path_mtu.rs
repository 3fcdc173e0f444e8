//! A narrower link behind the edge.

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
use crate::wire_testbed::{FirstSpeaker, WireTestbed, through};

/// A router in front of a narrower link behind the edge sends ICMP errors: the client must get them
/// with its own sequence numbers, accept them, and send less at once. (Linux accepts any number in
/// flight; other systems need not.)
pub(super) fn path_mtu(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    const MTU: u16 = 1300;
    let answers = Arc::new(AtomicU32::new(0));
    let (count, layer) = (Arc::clone(&answers), testbed.layer);
    let sent = Arc::new(Mutex::new(HashSet::new()));
    let sending = Arc::clone(&sent);
    let _faulty = testbed.wire.faults(move |seen| {
        if seen.at(Side::Client, Direction::ToBackend) && seen.is_data() {
            sending.lock().unwrap_or_else(PoisonError::into_inner).insert(seen.tcp.sequence_number());
        }
        narrow_link(seen, layer, MTU, &count)
    });
    let connection = testbed.connection(family, FirstSpeaker::Server)?;
    let start = Instant::now();
    through(&connection.client, &connection.server, BYTES, 0)?;
    let took = start.elapsed();
    let answers = answers.load(Ordering::Relaxed);
    eprintln!("    1 MiB in {took:.0?}, {answers} packets were too big");
    ensure!(answers > 0, "nothing was too big");
    ensure!(took < Duration::from_secs(2), "it took {took:?}");
    let quoted = testbed.wire.quoted();
    let sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(!quoted.is_empty(), "the client got no ICMP error");
    ensure!(quoted.iter().all(|number| sent.contains(number)), "of {quoted:?} the client has sent {sent:?}");
    forget_path_mtu(testbed)
}

/// A narrower link behind the edge, whose router responds to packets that are too big, and counts
/// them.
pub(crate) fn narrow_link(seen: &Seen<'_>, layer: Layer, mtu: u16, answers: &AtomicU32) -> Fate {
    let too_big = seen.frame.len() - seen.ip_at > usize::from(mtu);
    if !seen.at(Side::Backend, Direction::ToBackend) || !too_big {
        return Fate::Pass;
    }
    answers.fetch_add(1, Ordering::Relaxed);
    too_big_for(seen, layer, mtu).map_or(Fate::Drop, Fate::Answer)
}

/// The client stores the path MTU for ten minutes; other trials must start without it.
pub(crate) fn forget_path_mtu(testbed: &WireTestbed) -> anyhow::Result<()> {
    let flush = ["route", "flush", "cache"];
    testbed.client_side().ip(&flush)?;
    testbed.client_side().ip(&[&["-6"], &flush[..]].concat())
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
