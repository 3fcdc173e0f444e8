//! ICMP errors: those about a connection's packets are translated as the packets are, and one is made for a packet that is too long.

use core::ptr;

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{
        bpf_csum_diff, bpf_csum_update, bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_tail,
    },
    programs::TcContext,
};
use injector_common::{
    SeqNumber,
    inline::{Counter, Direction, Entry, Flag, Flow, Tuple},
};
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};
use seq_macro::seq;

use super::{
    DROP, NEXT, maps, mem, open,
    packet::{CHECKSUM, Failed, IPV4_ADDRESSES, IPV6_ADDRESSES, Link, Packet, SEQUENCE, TCP},
    route,
};

/// Where the checksum and the quoted packet stand in an ICMP error (RFC 792; RFC 4443, section 3).
const SUM_AT: usize = 2;
const QUOTE: usize = 8;

/// `BPF_F_PSEUDO_HDR`
const PSEUDO_HEADER: u64 = 1 << 4;

/// An ICMP message. If it is an error that quotes a packet of a connection, it goes to that packet's sender. One about a SYN is a
/// refusal: a client's TCP ends its attempt with it (tcp_v4_err, net/ipv4/tcp_ipv4.c).
#[inline(never)]
pub(super) fn error<L: Link>(skb: &TcContext, packet: &mut Packet) -> i32 {
    let Some((entry, sequence)) = quoted(skb, packet) else { return NEXT };
    let from_client = entry.origin == Entry::FROM_BACKEND;
    if from_client
        && let Some(flow) = maps::connection(entry.pending)
        && flow.is_unreachable_by(sequence)
    {
        return open::refuse(entry.pending, flow);
    }
    let slot = if entry.established == 0 { entry.pending } else { entry.established };
    let Some(flow) = maps::connection(slot) else { return NEXT };
    let translated = if from_client {
        // The client's packet, as it went to the backend.
        let first = to_clients_number(flow, sequence);
        translate(skb, packet, &flow.client_side, &flow.client_side.tuple.reversed(), first)
            .map(|()| &flow.client_side)
    } else {
        // The backend's packet, as it went to the client: its numbers are the backend's own.
        let sent = flow.backend_side.tuple.reversed();
        translate(skb, packet, &flow.backend_side, &sent, sequence).map(|()| &flow.backend_side)
    };
    match translated.and_then(|way| route::leave::<L>(skb, &way.hop)) {
        Ok(redirected) => {
            maps::count(Counter::Icmp);
            redirected
        }
        Err(Failed) => {
            maps::count(Counter::RewriteFailed);
            DROP
        }
    }
}

/// The entry of an answer to the packet that an error quotes, and that packet's sequence number.
#[inline(always)]
fn quoted(skb: &TcContext, packet: &mut Packet) -> Option<(&'static mut Entry, SeqNumber)> {
    /// Destination unreachable (too big among them), time exceeded, parameter problem.
    const ERRORS: [u8; 3] = [3, 11, 12];
    const ERRORS_V6: [u8; 4] = [1, 2, 3, 4];
    const WITHOUT_OPTIONS: u8 = 0x45;

    let icmp = packet.tcp;
    let kind = skb.load::<u8>(icmp).ok()?;
    let quote = icmp + QUOTE;
    // An answer to the quoted packet would have its addresses the other way round.
    let key = &mut packet.key;
    if packet.ipv6 {
        if !ERRORS_V6.contains(&kind) || skb.load::<u8>(quote + 6).ok()? != TCP {
            return None;
        }
        let [source, destination] = skb.load::<[[u32; 4]; 2]>(quote + IPV6_ADDRESSES).ok()?;
        key.destination.set(source);
        key.source.set(destination);
    } else {
        if !ERRORS.contains(&kind)
            || skb.load::<u8>(quote).ok()? != WITHOUT_OPTIONS
            || skb.load::<u8>(quote + 9).ok()? != TCP
        {
            return None;
        }
        let [source, destination] = skb.load::<[u32; 2]>(quote + IPV4_ADDRESSES).ok()?;
        key.destination.set_mapped(source);
        key.source.set_mapped(destination);
    }
    let tcp = quote + if packet.ipv6 { Ipv6Hdr::LEN } else { Ipv4Hdr::LEN };
    let [ports, sequence] = skb.load::<[u32; 2]>(tcp).ok()?;
    let ports = u32::from_be(ports);
    (key.destination.port, key.source.port) = ((ports >> 16) as u16, ports as u16);
    Some((maps::entry(key)?, SeqNumber(u32::from_be(sequence))))
}

