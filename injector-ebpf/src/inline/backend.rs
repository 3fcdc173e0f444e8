//! Packets from backends: shifts what the backend acknowledges, and gives it the header again when it asks for the client's first
//! byte, since no retransmission queue holds the header.

use aya_ebpf::programs::TcContext;
use injector_common::{
    SeqNumber,
    inline::{ACK, Counter, Entry, Flag, Flow, OnSynAck, RST, ToClient, acknowledges, on_syn_ack, to_client},
};

use super::{
    DROP, NEXT, established, forward, header, icmp, maps, open, options,
    packet::{Failed, Link, Packet},
    route, source,
};

/// A packet with the addresses by which a backend answers.
#[inline(never)]
pub(super) fn receive<L: Link>(skb: &TcContext, packet: &mut Packet, entry: &mut Entry) -> i32 {
    if packet.segment.is(RST)
        && let Some(flow) = maps::connection(entry.pending)
        && flow.is_refused_by(&packet.segment)
        && !is_forged(skb, packet, flow)
    {
        return open::refuse(entry.pending, flow);
    }
    let slot = entry.established;
    if let Some(flow) = maps::connection(slot) {
        if is_forged(skb, packet, flow) {
            return DROP;
        }
        return pass::<L>(skb, packet, slot, flow);
    }
    match maps::connection(entry.pending) {
        // What the backend acknowledges, if anything, is before the header.
        Some(flow) => {
            let acknowledgement = packet.segment.acknowledgement - flow.offset;
            to_its_client::<L>(skb, packet, flow, acknowledgement, Ok(()))
        }
        None => NEXT,
    }
}

/// Whether the packet is not the connection's, though an entry leads to it; or came in by the device that only the client is behind: then
/// it is the client's, in the backend's name.
#[inline(always)]
fn is_forged(skb: &TcContext, packet: &Packet, flow: &Flow) -> bool {
    if !flow.backend_side.tuple.answers(&packet.tuple()) {
        return true;
    }
    // SAFETY: the program's own context.
    let device = unsafe { (*skb.skb.skb).ifindex };
    let forged = device == flow.client_side.hop.ifindex
        && device != flow.backend_side.hop.ifindex
        && !route::is_self_test();
    if forged {
        maps::count(Counter::WrongDevice);
    }
    forged
}

/// The backend answers the SYN: of the connection that is being opened, and no other.
#[inline(never)]
pub(super) fn answer_to_syn<L: Link>(skb: &TcContext, packet: &mut Packet, entry: &mut Entry) -> i32 {
    let (slot, established) = (entry.established, maps::connection(entry.established));
    let pending = maps::connection(entry.pending);
    let flow =
        match (on_syn_ack(established.as_deref(), pending.as_deref(), &packet.segment), established, pending)
        {
            (OnSynAck::Accept, established, Some(flow)) => {
                flow.accept(&packet.segment);
                flow.last_ns = maps::now();
                if let Some(earlier) = established {
                    // The backend has forgotten it.
                    entry.established = 0;
                    earlier.set(Flag::Replaced);
                    established::supersede(slot, earlier);
                }
                flow
            }
            (OnSynAck::Repeated, Some(flow), _) => flow,
            (OnSynAck::Pass, _, Some(flow)) => {
                let acknowledgement = packet.segment.acknowledgement - flow.offset;
                return to_its_client::<L>(skb, packet, flow, acknowledgement, Ok(()));
            }
            (OnSynAck::Pass, _, None) => return NEXT,
            _ => {
                maps::count(Counter::StaleSynAck);
                return DROP;
            }
        };
    // The header takes the first of the window that the backend opens.
    let window = u32::from(packet.segment.window);
    let narrowed = if window > flow.header_len {
        packet.set_window(skb, (window - flow.header_len) as u16)
    } else {
        Ok(())
    };
    let mtu = flow.client_side.hop.mtu.min(flow.backend_side.hop.mtu);
    let rewritten = narrowed.and_then(|()| options::rewrite(skb, packet, mtu));
    let acknowledgement = packet.segment.acknowledgement - flow.offset;
    to_its_client::<L>(skb, packet, flow, acknowledgement, rewritten)
}

