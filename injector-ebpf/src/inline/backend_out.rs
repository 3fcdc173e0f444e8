//! `backend_out`: at the egress of devices that lead to backends. Opens a flow for each SYN, adds the header to the end of the
//! handshake or to the client's first bytes, and shifts what the client sends.
//!
//! Fail closed: nothing that was forwarded reaches a backend's PROXY port without a flow.

use core::ptr::NonNull;

use aya_ebpf::{
    EbpfContext as _, helpers::generated::bpf_clone_redirect, macros::classifier, programs::TcContext,
};
use injector_common::inline::{
    ClientOwner, Counter, Flag, Flow, Key, OnSyn, SYN, Segment, ToBackend, client_owner, on_syn, to_backend,
};

use super::{
    DROP, MARK_HEADER_COPY, MARK_RETRANSMIT, NEXT, header, maps,
    packet::{
        ACKNOWLEDGEMENT, Ethernet, Failed, Link, Origin, Packet, Parsed, Raw, SEQUENCE, is_ipv6, parse, token,
    },
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
    if mark == MARK_RETRANSMIT && from == device {
        skb.set_mark(0);
        return NEXT;
    }
    // What starts on this host itself has no client: health checks, its own mail.
    let forwarded = from != 0;
    let Some(packet) = maps::packet(is_ipv6(skb)) else { return DROP };
    match parse::<L>(skb, packet, Origin::Client) {
        Parsed::Tcp => {}
        Parsed::Unreadable if forwarded && maps::is_backend(&packet.to_host()) => {
            maps::count(Counter::Fragment);
            return DROP;
        }
        _ => return NEXT,
    }
    let key = &packet.key;
    if !forwarded {
        // Its ports are its own from now on.
        if packet.segment.is_plain_syn() && maps::is_backend(&key.backend) {
            maps::yield_to_host(key);
        }
        return NEXT;
    }
    if packet.segment.is(SYN) {
        return if maps::is_backend(&key.backend) { open(skb, packet) } else { NEXT };
    }
    let flow = match owner(key, &packet.segment) {
        Owner::Flow(flow) => flow,
        Owner::Pending(flow) => {
            // SAFETY: a map value, valid while the program runs.
            let offset = unsafe { flow.as_ref() }.offset;
            return if later(skb, packet, offset).is_ok() { NEXT } else { DROP };
        }
        Owner::None if maps::is_backend(&key.backend) => {
            maps::count(Counter::NoFlow);
            return DROP;
        }
        Owner::None => return NEXT,
    };
    if mark == MARK_HEADER_COPY {
        skb.set_mark(0);
        return go_ahead(skb, packet, flow);
    }
    pass(skb, packet, flow)
}

/// A SYN: the first of a connection, or sent again.
#[inline(always)]
fn open(skb: &TcContext, packet: &Packet) -> i32 {
    let key = &packet.key;
    let Some(slot) = maps::take_syn(token(skb), packet.segment.sequence) else {
        maps::count(Counter::SynUnknown);
        return DROP;
    };
    // SAFETY: a map value, valid while the program runs.
    let pending = maps::pending(key).map(|flow| unsafe { flow.as_ref() });
    let offset = match (on_syn(pending, slot, &packet.segment), pending) {
        (OnSyn::Pass, Some(flow)) => Ok(flow.offset),
        (OnSyn::Open, _) => match maps::template(slot.listener, packet.ipv6) {
            Some(template) => maps::open(key, slot, packet.segment.sequence + 1, template)
                .ok_or(Counter::Full)
                .inspect(|_| maps::count(Counter::Opened)),
            None => Err(Counter::SynUnknown),
        },
        _ => Err(Counter::InvalidSyn),
    };
    match offset.and_then(|offset| later(skb, packet, offset)) {
        Ok(()) => NEXT,
        Err(counter) => {
            maps::count(counter);
            DROP
        }
    }
}

/// What decides about a segment that is no SYN.
enum Owner {
    /// An entry of `FLOWS`.
    Flow(NonNull<Flow>),
    /// An entry of `PENDING`.
    Pending(NonNull<Flow>),
    /// Nothing that is known here.
    None,
}