/// The number that the client knows a byte by. It takes an error with any other for forged (tcp_v4_err, net/ipv4/tcp_ipv4.c).
#[inline(always)]
fn to_clients_number(flow: &Flow, sequence: SeqNumber) -> SeqNumber {
    let beyond = flow.beyond(sequence);
    if flow.is(Flag::Acknowledged) || (flow.header_len..1 << 31).contains(&beyond) {
        sequence - flow.shift()
    } else if beyond < flow.header_len {
        // The header's own packet was the client's acknowledgement, with the number of its first byte.
        flow.first
    } else {
        sequence - flow.offset
    }
}

/// Gives the error the addresses of `way`, and the quoted packet `sent` and a new number.
#[inline(always)]
fn translate(
    skb: &TcContext,
    packet: &Packet,
    way: &Direction,
    sent: &Tuple,
    new: SeqNumber,
) -> Result<(), Failed> {
    let (sum, quote) = (packet.tcp + SUM_AT, packet.tcp + QUOTE);
    let tcp = if packet.ipv6 {
        replace_ipv6(skb, packet.ip, sum, &way.tuple, PSEUDO_HEADER)?;
        replace_ipv6(skb, quote, sum, sent, 0)?;
        quote + Ipv6Hdr::LEN
    } else {
        replace_ipv4(skb, packet.ip, &way.tuple)?;
        replace_ipv4(skb, quote, sent)?;
        quote + Ipv4Hdr::LEN
    };
    replace_word(skb, tcp, sum, sent.ports)?;
    replace_word(skb, tcp + SEQUENCE, sum, new.0.to_be())
}

/// Addresses of an IPv4 header. Its own checksum changes with them, so the sum of all of it stays.
#[inline(always)]
fn replace_ipv4(skb: &TcContext, ip: usize, to: &Tuple) -> Result<(), Failed> {
    const IP_CHECKSUM: usize = 10;

    for (index, new) in [to.source[0], to.destination[0]].into_iter().enumerate() {
        let at = ip + IPV4_ADDRESSES + index * 4;
        let old = skb.load::<u32>(at).map_err(|_| Failed)?;
        skb.l3_csum_replace(ip + IP_CHECKSUM, old.into(), new.into(), 4).map_err(|_| Failed)?;
        skb.store(at, &new, 0).map_err(|_| Failed)?;
    }
    Ok(())
}

/// Addresses of an IPv6 header, which the checksum at `sum` covers.
#[inline(always)]
fn replace_ipv6(skb: &TcContext, ip: usize, sum: usize, to: &Tuple, flags: u64) -> Result<(), Failed> {
    let at = ip + IPV6_ADDRESSES;
    let old = skb.load::<[u32; 8]>(at).map_err(|_| Failed)?;
    let ([s0, s1, s2, s3], [d0, d1, d2, d3]) = (to.source, to.destination);
    let new = [s0, s1, s2, s3, d0, d1, d2, d3];
    let mut difference = 0;
    seq!(AT in 0..8 {
        difference += u64::from(!old[AT]) + u64::from(new[AT]);
    });
    add_to_sum(skb, sum, difference, flags)?;
    skb.store(at, &new, 0).map_err(|_| Failed)
}

