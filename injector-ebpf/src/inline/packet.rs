//! Reading a packet's headers, and rewriting numbers in them with their checksums.
//!
//! What is rewritten in every packet is written at once ([`super::forward`]). The rest goes through helpers: they reach into packets whose
//! headers are not in one piece, make them writable, and leave the checksum of a packet whose checksum is still to be computed
//! (CHECKSUM_PARTIAL) as it must be.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes},
    programs::TcContext,
};
use injector_common::{
    SeqNumber,
    inline::{Address, Key, Segment, Syn, Tuple, payload_len},
};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use seq_macro::seq;

use super::mem;

/// Where things stand in a TCP header (RFC 9293, section 3.1).
pub(super) const SEQUENCE: usize = 4;
pub(super) const FLAGS: usize = 13;
pub(super) const WINDOW: usize = 14;
pub(super) const CHECKSUM: usize = 16;

/// Where source and destination stand in an IP header.
pub(super) const IPV4_ADDRESSES: usize = 12;
pub(super) const IPV6_ADDRESSES: usize = 8;

/// `IPPROTO_TCP`, `IPPROTO_ICMP`, `IPPROTO_ICMPV6`.
pub(super) const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Hop-by-hop, routing, fragment, destination options: TCP may follow (RFC 8200, section 4).
const BEFORE_OTHERS: [u8; 4] = [HOP_BY_HOP, 43, 44, 60];
const HOP_BY_HOP: u8 = 0;

/// `ETH_P_IP`, `ETH_P_IPV6`.
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86DD;

/// Length of the link-layer header of a device.
pub(super) trait Link {
    /// In bytes.
    const LEN: usize;
}

/// Ethernet.
pub(super) struct Ethernet;

impl Link for Ethernet {
    const LEN: usize = EthHdr::LEN;
}

/// A device without link-layer header, such as tun or WireGuard.
pub(super) struct Raw;

impl Link for Raw {
    const LEN: usize = 0;
}

/// What a packet is.
pub(super) enum Parsed {
    /// A whole TCP segment.
    Tcp,
    /// A part of TCP that is not read: a fragment, or TCP behind options or extension headers. Its key is that of the packet; its ports
    /// are 0 where they could not be read either.
    Unreadable,
    /// ICMP or ICMPv6, whose header is at [`Packet::tcp`].
    Icmp,
    /// Anything else.
    Other,
}

/// A TCP segment in its packet. Offsets are from the start of the packet. It lies in a map: the stack is small.
pub(super) struct Packet {
    /// The IP header.
    pub(super) ip: usize,
    /// The TCP header.
    pub(super) tcp: usize,
    /// The TCP header's length, options included: 20 to 60.
    pub(super) tcp_len: usize,
    pub(super) ipv6: bool,
    /// Source and destination.
    pub(super) key: Key,
    pub(super) segment: Segment,
    /// The sequence and the acknowledgement number that it leaves with, in network order.
    pub(super) leaving: [u32; 2],
    /// What it says if it is a SYN ([`Packet::read_syn`]).
    pub(super) syn: Syn,
    /// What was read of the packet, by words, which are read and written at once: the IP header, without options, and from
    /// [`TCP_AT`] on the TCP header with the first word of its options. Later it is where a TCP header is put together.
    words: [u32; WORDS],
}

/// Where the TCP header's words stand: behind those of the longer of the two IP headers. A place that depended on the version of
/// IP would be a variable offset, which the verifier allows to no loader without CAP_PERFMON.
const TCP_AT: usize = Ipv6Hdr::LEN / 4;
/// Where the first option stands.
const OPTIONS_AT: usize = TCP_AT + TcpHdr::LEN / 4;
const WORDS: usize = OPTIONS_AT + 1;

/// The longest TCP header.
pub(super) const LONGEST: usize = 60;

const _: () = assert!(LONGEST <= WORDS * 4);

/// The hop-by-hop header of a packet that is too long for its IP header's length (RFC 2675): eight bytes.
const JUMBO: usize = 8;

/// Whether it is one of IPv6.
#[inline(always)]
pub(super) fn is_ipv6(skb: &TcContext) -> bool {
    protocol(skb) == IPV6
}

/// The packet's Ethernet type.
#[inline(always)]
fn protocol(skb: &TcContext) -> u16 {
    // SAFETY: the program's own context.
    u16::from_be(unsafe { (*skb.skb.skb).protocol } as u16)
}

