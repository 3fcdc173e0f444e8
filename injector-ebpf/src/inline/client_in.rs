//! `client_in`: at the ingress of devices that clients come by. Remembers who sends a SYN, before NAT hides it.

use core::mem::MaybeUninit;

use aya_ebpf::{macros::classifier, programs::TcContext};
use injector_common::inline::{ACK, Counter, HeaderAddresses, SYN};

use super::{
    DROP, NEXT, maps, mem,
    packet::{Ethernet, Link, Origin, Packet, Parsed, Raw, is_ipv6, is_not_syn, parse, set_token},
};

#[classifier]
fn client_in(skb: TcContext) -> i32 {
    look::<Ethernet>(&skb)
}

#[classifier]
fn client_in_raw(skb: TcContext) -> i32 {
    look::<Raw>(&skb)
}

#[inline(always)]
fn look<L: Link>(skb: &TcContext) -> i32 {
    if is_not_syn::<L>(skb) {
        return NEXT;
    }
    // Another network namespace may have set it.
    set_token(skb, 0);
    let Some(packet) = maps::packet(is_ipv6(skb)) else { return NEXT };
    // Its destination stands where a backend's would.
    let Parsed::Tcp = parse::<L>(skb, packet, Origin::Client) else { return NEXT };
    let segment = packet.segment;
    if !segment.is(SYN) || segment.is(ACK) {
        return NEXT;
    }
    let Some(listener) = maps::listener(&packet.key.backend, packet.ipv6) else { return NEXT };
    // The header's place would be in front of data that the backend may take before the handshake.
    if segment.payload != 0 {
        maps::count(Counter::FastOpen);
        return DROP;
    }
    if let Some(token) = cache_syn(skb, packet, listener) {
        set_token(skb, token);
        maps::count(Counter::SynCached);
    }
    // Otherwise `backend_out` will drop it.
    NEXT
}

#[inline(always)]
fn cache_syn(skb: &TcContext, packet: &Packet, listener: u32) -> Option<u16> {
    let mut addresses = MaybeUninit::<HeaderAddresses>::uninit();
    // SAFETY: the value's own place; zeroed, it is one.
    let addresses = unsafe {
        mem::zero(addresses.as_mut_ptr());
        addresses.assume_init_mut()
    };
    packet.read_addresses(skb, addresses).ok()?;
    maps::cache_syn(packet.segment.sequence, listener, addresses)
}