#[inline(always)]
fn replace_word(skb: &TcContext, at: usize, sum: usize, new: u32) -> Result<(), Failed> {
    let old = skb.load::<u32>(at).map_err(|_| Failed)?;
    add_to_sum(skb, sum, u64::from(!old) + u64::from(new), 0)?;
    skb.store(at, &new, 0).map_err(|_| Failed)
}

/// Adds a difference of words to the checksum at this place.
#[inline(always)]
fn add_to_sum(skb: &TcContext, sum: usize, difference: u64, flags: u64) -> Result<(), Failed> {
    let difference = (difference & 0xFFFF_FFFF) + (difference >> 32);
    let difference = (difference & 0xFFFF_FFFF) + (difference >> 32);
    let skb = skb.as_ptr().cast();
    // SAFETY: the program's own context.
    if unsafe { bpf_l4_csum_replace(skb, sum as u32, 0, difference, flags) } != 0 {
        return Err(Failed);
    }
    if flags != 0 {
        // See `forward::add_to_checksum`.
        // SAFETY: as above.
        let _ = unsafe { bpf_csum_update(skb, difference as u32) };
    }
    Ok(())
}

/// What is quoted of a TCP header: ports, numbers, flags and window.
const QUOTED_TCP: usize = 16;

/// Answers a packet that is longer than `mtu` ("fragmentation needed", RFC 1191; "packet too big", RFC 4443, section 3.2).
#[inline(never)]
pub(super) fn too_big<L: Link>(
    skb: &TcContext,
    packet: &Packet,
    back: &mut Direction,
    mtu: u32,
    now_ns: u64,
) -> i32 {
    let answer = packet.tuple().reversed();
    if back.hop.is_stale(now_ns) {
        let _ = route::look_up(skb, &answer, &mut back.hop, now_ns);
    }
    // BIG TCP's own header is none that a sender knows.
    let ip = if packet.ipv6 { Ipv6Hdr::LEN } else { Ipv4Hdr::LEN };
    if back.hop.ifindex == 0 || packet.tcp != packet.ip + ip {
        return DROP;
    }
    let made = if packet.ipv6 {
        make::<{ Ipv6Hdr::LEN }, { Ipv6Hdr::LEN + 8 }>(skb, packet, &answer, mtu)
    } else {
        make::<{ Ipv4Hdr::LEN }, { Ipv4Hdr::LEN + 8 }>(skb, packet, &answer, mtu)
    };
    made.and_then(|()| route::leave::<L>(skb, &back.hop)).unwrap_or(DROP)
}

/// Cuts the packet down to what is quoted, behind an IP header of `IP` bytes, and puts `FRONT` bytes in front of it.
#[inline(always)]
fn make<const IP: usize, const FRONT: usize>(
    skb: &TcContext,
    packet: &Packet,
    answer: &Tuple,
    mtu: u32,
) -> Result<(), Failed> {
    /// `BPF_ADJ_ROOM_MAC`
    const BEHIND_LINK: u32 = 1;

    let buffer = maps::payload().ok_or(Failed)?;
    // SAFETY: words of a map value.
    unsafe { mem::zero((&raw mut *buffer).cast::<[u32; 32]>()) };
    let (context, tcp) = (skb.as_ptr().cast(), packet.ip + IP);
    // A packet whose checksum is still to be computed cannot be cut so short (__bpf_skb_min_len, net/core/filter.c). It gets its
    // checksum when it leaves, over all from its TCP header on, which then has the sum 0.
    // SAFETY: the program's own context.
    let whole = unsafe { bpf_skb_change_tail(context, (tcp + QUOTED_TCP) as u32, 0) } == 0;
    let quoted = if whole {
        QUOTED_TCP
    } else {
        skb.store(tcp + CHECKSUM, &0_u16, 0).map_err(|_| Failed)?;
        // SAFETY: as above.
        if unsafe { bpf_skb_change_tail(context, (tcp + QUOTED_TCP + 4) as u32, 0) } != 0 {
            return Err(Failed);
        }
        QUOTED_TCP + 4
    };
    let (quote, front) = buffer.split_first_chunk_mut::<64>().ok_or(Failed)?;
    load::<IP>(skb, packet.ip, quote)?;
    if whole {
        let (_, rest) = quote.split_at_mut(IP);
        super::packet::load_bytes(skb, tcp, rest, QUOTED_TCP)?;
    }
    // SAFETY: the buffer has the length given; zeros add nothing.
    let sum = unsafe { bpf_csum_diff(ptr::null_mut(), 0, quote.as_mut_ptr().cast(), 64, 0) } as u32;
    // SAFETY: the program's own context.
    if unsafe { bpf_skb_adjust_room(context, FRONT as i32, BEHIND_LINK, 0) } != 0 {
        return Err(Failed);
    }
    let (front, _) = front.split_first_chunk_mut::<48>().ok_or(Failed)?;
    fill::<FRONT>(front, answer, mtu, (IP + quoted) as u32, sum);
    super::packet::store_bytes(skb, packet.ip, front, FRONT)
}

