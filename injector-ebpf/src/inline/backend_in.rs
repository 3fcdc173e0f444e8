//! `backend_in`: at the ingress of devices that backends answer by. Shifts what the backend acknowledges, and gives it the
//! header again when it asks for the client's first byte: no retransmission queue holds the header.

use core::ptr::NonNull;

use aya_ebpf::{helpers::generated::bpf_redirect, macros::classifier, programs::TcContext};
use injector_common::{
    SeqNumber,
    inline::{
        ACK, Counter, Event, Flag, Flow, Key, OnSynAck, RST, SYN, Segment, ToClient, acknowledges,
        on_syn_ack, to_client,
    },
};
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use super::{
    DROP, MARK_RETRANSMIT, NEXT, header, maps,
    packet::{
        ACKNOWLEDGEMENT, Ethernet, Failed, Link, Origin, Packet, Parsed, Raw, SEQUENCE, is_ipv6, parse,
    },
};

#[classifier]
fn backend_in(skb: TcContext) -> i32 {
    receive::<Ethernet>(&skb)
}

#[classifier]
fn backend_in_raw(skb: TcContext) -> i32 {
    receive::<Raw>(&skb)
}

#[inline(always)]
fn receive<L: Link>(skb: &TcContext) -> i32 {
    let Some(packet) = maps::packet(is_ipv6(skb)) else { return DROP };
    match parse::<L>(skb, packet, Origin::Backend) {
        Parsed::Tcp => {}
        Parsed::Icmp => {
            return match quoted(skb, packet) {
                Ok(()) => NEXT,
                Err(Failed) => {
                    maps::count(Counter::RewriteFailed);
                    DROP
                }
            };
        }
        _ => return NEXT,
    }
    let established = maps::established(&packet.key);
    // An established connection's entry alone decides, save on what may be the answer to a SYN.
    let pending = match established {
        Some(_) if !packet.segment.is(SYN | RST) => None,
        _ => maps::pending(&packet.key),
    };
    if packet.segment.is(SYN) {
        return answer_to_syn(skb, packet, established, pending);
    }
    // SAFETY: a map value, valid while the program runs.
    let refused = pending.filter(|flow| unsafe { flow.as_ref() }.is_refused_by(&packet.segment));
    match (established, pending, refused) {
        (_, _, Some(flow)) => {
            // SAFETY: as above.
            refuse(&packet.key, unsafe { &mut *flow.as_ptr() });
            before_header(skb, packet, flow)
        }
        (Some(flow), ..) => pass(skb, packet, flow),
        (None, Some(flow), _) => before_header(skb, packet, flow),
        (None, None, _) => NEXT,
    }
}

/// The backend answers the SYN: of the connection that is being opened, and no other.
#[inline(always)]
fn answer_to_syn(
    skb: &TcContext,
    packet: &Packet,
    established: Option<NonNull<Flow>>,
    pending: Option<NonNull<Flow>>,
) -> i32 {
    // SAFETY: map values, valid while the program runs.
    let entries = unsafe { (established.map(|flow| flow.as_ref()), pending.map(|flow| flow.as_ref())) };
    match (on_syn_ack(entries.0, entries.1, &packet.segment), established, pending) {
        (OnSynAck::Accept, _, Some(flow)) => {
            // SAFETY: as above.
            let flow = unsafe { &mut *flow.as_ptr() };
            flow.accept(&packet.segment);
            maps::supersede(&packet.key);
            open_window(skb, packet, flow)
        }
        // SAFETY: as above.
        (OnSynAck::Repeated, Some(flow), _) => open_window(skb, packet, unsafe { flow.as_ref() }),
        (OnSynAck::Pass, _, Some(flow)) => before_header(skb, packet, flow),
        (OnSynAck::Pass, ..) => NEXT,
        _ => {
            maps::count(Counter::StaleSynAck);
            DROP
        }
    }
}

/// The backend refuses the SYN.
#[inline(always)]
fn refuse(key: &Key, flow: &mut Flow) {
    if !flow.is(Flag::BackendRst) {
        flow.set(Flag::BackendRst);
        maps::count(Counter::Refused);
        maps::emit_event(Event::REFUSED, key, flow);
    }
}

/// The header takes the first of the window that the backend opens.
#[inline(always)]
fn open_window(skb: &TcContext, packet: &Packet, flow: &Flow) -> i32 {
    let window = u32::from(packet.segment.window);
    if window > flow.header_len && packet.set_window(skb, (window - flow.header_len) as u16).is_err() {
        maps::count(Counter::RewriteFailed);
        return DROP;
    }
    earlier(skb, packet, flow.offset)
}

/// What the backend acknowledges, if anything, is before the header.
#[inline(always)]
fn before_header(skb: &TcContext, packet: &Packet, flow: NonNull<Flow>) -> i32 {
    // SAFETY: a map value, valid while the program runs.
    earlier(skb, packet, unsafe { flow.as_ref() }.offset)
}

#[inline(always)]
fn earlier(skb: &TcContext, packet: &Packet, less: u32) -> i32 {
    if packet.segment.is(ACK) && packet.acknowledge_earlier(skb, less).is_err() {
        maps::count(Counter::RewriteFailed);
        return DROP;
    }
    NEXT
}

