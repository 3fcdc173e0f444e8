//! Packets from clients: adds the header to the end of the handshake or to the client's first bytes, and shifts what the client sends.

use core::mem::MaybeUninit;

use aya_ebpf::{EbpfContext as _, helpers::generated::bpf_clone_redirect, programs::TcContext};
use injector_common::{
    SeqNumber,
    inline::{ClientOwner, Counter, Entry, Flag, Flow, Key, Phase, ToBackend, client_owner, to_backend},
};

use super::{
    DROP, MARK_REST, NEXT, established, forward, header, icmp, maps,
    maps::Count,
    packet::{Failed, Link, Packet},
    source,
};

/// A packet with the addresses of a client's connection.
#[inline(never)]
pub(super) fn receive<L: Link>(skb: &TcContext, packet: &mut Packet, entry: &mut Entry) -> i32 {
    let segment = &packet.segment;
    let slot = entry.pending;
    let pending = maps::connection(slot);
    let slot = match (client_owner(entry.established != 0, pending.as_deref(), segment), pending) {
        (ClientOwner::Established, _) => entry.established,
        (ClientOwner::Accepts, Some(flow)) => {
            if !establish(entry, slot, flow) {
                return DROP;
            }
            slot
        }
        (ClientOwner::Pending, Some(flow)) => return reset_pending::<L>(skb, packet, flow),
        // The host's own socket may have this connection.
        _ => return NEXT,
    };
    match maps::connection(slot) {
        // An entry must never lead to another's connection.
        Some(flow) if !flow.client_side.tuple.answers(&packet.tuple()) => DROP,
        Some(flow) => pass::<L>(skb, packet, slot, flow),
        None => NEXT,
    }
}

/// The client has answered the backend. An older connection of the same addresses and ports is over. `false` if the sweep was
/// quicker.
#[inline(never)]
fn establish(entry: &mut Entry, slot: u32, flow: &mut Flow) -> bool {
    // First: what the sweep takes out must not be entered again.
    if !maps::move_on(flow, Phase::Pending, Phase::Established) {
        return flow.phase == Phase::Established as u64;
    }
    maps::change(flow.listener, Count::Pending, false);
    established::set_counted(flow, true);
    source::establish(flow);
    maps::accepted(flow.listener);
    maps::count(Counter::Established);
    let earlier = entry.established;
    entry.established = slot;
    entry.pending = 0;
    if let Some(earlier_flow) = maps::connection(earlier) {
        established::supersede(earlier, earlier_flow);
    }
    let mut key = MaybeUninit::<Key>::uninit();
    let key = maps::reversed_key(&flow.backend_side.tuple, &mut key);
    if let Some(entry) = maps::entry(key) {
        // One of another listener, with the client's own port as well.
        let earlier = entry.established;
        if let Some(earlier_flow) = maps::connection(earlier) {
            earlier_flow.set(Flag::Replaced);
            established::supersede(earlier, earlier_flow);
        }
        entry.established = slot;
        entry.pending = 0;
    }
    true
}

/// The client gives up before it has a connection.
#[inline(never)]
fn reset_pending<L: Link>(skb: &TcContext, packet: &mut Packet, flow: &mut Flow) -> i32 {
    let sequence = packet.segment.sequence + flow.offset;
    let now_ns = maps::now();
    let sent = forward::check(skb, packet, &mut flow.backend_side, now_ns).and_then(|()| {
        let acknowledgement = packet.segment.acknowledgement;
        forward::send::<L>(skb, packet, &flow.backend_side, sequence, acknowledgement)
            .map_err(|_| Counter::RewriteFailed)
    });
    sent.unwrap_or_else(|counter| {
        maps::count(counter);
        DROP
    })
}

