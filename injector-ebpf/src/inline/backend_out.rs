//! `backend_out`: at the egress of devices that lead to backends. Opens a flow for each SYN, adds the header to the end of the
//! handshake or to the client's first bytes, and shifts what the client sends.
//!
//! Fail closed: nothing that was forwarded reaches a backend's PROXY port without a flow.

use core::ptr::NonNull;

use aya_ebpf::{
    EbpfContext as _, helpers::generated::bpf_clone_redirect, macros::classifier, programs::TcContext,
};
use injector_common::inline::{Counter, FIN, Flag, Flow, Key, RST, SYN, Segment, ToBackend, to_backend};

use super::{
    AHEAD, ANSWER, DROP, NEXT, header, maps,
    packet::{Ethernet, Failed, From, Link, Packet, Parsed, Raw, SEQUENCE, is_ipv6, parse},
    words,
};

#[classifier]
fn backend_out(skb: TcContext) -> i32 {
    send::<Ethernet>(&skb)
}

#[classifier]
fn backend_out_raw(skb: TcContext) -> i32 {
    send::<Raw>(&skb)
}

#[inline(always)]
fn send<L: Link>(skb: &TcContext) -> i32 {
    // SAFETY: the program's own context.
    let (mark, from, device) =
        unsafe { ((*skb.skb.skb).mark, (*skb.skb.skb).ingress_ifindex, (*skb.skb.skb).ifindex) };
    if mark == ANSWER && from == device {
        skb.set_mark(0);
        return NEXT;
    }
    // What starts on this host itself has no client: health checks, its own mail.
    let forwarded = from != 0;
    let Some(packet) = maps::packet(is_ipv6(skb)) else { return DROP };
    match parse::<L>(skb, packet, From::Client) {
        Parsed::Tcp => {}
        Parsed::Unreadable if forwarded && maps::is_backend(&packet.to_host()) => {
            maps::count(Counter::Fragment);
            return DROP;
        }
        _ => return NEXT,
    }
    let key = &packet.key;
    if packet.segment.is(SYN) {
        return if forwarded && maps::is_backend(&key.backend) { open(packet) } else { NEXT };
    }
    let Some(flow) = flow(key, &packet.segment) else {
        if forwarded && maps::is_backend(&key.backend) {
            maps::count(Counter::NoFlow);
            return DROP;
        }
        return NEXT;
    };
    if mark == AHEAD {
        skb.set_mark(0);
        return go_ahead(skb, packet, flow);
    }
    pass(skb, packet, flow)
}

/// A SYN: the first of a connection, or sent again.
#[inline(always)]
fn open(packet: &Packet) -> i32 {
    let key = &packet.key;
    let first = packet.segment.sequence.wrapping_add(1);
    let Some(slot) = maps::recall(packet.segment.sequence) else {
        maps::count(Counter::NoSlot);
        return DROP;
    };
    if let Some(flow) = maps::established(key) {
        // SAFETY: a map value, valid while the program runs.
        let flow = unsafe { flow.as_ref() };
        // A late copy of this connection's own SYN.
        if flow.first == first && !flow.closed() {
            return NEXT;
        }
    }
    if let Some(flow) = maps::pending(key) {
        // Sent again. What the backend has answered meanwhile is still true.
        // SAFETY: as above.
        if unsafe { flow.as_ref() }.is_of(slot) {
            return NEXT;
        }
    }
    let Some(template) = maps::template(slot.listener, packet.ipv6) else {
        maps::count(Counter::NoSlot);
        return DROP;
    };
    if !maps::open(key, slot, template) {
        maps::count(Counter::Full);
        return DROP;
    }
    maps::count(Counter::Opened);
    NEXT
}

/// The flow that a segment belongs to. The one that ends the handshake makes it one that stays.
#[inline(always)]
fn flow(key: &Key, segment: &Segment) -> Option<NonNull<Flow>> {
    if let Some(flow) = maps::established(key) {
        return Some(flow);
    }
    let pending = maps::pending(key)?;
    // SAFETY: as in `open`.
    let flow = unsafe { pending.as_ref() };
    if segment.is(RST) {
        return Some(pending);
    }
    if !flow.is_accepted_by(segment) {
        return None;
    }
    let established = maps::establish(key, pending);
    if established.is_none() {
        maps::count(Counter::Full);
    }
    established
}