/// Sends the packet to the client, unless rewriting it has failed.
#[inline(always)]
fn to_its_client<L: Link>(
    skb: &TcContext,
    packet: &mut Packet,
    flow: &mut Flow,
    acknowledgement: SeqNumber,
    rewritten: Result<(), Failed>,
) -> i32 {
    let acknowledgement =
        if packet.segment.is(ACK) { acknowledgement } else { packet.segment.acknowledgement };
    let now_ns = maps::now();
    let left = rewritten
        .map_err(|_| Counter::RewriteFailed)
        .and_then(|()| forward::check(skb, packet, &mut flow.client_side, now_ns))
        .and_then(|()| {
            forward::send::<L>(skb, packet, &flow.client_side, packet.segment.sequence, acknowledgement)
                .map_err(|_| Counter::RewriteFailed)
        });
    left.unwrap_or_else(|counter| {
        maps::count(counter);
        DROP
    })
}

#[inline(always)]
fn pass<L: Link>(skb: &TcContext, packet: &mut Packet, slot: u32, flow: &mut Flow) -> i32 {
    let now_ns = maps::touch(flow);
    if let Err(counter) = forward::check(skb, packet, &mut flow.client_side, now_ns) {
        maps::count(counter);
        if counter == Counter::TooBig {
            let mtu = flow.client_side.hop.mtu;
            return icmp::too_big::<L>(skb, packet, &mut flow.backend_side, mtu, now_ns);
        }
        return DROP;
    }
    let segment = packet.segment;
    let way = to_client(flow, &segment);
    if acknowledges(flow, &segment) {
        flow.set(Flag::Acknowledged);
        maps::count(Counter::Acknowledged);
    }
    match way {
        ToClient::Drop => {
            maps::count(Counter::InvalidAck);
            return DROP;
        }
        ToClient::Retransmit => return retransmit::<L>(skb, packet, flow),
        _ => {}
    }
    // The backend has sent it, whatever becomes of it.
    account(slot, flow, packet);
    let less = match way {
        ToClient::DropAck if !packet.may_have_sack() => return DROP,
        ToClient::Shift | ToClient::DropAck => flow.shift(),
        ToClient::ClampAck => segment.acknowledgement - flow.first,
        _ => flow.offset,
    };
    let sack = if matches!(way, ToClient::ClampAck) { flow.shift() } else { less };
    let rewritten = if segment.is(ACK) { packet.sack_earlier(skb, sack) } else { Ok(()) };
    let acknowledgement =
        if segment.is(ACK) { segment.acknowledgement - less } else { segment.acknowledgement };
    let left = rewritten
        .and_then(|()| forward::send::<L>(skb, packet, &flow.client_side, segment.sequence, acknowledgement));
    left.unwrap_or_else(|Failed| {
        maps::count(Counter::RewriteFailed);
        DROP
    })
}

#[inline(always)]
fn account(slot: u32, flow: &mut Flow, packet: &Packet) {
    let was_reset = flow.is_reset();
    flow.to_client.packets += 1;
    flow.to_client.bytes += u64::from(packet.segment.payload);
    flow.note_from_backend(&packet.segment, maps::now);
    if was_reset && !flow.is_reset() {
        // It was none: the connection goes on.
        if established::set_counted(flow, true) {
            source::enter_again(flow);
        }
    }
    established::emit_end(slot, flow);
}

/// The backend asks for the client's first byte, which is the header's.
#[inline(never)]
fn retransmit<L: Link>(skb: &TcContext, packet: &mut Packet, flow: &mut Flow) -> i32 {
    // The clock of packets is as fine as a tick: not fine enough here.
    let now_ns = maps::now();
    flow.note_from_backend(&packet.segment, || now_ns);
    if !flow.may_retransmit(now_ns) {
        maps::count(Counter::TooSoon);
        return DROP;
    }
    let answered = header::retransmit(skb, packet, flow)
        .and_then(|()| route::leave::<L>(skb, &flow.backend_side.hop))
        .map_err(|_| Counter::RetransmitFailed);
    match answered {
        Ok(redirected) => {
            flow.set(Flag::Sent);
            flow.retransmitted_ns = now_ns;
            flow.retransmitted += 1;
            maps::count(Counter::HeaderRetransmitted);
            redirected
        }
        Err(counter) => {
            maps::count(counter);
            DROP
        }
    }
}
