//! The way of a packet out: translation and next hop.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_csum_update, bpf_l4_csum_replace},
    programs::TcContext,
};
use injector_common::{
    SeqNumber,
    inline::{Counter, Direction, NextHop, Tuple},
};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use super::{
    DROP,
    packet::{CHECKSUM, Failed, Link, Packet, Word, front},
    route,
};

/// Whether a packet may be forwarded this way at all. Looks the route up again from time to time.
#[inline(always)]
pub(super) fn check(
    skb: &TcContext,
    packet: &Packet,
    way: &mut Direction,
    now_ns: u64,
) -> Result<(), Counter> {
    if way.hop.is_stale(now_ns) {
        if !route::look_up(skb, &way.tuple, &mut way.hop, now_ns) {
            if way.hop.ifindex == 0 {
                return Err(Counter::RouteLost);
            }
            // The old one is as good as any, for another second.
            way.hop.looked_up = NextHop::clock(now_ns);
        }
    }
    if packet.hop_limit() <= 1 {
        return Err(Counter::TtlExceeded);
    }
    if longest(skb, packet) > way.hop.mtu {
        return Err(Counter::TooBig);
    }
    Ok(())
}

/// The length of the packet, or of the longest one that it will be cut into.
#[inline(always)]
fn longest(skb: &TcContext, packet: &Packet) -> u32 {
    // SAFETY: the program's own context.
    let size = unsafe { (*skb.skb.skb).gso_size };
    if size == 0 {
        skb.len() - packet.ip as u32
    } else {
        // BIG TCP's own header is in none of them.
        let ip = if packet.ipv6 { Ipv6Hdr::LEN } else { Ipv4Hdr::LEN };
        (ip + packet.tcp_len) as u32 + size
    }
}

/// Gives the packet the addresses of its direction and these numbers, and has it leave.
#[inline(always)]
pub(super) fn send<L: Link>(
    skb: &TcContext,
    packet: &mut Packet,
    way: &Direction,
    sequence: SeqNumber,
    acknowledgement: SeqNumber,
) -> Result<i32, Failed> {
    packet.leaving = [sequence.0.to_be(), acknowledgement.0.to_be()];
    match translate::<L>(skb, packet, way) {
        DROP => Err(Failed),
        redirected => Ok(redirected),
    }
}

/// The action for the packet; [`DROP`] where it could not be rewritten.
#[inline(never)]
fn translate<L: Link>(skb: &TcContext, packet: &Packet, way: &Direction) -> i32 {
    const JUMBO: usize = Ipv6Hdr::LEN + 8;

    let (to, numbers) = (&way.tuple, packet.leaving);
    let written = if !packet.ipv6 {
        write_ipv4::<L>(skb, to, numbers)
    } else if packet.tcp == L::LEN + Ipv6Hdr::LEN {
        write_ipv6::<L, { Ipv6Hdr::LEN }>(skb, to, numbers)
    } else {
        write_ipv6::<L, JUMBO>(skb, to, numbers)
    };
    let checksum = (packet.tcp + CHECKSUM) as u32;
    written
        .and_then(|sums| add_to_checksum(skb, checksum, sums, packet.ipv6))
        .and_then(|()| route::leave::<L>(skb, &way.hop))
        .unwrap_or(DROP)
}

/// What was replaced, as a difference of sums: of addresses, and of what the TCP checksum covers in the segment.
struct Sums {
    addresses: Sum,
    segment: Sum,
}

/// A ones' complement sum of words (RFC 1071), whose carries are added at the end.
#[derive(Clone, Copy)]
struct Sum(u64);

impl Sum {
    #[inline(always)]
    fn replace(&mut self, old: u32, new: u32) {
        self.0 += u64::from(!old) + u64::from(new);
    }

    /// In 32 bits, as the helpers take it.
    #[inline(always)]
    fn words(self) -> u64 {
        let sum = (self.0 & 0xFFFF_FFFF) + (self.0 >> 32);
        (sum & 0xFFFF_FFFF) + (sum >> 32)
    }

    /// In 16 bits.
    #[inline(always)]
    fn half_words(self) -> u32 {
        let sum = self.words();
        let sum = (sum & 0xFFFF) + (sum >> 16);
        let sum = (sum & 0xFFFF) + (sum >> 16);
        sum as u32
    }
}