#[inline(always)]
fn pass(skb: &TcContext, packet: &Packet, flow: NonNull<Flow>) -> i32 {
    // SAFETY: a map value, valid while the program runs. Segments of one direction may be worked on by several processors:
    // bits are only ever set, and numbers that could then be off by one packet are statistics.
    let flow = unsafe { &mut *flow.as_ptr() };
    let segment = &packet.segment;
    if !flow.is(Flag::Acknowledged) {
        flow.acknowledged = segment.acknowledgement;
        flow.window = packet.segment.window.into();
    }
    let done = match to_backend(flow, segment) {
        ToBackend::Pass => Ok(()),
        ToBackend::Shift => shift(skb, packet, flow),
        ToBackend::Append => header::append(skb, packet, flow)
            .map_err(|_| Counter::AppendFailed)
            .map(|()| sent(flow, Counter::Appended)),
        ToBackend::Wait => {
            flow.set(Flag::Waited);
            maps::count(Counter::Waited);
            maps::touch(flow);
            return DROP;
        }
        ToBackend::Prepend => match header::prepend(skb, packet, flow) {
            Ok(true) => Ok(sent(flow, Counter::Prepended)),
            Ok(false) => follow(skb, packet, flow),
            Err(Failed) => Err(Counter::AppendFailed),
        },
        ToBackend::Follow => follow(skb, packet, flow),
    };
    if let Err(failed) = done {
        maps::count(failed);
        return DROP;
    }
    account(&packet.key, flow, segment);
    NEXT
}

#[inline(always)]
fn sent(flow: &mut Flow, how: Counter) {
    flow.set(Flag::Sent);
    flow.appended += 1;
    maps::count(how);
}

#[inline(always)]
fn shift(skb: &TcContext, packet: &Packet, flow: &Flow) -> Result<(), Counter> {
    let sequence = packet.segment.sequence;
    let shifted = sequence.wrapping_add(flow.header_len);
    packet.set_u32(skb, SEQUENCE, sequence, shifted).map_err(|_| Counter::RewriteFailed)
}

/// Sends a copy of the packet ahead, which comes through this program by itself and becomes the header ([`go_ahead`]). It leaves
/// without the packet's mark, in whose place it has ours.
#[inline(always)]
fn follow(skb: &TcContext, packet: &Packet, flow: &mut Flow) -> Result<(), Counter> {
    // SAFETY: the program's own context.
    let (mark, device) = unsafe { ((*skb.skb.skb).mark, (*skb.skb.skb).ifindex) };
    skb.set_mark(AHEAD);
    // SAFETY: as above. The program that runs meanwhile reads the same packet into the same `Packet`.
    let result = unsafe { bpf_clone_redirect(skb.as_ptr().cast(), device, 0) };
    skb.set_mark(mark);
    if result != 0 {
        return Err(Counter::AppendFailed);
    }
    sent(flow, Counter::SentAhead);
    shift(skb, packet, flow)
}

/// A copy of the client's first bytes becomes the header.
#[inline(always)]
fn go_ahead(skb: &TcContext, packet: &mut Packet, flow: NonNull<Flow>) -> i32 {
    // SAFETY: as in `pass`.
    let flow = unsafe { flow.as_ref() };
    let segment = &packet.segment;
    let first = segment.sequence == flow.first && !flow.is(Flag::Acknowledged);
    if !first || header::replace(skb, packet, flow).is_err() {
        maps::count(Counter::AppendFailed);
        return DROP;
    }
    NEXT
}

#[inline(always)]
fn account(key: &Key, flow: &mut Flow, segment: &Segment) {
    maps::touch(flow);
    flow.to_backend.packets += 1;
    flow.to_backend.bytes += u64::from(segment.payload);
    if segment.is(FIN | RST) && !flow.closed() {
        flow.last_ns = maps::now();
        if segment.is(RST) {
            flow.set(Flag::ClientRst);
            words::apart();
        } else {
            if !flow.is(Flag::BackendFin) {
                flow.set(Flag::ClientFirst);
            }
            flow.set(Flag::ClientFin);
        }
    }
    maps::tell_of_end(key, flow);
}