#[inline(always)]
fn pass<L: Link>(skb: &TcContext, packet: &mut Packet, slot: u32, flow: &mut Flow) -> i32 {
    let now_ns = maps::touch(flow);
    if let Err(counter) = forward::check(skb, packet, &mut flow.backend_side, now_ns) {
        maps::count(counter);
        if counter == Counter::TooBig {
            let mtu = flow.backend_side.hop.mtu;
            return icmp::too_big::<L>(skb, packet, &mut flow.client_side, mtu, now_ns);
        }
        return DROP;
    }
    if !flow.is(Flag::Acknowledged) {
        flow.window = packet.segment.window.into();
    }
    let segment = packet.segment;
    let (plain, shifted) = (segment.sequence + flow.offset, segment.sequence + flow.shift());
    let mut acknowledgement = segment.acknowledgement;
    let mut way = to_backend(flow, &segment);
    // SAFETY: the program's own context.
    if unsafe { (*skb.skb.skb).mark } == MARK_REST {
        skb.set_mark(0);
        // What follows the header by itself: `follow` has sent it round.
        if way == ToBackend::Follow && flow.is(Flag::Sent) {
            way = ToBackend::Shift;
        }
    }
    let sequence: Result<SeqNumber, Counter> = match way {
        ToBackend::Pass => Ok(plain),
        ToBackend::Drop => Err(Counter::InvalidSegment),
        ToBackend::Shift => Ok(shifted),
        ToBackend::ShiftOlder => {
            acknowledgement = acknowledgement - Flow::LESS;
            Ok(shifted)
        }
        ToBackend::Append => header::append(skb, packet, flow)
            .map_err(|_| Counter::AppendFailed)
            .map(|()| sent(flow, Counter::Appended, plain)),
        ToBackend::Defer => {
            flow.set(Flag::Deferred);
            maps::count(Counter::Deferred);
            return DROP;
        }
        ToBackend::Prepend => match header::prepend(skb, packet, flow) {
            Ok(true) => Ok(sent(flow, Counter::Prepended, plain)),
            Ok(false) => follow(skb, packet, flow).map(|()| plain),
            Err(Failed) => Err(Counter::AppendFailed),
        },
        ToBackend::Follow => follow(skb, packet, flow).map(|()| plain),
    };
    let left = sequence.and_then(|sequence| {
        forward::send::<L>(skb, packet, &flow.backend_side, sequence, acknowledgement)
            .map_err(|_| Counter::RewriteFailed)
    });
    match left {
        Ok(redirected) => {
            flow.to_backend.packets += 1;
            // What was sent round counts when it comes again.
            if !matches!(way, ToBackend::Follow) {
                flow.to_backend.bytes += u64::from(segment.payload);
                flow.note_from_client(&segment, maps::now);
            }
            established::emit_end(slot, flow);
            redirected
        }
        Err(counter) => {
            maps::count(counter);
            DROP
        }
    }
}

#[inline(always)]
fn sent(flow: &mut Flow, how: Counter, sequence: SeqNumber) -> SeqNumber {
    flow.set(Flag::Sent);
    flow.appended += 1;
    maps::count(how);
    sequence
}

/// Makes the packet the header alone. A copy of it as it was comes in again behind it, by the same device, and follows.
#[inline(never)]
fn follow(skb: &TcContext, packet: &mut Packet, flow: &mut Flow) -> Result<(), Counter> {
    /// `BPF_F_INGRESS`
    const INGRESS: u64 = 1;

    // SAFETY: the program's own context.
    let (mark, device) = unsafe { ((*skb.skb.skb).mark, (*skb.skb.skb).ifindex) };
    // Before it: the copy may be here before this program has ended.
    flow.set(Flag::Sent);
    skb.set_mark(MARK_REST);
    // SAFETY: as above.
    let result = unsafe { bpf_clone_redirect(skb.as_ptr().cast(), device, INGRESS) };
    skb.set_mark(mark);
    if result != 0 || header::replace(skb, packet, flow).is_err() {
        return Err(Counter::AppendFailed);
    }
    flow.appended += 1;
    maps::count(Counter::SentAhead);
    Ok(())
}