/// A sum that addresses and numbers have changed, for the checksum at this place.
#[inline(always)]
fn add_to_checksum(skb: &TcContext, at: u32, sums: Sums, ipv6: bool) -> Result<(), Failed> {
    /// `BPF_F_PSEUDO_HDR`; a size of 0 says that a difference is given.
    const PSEUDO_HEADER: u64 = 1 << 4;

    let skb = skb.as_ptr().cast();
    let addresses = sums.addresses.words();
    // SAFETY: the program's own context.
    if unsafe { bpf_l4_csum_replace(skb, at, 0, addresses, PSEUDO_HEADER) } != 0 {
        return Err(Failed);
    }
    if ipv6 {
        // The addresses and the checksum cancel out in the sum of the whole packet that a device may have computed; the helper has
        // changed it as for IPv4, where another checksum covers the addresses. An error means that there is none.
        // SAFETY: as above.
        let _ = unsafe { bpf_csum_update(skb, addresses as u32) };
    }
    // SAFETY: as above.
    if unsafe { bpf_l4_csum_replace(skb, at, 0, sums.segment.words(), 0) } != 0 {
        return Err(Failed);
    }
    Ok(())
}

#[inline(always)]
fn write_ipv4<L: Link>(skb: &TcContext, to: &Tuple, numbers: [u32; 2]) -> Result<Sums, Failed> {
    const TTL: usize = 2;
    const ADDRESSES: usize = 3;

    let ip = front(skb, L::LEN, Ipv4Hdr::LEN + TcpHdr::LEN).ok_or(Failed)?;
    let mut addresses = Sum(0);
    for (index, new) in [to.source[0], to.destination[0]].into_iter().enumerate() {
        addresses.replace(swap(ip, ADDRESSES + index, new), new);
    }
    // Time to live, protocol, checksum.
    let [ttl, protocol, sum @ ..] = word(ip, TTL).to_ne_bytes();
    let mut header = addresses;
    header
        .replace(u16::from_ne_bytes([ttl, protocol]).into(), u16::from_ne_bytes([ttl - 1, protocol]).into());
    header.0 += u64::from(!u16::from_ne_bytes(sum));
    let sum = (!(header.half_words() as u16)).to_ne_bytes();
    swap(ip, TTL, u32::from_ne_bytes([ttl - 1, protocol, sum[0], sum[1]]));
    let segment = write_tcp(ip, Ipv4Hdr::LEN / 4, to.ports, numbers);
    Ok(Sums { addresses, segment })
}

#[inline(always)]
fn write_ipv6<L: Link, const TCP: usize>(
    skb: &TcContext,
    to: &Tuple,
    numbers: [u32; 2],
) -> Result<Sums, Failed> {
    const HOP_LIMIT: usize = 1;
    const ADDRESSES: usize = 2;

    let ip = front(skb, L::LEN, TCP + TcpHdr::LEN).ok_or(Failed)?;
    let mut addresses = Sum(0);
    for index in 0..4 {
        addresses.replace(swap(ip, ADDRESSES + index, to.source[index]), to.source[index]);
        addresses.replace(swap(ip, ADDRESSES + 4 + index, to.destination[index]), to.destination[index]);
    }
    let [length @ .., next, limit] = word(ip, HOP_LIMIT).to_ne_bytes();
    swap(ip, HOP_LIMIT, u32::from_ne_bytes([length[0], length[1], next, limit - 1]));
    let segment = write_tcp(ip, TCP / 4, to.ports, numbers);
    Ok(Sums { addresses, segment })
}

/// Ports and numbers of a TCP header that begins at this word.
#[inline(always)]
fn write_tcp(ip: *mut Word, at: usize, ports: u32, numbers: [u32; 2]) -> Sum {
    let mut sum = Sum(0);
    for (index, new) in [ports, numbers[0], numbers[1]].into_iter().enumerate() {
        sum.replace(swap(ip, at + index, new), new);
    }
    sum
}

#[inline(always)]
fn word(start: *const Word, index: usize) -> u32 {
    // SAFETY: within what `front` has checked, by the callers.
    u32::from_ne_bytes(unsafe { start.add(index).read() }.0)
}

/// Replaces a word, and returns what it was.
#[inline(always)]
fn swap(start: *mut Word, index: usize, new: u32) -> u32 {
    let old = word(start, index);
    // SAFETY: as in `word`.
    unsafe { start.add(index).write(Word(new.to_ne_bytes())) };
    old
}