/// Four bytes of a packet. Two lie on an even address in every packet, four need not.
#[repr(C, align(2))]
#[derive(Clone, Copy)]
pub(super) struct Word(pub(super) [u8; 4]);

/// The first `len` bytes of the packet from `at` on in one piece.
#[inline(always)]
pub(super) fn front(skb: &TcContext, at: usize, len: usize) -> Option<*mut Word> {
    let (start, end) = (skb.data(), skb.data_end());
    if start + at + len <= end {
        return Some((start + at) as *mut Word);
    }
    // SAFETY: the program's own context.
    if unsafe { bpf_skb_pull_data(skb.as_ptr().cast(), (at + len) as u32) } != 0 {
        return None;
    }
    let (start, end) = (skb.data(), skb.data_end());
    (start + at + len <= end).then_some((start + at) as *mut Word)
}

/// Reads a word of the packet's front.
#[inline(always)]
fn word(front: *const Word, index: usize) -> u32 {
    // SAFETY: within what `front` has checked, by its callers.
    u32::from_ne_bytes(unsafe { front.add(index).read() }.0)
}

/// Reads the headers of a packet.
#[inline(always)]
pub(super) fn parse<L: Link>(skb: &TcContext, packet: &mut Packet) -> Parsed {
    packet.ip = L::LEN;
    match protocol(skb) {
        IPV4 => parse_ipv4::<L>(skb, packet),
        IPV6 => parse_ipv6::<L>(skb, packet),
        _ => Parsed::Other,
    }
}

#[inline(always)]
fn parse_ipv4<L: Link>(skb: &TcContext, packet: &mut Packet) -> Parsed {
    const IP: usize = Ipv4Hdr::LEN / 4;
    const MORE: u32 = 0x2000;
    const OFFSET: u32 = 0x1FFF;

    let Some(ip) = front(skb, L::LEN, Ipv4Hdr::LEN) else { return Parsed::Other };
    for index in 0..IP {
        packet.words[index] = word(ip, index);
    }
    packet.ipv6 = false;
    packet.forget_ports();
    packet.tcp = L::LEN + Ipv4Hdr::LEN;
    packet.key.source.set_mapped(packet.words[3]);
    packet.key.destination.set_mapped(packet.words[4]);
    let (first, fragment) = (packet.word(0), packet.word(1));
    match (packet.word(2) >> 16) as u8 {
        TCP => {}
        ICMP if first >> 24 == 0x45 && fragment & (MORE | OFFSET) == 0 => return Parsed::Icmp,
        _ => return Parsed::Other,
    }
    // What is not the first fragment has no ports, and without the first it is nothing.
    if fragment & OFFSET != 0 {
        return Parsed::Other;
    }
    if first >> 24 != 0x45 || fragment & MORE != 0 {
        let len = (first >> 24 & 0x0F) as usize * 4;
        return packet.unreadable(skb, L::LEN + len);
    }
    let total = first & 0xFFFF;
    match packet.read_tcp::<IP>(skb, L::LEN) {
        true => parse_tcp(skb, packet, total, total == 0),
        false => Parsed::Other,
    }
}

#[inline(always)]
fn parse_ipv6<L: Link>(skb: &TcContext, packet: &mut Packet) -> Parsed {
    const IP: usize = Ipv6Hdr::LEN / 4;

    let Some(ip) = front(skb, L::LEN, Ipv6Hdr::LEN) else { return Parsed::Other };
    for index in 0..IP {
        packet.words[index] = word(ip, index);
    }
    packet.ipv6 = true;
    packet.forget_ports();
    packet.tcp = L::LEN + Ipv6Hdr::LEN;
    let [_, _, s0, s1, s2, s3, d0, d1, d2, d3, ..] = packet.words;
    packet.key.source.set([s0, s1, s2, s3]);
    packet.key.destination.set([d0, d1, d2, d3]);
    let (payload, next) = (packet.word(1) >> 16, (packet.word(1) >> 8) as u8);
    match next {
        TCP => {}
        ICMPV6 => return Parsed::Icmp,
        HOP_BY_HOP if payload == 0 => {
            // BIG TCP: the kernel's own packet of many segments (ipv6_gro_complete, net/ipv6/ip6_offload.c).
            if !is_jumbo::<L>(skb) {
                return behind_headers(skb, packet, next);
            }
            packet.tcp += JUMBO;
            return match packet.read_tcp::<{ IP + JUMBO / 4 }>(skb, L::LEN) {
                true => parse_tcp(skb, packet, 0, true),
                false => Parsed::Other,
            };
        }
        _ => return behind_headers(skb, packet, next),
    }
    match packet.read_tcp::<IP>(skb, L::LEN) {
        true => parse_tcp(skb, packet, Ipv6Hdr::LEN as u32 + payload, payload == 0),
        false => Parsed::Other,
    }
}

