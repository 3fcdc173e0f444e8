//! The inline engine: one program at the ingress of every device. It takes a client's SYN to a listener, opens a connection to a
//! backend, translates addresses and ports of both directions, adds the header to what the client sends first, and shifts
//! sequence numbers behind it. What it does not take goes on to the host's own sockets.
//!
//! Decisions are in `injector_common::inline`; here they are carried out. The program exists twice: for devices with an Ethernet header,
//! and for those without (`inline_raw`). `start_sweep` starts the timer that removes what is over.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "atomic instructions have no other name on this target")]

#[path = "../bans.rs"]
#[expect(dead_code, reason = "the guard's programs use the rest")]
mod bans;
#[path = "../fib.rs"]
#[expect(dead_code, reason = "the guard's programs use the rest")]
mod fib;
#[path = "../mem.rs"]
mod mem;
#[path = "../object.rs"]
mod object;

mod backend;
mod client;
mod established;
mod forward;
mod header;
mod icmp;
mod maps;
mod open;
mod options;
mod packet;
mod route;
mod source;
mod sweep;

use aya_ebpf::{helpers::generated::bpf_skb_vlan_pop, macros::classifier, programs::TcContext};
use injector_common::inline::{ACK, Counter, Entry, SYN};

use self::packet::{Ethernet, Link, Packet, Parsed, Raw};

/// To the next program, and then on its way (`TCX_NEXT`; `TC_ACT_UNSPEC` for older kernels).
const NEXT: i32 = -1;
/// Nowhere (`TC_ACT_SHOT`, `TCX_DROP`).
const DROP: i32 = 2;

/// `skb->mark` of a copy of the client's first bytes that comes in again, behind the header.
const MARK_REST: u32 = 0x1A9E_C710;

#[classifier]
fn inline(skb: TcContext) -> i32 {
    receive::<Ethernet>(&skb)
}

#[classifier]
fn inline_raw(skb: TcContext) -> i32 {
    receive::<Raw>(&skb)
}

#[inline(always)]
fn receive<L: Link>(skb: &TcContext) -> i32 {
    /// `PACKET_HOST`: for this device, not for one that shares its wire (a bridge, macvlan).
    const FOR_THIS_DEVICE: u32 = 0;
    /// The number in a tag (`VLAN_VID_MASK`).
    const VLAN: u32 = 0x0FFF;

    // SAFETY: the program's own context.
    let (to, tagged, tag) =
        unsafe { ((*skb.skb.skb).pkt_type, (*skb.skb.skb).vlan_present, (*skb.skb.skb).vlan_tci) };
    // In the self-test, the kernel takes the start of an IP header for an address.
    if to != FOR_THIS_DEVICE && !route::is_self_test() {
        return NEXT;
    }
    // A tagged packet is that of the VLAN's device; without a number the tag is a priority only, and the packet this device's.
    // SAFETY: as above.
    if tagged != 0 && (tag & VLAN != 0 || unsafe { bpf_skb_vlan_pop(skb.skb.skb) } != 0) {
        return NEXT;
    }
    let Some(packet) = maps::packet(packet::is_ipv6(skb)) else { return NEXT };
    match packet::parse::<L>(skb, packet) {
        Parsed::Tcp => {}
        Parsed::Unreadable => return unreadable(packet),
        Parsed::Icmp => return icmp::error::<L>(skb, packet),
        Parsed::Other => return NEXT,
    }
    let begins = packet.segment.is(SYN) && !packet.segment.is(ACK);
    match maps::entry(&packet.key) {
        Some(entry) => match entry.origin {
            Entry::FROM_CLIENT if begins => open::syn::<L>(skb, packet, Some(entry)),
            Entry::FROM_CLIENT => client::receive::<L>(skb, packet, entry),
            Entry::FROM_BACKEND if packet.segment.is(SYN) => backend::answer_to_syn::<L>(skb, packet, entry),
            Entry::FROM_BACKEND => backend::receive::<L>(skb, packet, entry),
            _ => NEXT,
        },
        None if begins => open::syn::<L>(skb, packet, None),
        None => without_connection(packet),
    }
}

/// A packet that belongs to no connection. Only the injector reaches PROXY ports through this host: the backends
/// would believe any header.
#[inline(always)]
fn without_connection(packet: &Packet) -> i32 {
    if maps::is_proxy_port(&packet.key.destination) && !maps::is_peer(&packet.key.source) {
        maps::count(Counter::ProxyPort);
        return DROP;
    }
    NEXT
}

/// A part of TCP that is not read. Of other connections it goes on, to any other port of a backend's host as well.
#[inline(always)]
fn unreadable(packet: &Packet) -> i32 {
    let ours = maps::entry(&packet.key).is_some_and(|entry| entry.origin != Entry::FOREIGN);
    let destination = &packet.key.destination;
    let to_proxy_port =
        maps::is_proxy_port(destination) || (destination.port == 0 && maps::is_proxy_port(&packet.to_host()));
    if ours || (to_proxy_port && !maps::is_peer(&packet.key.source)) {
        maps::count(Counter::Unreadable);
        return DROP;
    }
    NEXT
}