/// The flow that a segment belongs to. The one that ends the handshake makes it one that stays.
#[inline(always)]
fn owner(key: &Key, segment: &Segment) -> Owner {
    if let Some(flow) = maps::established(key) {
        return Owner::Flow(flow);
    }
    let Some(pending) = maps::pending(key) else { return Owner::None };
    // SAFETY: as in `open`.
    match client_owner(false, Some(unsafe { pending.as_ref() }), segment) {
        ClientOwner::Pending => Owner::Pending(pending),
        ClientOwner::Accepts => match maps::establish(key, pending) {
            Some(flow) => Owner::Flow(flow),
            None => {
                maps::count(Counter::Full);
                Owner::None
            }
        },
        ClientOwner::Established | ClientOwner::None => Owner::None,
    }
}

#[inline(always)]
fn pass(skb: &TcContext, packet: &Packet, flow: NonNull<Flow>) -> i32 {
    // SAFETY: a map value, valid while the program runs. Segments of one direction may be worked on by several processors:
    // bits are only ever set, and numbers that could then be off by one packet are statistics.
    let flow = unsafe { &mut *flow.as_ptr() };
    let segment = &packet.segment;
    if !flow.is(Flag::Acknowledged) {
        flow.window = packet.segment.window.into();
    }
    let done = match to_backend(flow, segment) {
        ToBackend::Pass => later(skb, packet, flow.offset),
        ToBackend::Drop => Err(Counter::InvalidSegment),
        ToBackend::Shift => later(skb, packet, flow.shift()),
        ToBackend::ShiftOlder => packet
            .set_number(skb, ACKNOWLEDGEMENT, segment.acknowledgement, segment.acknowledgement - Flow::LESS)
            .map_err(|_| Counter::RewriteFailed)
            .and_then(|()| later(skb, packet, flow.shift())),
        ToBackend::Append => header::append(skb, packet, flow)
            .map_err(|_| Counter::AppendFailed)
            .and_then(|()| later(skb, packet, flow.offset))
            .map(|()| sent(flow, Counter::Appended)),
        ToBackend::Defer => {
            flow.set(Flag::Deferred);
            maps::count(Counter::Deferred);
            maps::touch(flow);
            return DROP;
        }
        ToBackend::Prepend => match header::prepend(skb, packet, flow) {
            Ok(true) => later(skb, packet, flow.offset).map(|()| sent(flow, Counter::Prepended)),
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

/// Makes the segment's number later by so much.
#[inline(always)]
fn later(skb: &TcContext, packet: &Packet, more: u32) -> Result<(), Counter> {
    let sequence = packet.segment.sequence;
    packet.set_number(skb, SEQUENCE, sequence, sequence + more).map_err(|_| Counter::RewriteFailed)
}

/// Sends a copy of the packet ahead, which comes through this program by itself and becomes the header ([`go_ahead`]). It leaves
/// without the packet's mark, in whose place it has ours.
#[inline(always)]
fn follow(skb: &TcContext, packet: &Packet, flow: &mut Flow) -> Result<(), Counter> {
    // SAFETY: the program's own context.
    let (mark, device) = unsafe { ((*skb.skb.skb).mark, (*skb.skb.skb).ifindex) };
    // Before it: the backend's answer may be here before this program has ended.
    flow.set(Flag::Sent);
    skb.set_mark(MARK_HEADER_COPY);
    // SAFETY: as above. The program that runs meanwhile reads the same packet into the same `Packet`.
    let result = unsafe { bpf_clone_redirect(skb.as_ptr().cast(), device, 0) };
    skb.set_mark(mark);
    if result != 0 {
        return Err(Counter::AppendFailed);
    }
    sent(flow, Counter::SentAhead);
    later(skb, packet, flow.shift())
}

/// A copy of the client's first bytes becomes the header.
#[inline(always)]
fn go_ahead(skb: &TcContext, packet: &mut Packet, flow: NonNull<Flow>) -> i32 {
    // SAFETY: as in `pass`.
    let flow = unsafe { flow.as_ref() };
    let segment = &packet.segment;
    let first = segment.sequence == flow.first && !flow.is(Flag::Acknowledged);
    if !first || header::replace(skb, packet, flow).is_err() || later(skb, packet, flow.offset).is_err() {
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
    flow.note_from_client(segment, maps::now);
    maps::emit_end(key, flow);
}