/// Whether the hop-by-hop header has the jumbo payload option and nothing else, and TCP follows.
#[inline(always)]
fn is_jumbo<L: Link>(skb: &TcContext) -> bool {
    /// Next header, length, option type and its length.
    const START: [u8; 4] = [TCP, 0, 0xC2, 4];
    matches!(front(skb, L::LEN + Ipv6Hdr::LEN, JUMBO), Some(option) if word(option, 0) == u32::from_ne_bytes(START))
}

/// Looks for TCP behind extension headers (RFC 8200, section 4). One of IPv6's first fragments has the headers before TCP whole (RFC
/// 7112); others are nothing without it.
#[inline(always)]
fn behind_headers(skb: &TcContext, packet: &mut Packet, next: u8) -> Parsed {
    const MOST: usize = 8;
    const FRAGMENT: u8 = 44;

    let (mut next, mut at) = (next, packet.tcp);
    for _ in 0..MOST {
        if next == TCP {
            return packet.unreadable(skb, at);
        }
        if !BEFORE_OTHERS.contains(&next) {
            return Parsed::Other;
        }
        let Ok(header) = skb.load::<[u8; 4]>(at) else { return Parsed::Unreadable };
        let len = if next == FRAGMENT {
            if u16::from_be_bytes([header[2], header[3]]) & !7 != 0 {
                return Parsed::Other;
            }
            8
        } else {
            (usize::from(header[1]) + 1) * 8
        };
        at += len;
        next = header[0];
    }
    // More than anyone sends: its ports are not known.
    Parsed::Unreadable
}

/// The TCP header, which stands among the packet's words. A packet of many segments that is too long for its IP header has no
/// length there (BIG TCP).
#[inline(always)]
fn parse_tcp(skb: &TcContext, packet: &mut Packet, total: u32, no_length: bool) -> Parsed {
    let length_flags_window = packet.word(TCP_AT + 3);
    packet.tcp_len = (length_flags_window >> 28) as usize * 4;
    let ports = packet.word(TCP_AT);
    packet.key.source.port = (ports >> 16) as u16;
    packet.key.destination.port = ports as u16;
    if packet.tcp_len < TcpHdr::LEN {
        return Parsed::Unreadable;
    }
    // SAFETY: the program's own context.
    let jumbo = no_length && unsafe { (*skb.skb.skb).gso_segs } > 1;
    let headers = (packet.tcp - packet.ip + packet.tcp_len) as u32;
    let Some(payload) = payload_len(total, headers, skb.len() - packet.ip as u32, jumbo) else {
        return Parsed::Unreadable;
    };
    packet.segment = Segment {
        flags: (length_flags_window >> 16) as u8,
        sequence: SeqNumber(packet.word(TCP_AT + 1)),
        acknowledgement: SeqNumber(packet.word(TCP_AT + 2)),
        payload,
        window: length_flags_window as u16,
    };
    Parsed::Tcp
}

/// A helper has failed, and with it everything: what is half rewritten must not leave.
pub(super) struct Failed;

impl Packet {
    /// Reads the TCP header, which begins `AT` words behind the link-layer header, and the word behind it; `false` if there is none.
    #[inline(always)]
    fn read_tcp<const AT: usize>(&mut self, skb: &TcContext, link: usize) -> bool {
        let Some(start) = front(skb, link, AT * 4 + TcpHdr::LEN) else { return false };
        for index in 0..TcpHdr::LEN / 4 {
            self.words[TCP_AT + index] = word(start, AT + index);
        }
        let (start, end) = (skb.data(), skb.data_end());
        let at = start + link + AT * 4 + TcpHdr::LEN;
        self.words[OPTIONS_AT] = if at + 4 <= end { word(at as *const Word, 0) } else { 0 };
        true
    }

    /// The value may have those of an earlier packet.
    #[inline(always)]
    fn forget_ports(&mut self) {
        (self.key.source.port, self.key.destination.port) = (0, 0);
    }