#[inline(always)]
fn load<const LEN: usize>(skb: &TcContext, at: usize, into: &mut [u8; 64]) -> Result<(), Failed> {
    super::packet::load_bytes(skb, at, into, LEN)
}

/// The IP header and that of ICMP in front of `quoted` bytes with this sum.
#[inline(always)]
fn fill<const FRONT: usize>(front: &mut [u8; 48], answer: &Tuple, mtu: u32, quoted: u32, sum: u32) {
    const TTL: u32 = 64;
    const ICMP: u32 = 1;
    const ICMPV6: u32 = 58;
    const LENGTH: u32 = 8;

    let words: *mut u32 = front.as_mut_ptr().cast();
    // SAFETY: below 12, in an array that lies at the start of a word of a map value.
    let set = |index: usize, word: u32| unsafe { words.add(index).write_volatile(word.to_be()) };
    let mut ip = Sum(0);
    let mut icmp = Sum(u64::from(sum.to_be()));
    if FRONT == Ipv6Hdr::LEN + 8 {
        set(0, 6 << 28);
        set(1, (LENGTH + quoted) << 16 | ICMPV6 << 8 | TTL);
        for at in 0..4 {
            set(2 + at, u32::from_be(answer.source[at]));
            set(6 + at, u32::from_be(answer.destination[at]));
            icmp.add(u32::from_be(answer.source[at]));
            icmp.add(u32::from_be(answer.destination[at]));
        }
        icmp.add(LENGTH + quoted);
        icmp.add(ICMPV6);
        icmp.add(2 << 24);
        icmp.add(mtu);
        set(10, 2 << 24 | icmp.checksum());
        set(11, mtu);
    } else {
        let [source, destination] = [u32::from_be(answer.source[0]), u32::from_be(answer.destination[0])];
        let total = 0x4500 << 16 | (Ipv4Hdr::LEN as u32 + LENGTH + quoted);
        for word in [total, TTL << 24 | ICMP << 16, source, destination] {
            ip.add(word);
        }
        set(0, total);
        set(1, 0);
        set(2, TTL << 24 | ICMP << 16 | ip.checksum());
        set(3, source);
        set(4, destination);
        icmp.add(3 << 24 | 4 << 16);
        icmp.add(mtu);
        set(5, 3 << 24 | 4 << 16 | icmp.checksum());
        set(6, mtu);
    }
}

/// A ones' complement sum of words in the host's byte order (RFC 1071).
struct Sum(u64);

impl Sum {
    #[inline(always)]
    fn add(&mut self, word: u32) {
        self.0 += u64::from(word);
    }

    #[inline(always)]
    fn checksum(&self) -> u32 {
        let mut sum = (self.0 & 0xFFFF) + (self.0 >> 16 & 0xFFFF) + (self.0 >> 32);
        sum = (sum & 0xFFFF) + (sum >> 16);
        sum = (sum & 0xFFFF) + (sum >> 16);
        !(sum as u32) & 0xFFFF
    }
}