#[inline(always)]
fn pass(skb: &TcContext, packet: &mut Packet, flow: NonNull<Flow>) -> i32 {
    // SAFETY: as in `backend_out`.
    let flow = unsafe { &mut *flow.as_ptr() };
    let segment = packet.segment;
    let way = to_client(flow, &segment);
    if acknowledges(flow, &segment) {
        flow.set(Flag::Acknowledged);
        maps::count(Counter::Acknowledged);
        maps::emit_event(Event::ACKNOWLEDGED, &packet.key, flow);
    }
    match way {
        ToClient::Drop => {
            maps::count(Counter::InvalidAck);
            return DROP;
        }
        ToClient::Retransmit => return retransmit(skb, packet, flow),
        _ => {}
    }
    // The backend has sent it, whatever becomes of it.
    account(&packet.key, flow, &segment);
    let done = match way {
        ToClient::DropAck if !packet.may_have_sack(skb) => return DROP,
        ToClient::Shift | ToClient::DropAck => packet.acknowledge_earlier(skb, flow.shift()),
        ToClient::ClampAck => packet
            .set_number(skb, ACKNOWLEDGEMENT, segment.acknowledgement, flow.first)
            .and_then(|()| packet.sack_earlier(skb, flow.shift())),
        _ if segment.is(ACK) => packet.acknowledge_earlier(skb, flow.offset),
        _ => Ok(()),
    };
    if done.is_err() {
        maps::count(Counter::RewriteFailed);
        return DROP;
    }
    NEXT
}

/// The backend asks for the client's first byte, which is the header's.
#[inline(always)]
fn retransmit(skb: &TcContext, packet: &mut Packet, flow: &mut Flow) -> i32 {
    let now = maps::now();
    flow.note_from_backend(&packet.segment, || now);
    if !flow.may_retransmit(now) {
        maps::count(Counter::TooSoon);
        return DROP;
    }
    if header::retransmit(skb, packet, flow).is_err() {
        maps::count(Counter::RetransmitFailed);
        return DROP;
    }
    flow.set(Flag::Sent);
    flow.retransmitted_ns = now;
    flow.retransmitted += 1;
    maps::count(Counter::HeaderRetransmitted);
    skb.set_mark(MARK_RETRANSMIT);
    // SAFETY: reads the program's own context, and redirects to the device that it came by.
    unsafe { bpf_redirect((*skb.skb.skb).ifindex, 0) as i32 }
}

#[inline(always)]
fn account(key: &Key, flow: &mut Flow, segment: &Segment) {
    maps::touch(flow);
    flow.to_client.packets += 1;
    flow.to_client.bytes += u64::from(segment.payload);
    flow.note_from_backend(segment, maps::now);
    maps::emit_end(key, flow);
}

/// An ICMP error quotes the packet that caused it, with the numbers that the backend's side knows: the client must find its
/// own, or it takes the error for forged (tcp_v4_err, net/ipv4/tcp_ipv4.c).
#[inline(always)]
fn quoted(skb: &TcContext, packet: &mut Packet) -> Result<(), Failed> {
    const CHECKSUM: usize = 2;
    const QUOTE: usize = 8;
    const TCP: u8 = 6;
    /// Destination unreachable (too big among them), time exceeded, parameter problem.
    const ERRORS: [u8; 3] = [3, 11, 12];
    const ERRORS_V6: [u8; 4] = [1, 2, 3, 4];

    let icmp = packet.tcp;
    let Ok(kind) = skb.load::<u8>(icmp) else { return Ok(()) };
    let at = icmp + QUOTE;
    // The quoted packet was sent towards the backend.
    let key = &mut packet.key;
    let tcp = if packet.ipv6 {
        let Ok(quote) = skb.load::<Ipv6Hdr>(at) else { return Ok(()) };
        if !ERRORS_V6.contains(&kind) || quote.next_hdr != TCP {
            return Ok(());
        }
        (key.source.ip, key.backend.ip) = (quote.src_addr, quote.dst_addr);
        at + Ipv6Hdr::LEN
    } else {
        let Ok(quote) = skb.load::<Ipv4Hdr>(at) else { return Ok(()) };
        if !ERRORS.contains(&kind) || quote.proto != TCP {
            return Ok(());
        }
        key.source.set_mapped(u32::from_ne_bytes(quote.src_addr));
        key.backend.set_mapped(u32::from_ne_bytes(quote.dst_addr));
        at + usize::from(quote.ihl())
    };
    let Ok([source, destination]) = skb.load::<[u16; 2]>(tcp) else { return Ok(()) };
    let Ok(sequence) = skb.load::<u32>(tcp + SEQUENCE) else { return Ok(()) };
    (key.source.port, key.backend.port) = (u16::from_be(source), u16::from_be(destination));
    let Some(flow) = maps::established(key).or_else(|| maps::pending(key)) else { return Ok(()) };
    // SAFETY: a map value, valid while the program runs.
    let flow = unsafe { flow.as_ref() };
    let old = SeqNumber(u32::from_be(sequence));
    let beyond = flow.beyond(old);
    let new = if flow.is(Flag::Acknowledged) || (flow.header_len..1 << 31).contains(&beyond) {
        old - flow.shift()
    } else if beyond < flow.header_len {
        // The header's own packet was the client's acknowledgement, with the number of its first byte.
        flow.first
    } else {
        old - flow.offset
    };
    skb.l4_csum_replace(icmp + CHECKSUM, sequence.into(), new.0.to_be().into(), 4).map_err(|_| Failed)?;
    skb.store(tcp + SEQUENCE, &new.0.to_be(), 0).map_err(|_| Failed)
}