    /// Reads the ports of a packet whose TCP header begins there and is not read.
    #[inline(always)]
    fn unreadable(&mut self, skb: &TcContext, at: usize) -> Parsed {
        let [source, destination] = skb.load::<[u16; 2]>(at).unwrap_or_default();
        self.key.source.port = u16::from_be(source);
        self.key.destination.port = u16::from_be(destination);
        Parsed::Unreadable
    }

    /// Source and destination, as they stand in the packet.
    #[inline(always)]
    pub(super) fn tuple(&self) -> Tuple {
        let (words, ports) = (&self.words, self.words[TCP_AT]);
        if self.ipv6 {
            let source = [words[2], words[3], words[4], words[5]];
            Tuple { source, destination: [words[6], words[7], words[8], words[9]], ports, ipv6: 1 }
        } else {
            Tuple { source: [words[3], 0, 0, 0], destination: [words[4], 0, 0, 0], ports, ipv6: 0 }
        }
    }

    /// The source's address as bans have it.
    #[inline(always)]
    pub(super) fn source(&self) -> &[u32; 4] {
        // SAFETY: as many bytes, aligned to four.
        unsafe { &*(&raw const self.key.source.ip).cast() }
    }

    /// The hop limit, or time to live.
    #[inline(always)]
    pub(super) fn hop_limit(&self) -> u8 {
        if self.ipv6 { self.word(1) as u8 } else { (self.word(2) >> 24) as u8 }
    }

    /// A word of what was read, in the byte order of the machine.
    #[inline(always)]
    fn word(&self, index: usize) -> u32 {
        u32::from_be(self.words[index])
    }

    /// Where a TCP header is put together.
    #[inline(always)]
    pub(super) fn header(&mut self) -> &mut [u8; LONGEST] {
        // SAFETY: the same bytes; any are words.
        unsafe { &mut *(&raw mut self.words).cast() }
    }

    /// Makes it empty.
    #[inline(always)]
    pub(super) fn clear_header(&mut self) {
        // SAFETY: our own words.
        unsafe { mem::zero(&raw mut self.words) };
    }

    /// The destination's host, whatever the port.
    #[inline(always)]
    pub(super) fn to_host(&self) -> Address {
        Address::new(self.key.destination.ip, 0)
    }

    /// Replaces a word under the TCP checksum, at an even offset from the header.
    #[inline(always)]
    pub(super) fn replace_u32(&self, skb: &TcContext, at: usize, old: u32, new: u32) -> Result<(), Failed> {
        let (old, new) = (old.to_be(), new.to_be());
        skb.l4_csum_replace(self.tcp + CHECKSUM, old.into(), new.into(), 4).map_err(|_| Failed)?;
        skb.store(at, &new, 0).map_err(|_| Failed)
    }

    /// Replaces the window.
    #[inline(always)]
    pub(super) fn set_window(&self, skb: &TcContext, new: u16) -> Result<(), Failed> {
        let (old, new) = (self.segment.window.to_be(), new.to_be());
        skb.l4_csum_replace(self.tcp + CHECKSUM, old.into(), new.into(), 2).map_err(|_| Failed)?;
        skb.store(self.tcp + WINDOW, &new, 0).map_err(|_| Failed)
    }

    /// Fills in [`Packet::syn`], for this listener.
    #[inline(always)]
    pub(super) fn read_syn(&mut self, listener: u32) {
        let Self { segment, words: from, syn, ipv6, .. } = self;
        (syn.first, syn.listener) = (segment.sequence + 1, listener);
        let words = super::maps::words_mut(&mut syn.addresses);
        if *ipv6 {
            seq!(AT in 0..8 {
                words[AT] = from[2 + AT];
            });
            words[8] = from[TCP_AT];
            syn.addresses.ipv6 = 1;
        } else {
            (words[0], words[1], words[2]) = (from[3], from[4], from[TCP_AT]);
            syn.addresses.ipv6 = 0;
        }
    }

    /// Makes the SACK blocks earlier by `less`.
    ///
    /// The option is looked for where every sender puts it: on a word's boundary behind two NOPs (RFC 2018, section 3; RFC 7323,
    /// appendix A), first or behind the timestamps. A block that is not found is only of less use to the client.
    #[inline(never)]
    pub(super) fn sack_earlier(&self, skb: &TcContext, less: u32) -> Result<(), Failed> {
        if !self.may_have_sack() {
            return Ok(());
        }
        let first = self.tcp + TcpHdr::LEN;
        let at = if self.has_timestamps() { first + TIMESTAMPS_LEN } else { first };
        let len = match skb.load::<[u8; 4]>(at) {
            Ok([NOP, NOP, SACK, len]) => usize::from(len),
            _ => return Ok(()),
        };
        // Written out: the verifier follows no loop that ends at an unknown place.
        seq!(EDGE in 0..8 {
            let edge = at + 4 + EDGE * 4;
            if 2 + (EDGE + 1) * 4 > len || edge + 4 > self.tcp + self.tcp_len {
                return Ok(());
            }
            let old = u32::from_be(skb.load::<u32>(edge).map_err(|_| Failed)?);
            self.replace_u32(skb, edge, old, old.wrapping_sub(less))?;
        });
        Ok(())
    }

    /// Whether there may be a SACK block among the options: there are others than the timestamps.
    #[inline(always)]
    pub(super) fn may_have_sack(&self) -> bool {
        self.tcp_len != TcpHdr::LEN
            && !(self.tcp_len == TcpHdr::LEN + TIMESTAMPS_LEN && self.has_timestamps())
    }

    /// Whether the options begin with the timestamps, as those of nearly every segment do.
    #[inline(always)]
    pub(super) fn has_timestamps(&self) -> bool {
        self.tcp_len >= TcpHdr::LEN + TIMESTAMPS_LEN
            && self.words[OPTIONS_AT] == u32::from_ne_bytes(TIMESTAMPS)
    }
}

/// Options (RFC 9293, section 3.1; RFC 2018; RFC 7323).
const NOP: u8 = 1;
const SACK: u8 = 5;
/// Two NOPs, kind and length of the timestamps.
pub(super) const TIMESTAMPS: [u8; 4] = [NOP, NOP, 8, 10];
/// All of it.
pub(super) const TIMESTAMPS_LEN: usize = 12;

/// The helpers take no size of 0. Before Linux 6.8 the verifier learns nothing from a comparison with 0 ("invalid access to map
/// value, value_size=244 off=12 size=0"), so it is none.
#[inline(always)]
fn at_least_one(len: usize) -> usize {
    len.max(1)
}

/// Reads `len` bytes, which fit.
#[inline(always)]
pub(super) fn load_bytes(skb: &TcContext, at: usize, into: &mut [u8], len: usize) -> Result<(), Failed> {
    if len > into.len() {
        return Err(Failed);
    }
    let len = at_least_one(len);
    // SAFETY: `into` holds `len` bytes by the check above.
    let result =
        unsafe { bpf_skb_load_bytes(skb.as_ptr().cast(), at as u32, into.as_mut_ptr().cast(), len as u32) };
    if result == 0 { Ok(()) } else { Err(Failed) }
}

/// Writes the first `len` bytes of `from`, without a word to any checksum.
#[inline(always)]
pub(super) fn store_bytes<const N: usize>(
    skb: &TcContext,
    at: usize,
    from: &[u8; N],
    len: usize,
) -> Result<(), Failed> {
    if len > N {
        return Err(Failed);
    }
    let len = at_least_one(len);
    // SAFETY: `from` holds `len` bytes by the check above.
    let result =
        unsafe { bpf_skb_store_bytes(skb.as_ptr().cast(), at as u32, from.as_ptr().cast(), len as u32, 0) };
    if result == 0 { Ok(()) } else { Err(Failed) }
}

/// Adds a difference of sums to the TCP checksum.
#[inline(always)]
pub(super) fn add_to_checksum(skb: &TcContext, checksum: usize, difference: u32) -> Result<(), Failed> {
    // SAFETY: the program's own context; size 0 means that the last but one argument is a difference.
    let result =
        unsafe { bpf_l4_csum_replace(skb.as_ptr().cast(), checksum as u32, 0, difference.into(), 0) };
    if result == 0 { Ok(()) } else { Err(Failed) }
}

/// Tells the TCP checksum that the segment's length has changed, which stands in the pseudo header.
#[inline(always)]
pub(super) fn change_length(skb: &TcContext, checksum: usize, old: u16, new: u16) -> Result<(), Failed> {
    /// `BPF_F_PSEUDO_HDR`, and the size.
    const PSEUDO_HEADER: u64 = 1 << 4;
    skb.l4_csum_replace(checksum, old.to_be().into(), new.to_be().into(), PSEUDO_HEADER | 2)
        .map_err(|_| Failed)
}
