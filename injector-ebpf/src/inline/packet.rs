//! Reading a packet's headers, and rewriting numbers in them with their checksums.
//!
//! Everything goes through helpers: they reach into packets whose headers are not in one piece, make them writable, and leave
//! the checksum of a packet whose checksum is still to be computed (CHECKSUM_PARTIAL) as it must be.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes},
    programs::TcContext,
};
use injector_common::{
    SeqNumber,
    inline::{ACK, Address, HeaderAddresses, Key, SYN, Segment, payload_len},
};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use super::mem;

/// Where things stand in a TCP header (RFC 9293, section 3.1).
pub(super) const SEQUENCE: usize = 4;
pub(super) const ACKNOWLEDGEMENT: usize = 8;
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
const BEFORE_OTHERS: [u8; 4] = [0, 43, 44, 60];

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
    /// A fragment of TCP, or TCP behind something that is not read; [`Packet::to_host`] says to whom.
    Unreadable,
    /// ICMP or ICMPv6, whose header is at [`Packet::tcp`].
    Icmp,
    /// Anything else.
    Other,
}

/// Which side sent a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// The client.
    Client,
    /// The backend.
    Backend,
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
    /// Source and destination, by who sent it.
    pub(super) key: Key,
    pub(super) segment: Segment,
    /// What was read of the packet, by words, which are read and written at once: the IP header, without options, and from
    /// [`TCP_AT`] on the TCP header. Later it is where a TCP header is put together.
    words: [u32; LONGEST / 4],
}

/// Where the TCP header's words stand: behind those of the longer of the two IP headers. A place that depended on the version of
/// IP would be a variable offset, which the verifier allows to no loader without CAP_PERFMON.
const TCP_AT: usize = Ipv6Hdr::LEN / 4;

/// The longest TCP header.
pub(super) const LONGEST: usize = 60;

/// Whether it is one of IPv6.
#[inline(always)]
pub(super) fn is_ipv6(skb: &TcContext) -> bool {
    // SAFETY: the program's own context.
    u16::from_be(unsafe { (*skb.skb.skb).protocol } as u16) == IPV6
}

/// 1 in the self-test, whose packets begin in `BPF_PROG_TEST_RUN`: that lets no `tc_index` in (convert___skb_to_skb,
/// net/bpf/test_run.c), so there the mark carries the token. Set by the loader; the verifier takes out the branch that is not
/// gone.
#[unsafe(no_mangle)]
static SELF_TEST: u32 = 0;

#[inline(always)]
fn self_test() -> bool {
    // SAFETY: a constant of the loaded program.
    unsafe { (&raw const SELF_TEST).read_volatile() != 0 }
}

/// Has the packet carry the token of its slot, or none (0).
#[inline(always)]
pub(super) fn set_token(skb: &TcContext, token: u16) {
    if self_test() {
        skb.set_mark(token.into());
        mem::compiler_barrier();
        return;
    }
    // SAFETY: the program's own context.
    unsafe { (*skb.skb.skb).tc_index = token.into() };
}

/// The token that the packet carries.
#[inline(always)]
pub(super) fn token(skb: &TcContext) -> u16 {
    if self_test() {
        // SAFETY: the program's own context.
        let mark = unsafe { (*skb.skb.skb).mark };
        mem::compiler_barrier();
        return mark as u16;
    }
    // SAFETY: the program's own context.
    unsafe { (*skb.skb.skb).tc_index as u16 }
}

/// Four bytes of a packet. Two lie on an even address in every packet, four need not.
#[repr(C, align(2))]
struct Word([u8; 4]);

/// Reads the headers of a packet.
#[inline(always)]
pub(super) fn parse<L: Link>(skb: &TcContext, packet: &mut Packet, origin: Origin) -> Parsed {
    packet.ip = L::LEN;
    // SAFETY: the program's own context.
    match u16::from_be(unsafe { (*skb.skb.skb).protocol } as u16) {
        IPV4 => parse_ipv4::<L>(skb, packet, origin),
        IPV6 => parse_ipv6::<L>(skb, packet, origin),
        _ => Parsed::Other,
    }
}

#[inline(always)]
fn parse_ipv4<L: Link>(skb: &TcContext, packet: &mut Packet, origin: Origin) -> Parsed {
    const MORE_OR_OFFSET: u32 = 0x3FFF;
    const WORDS: usize = Ipv4Hdr::LEN / 4;

    let both = packet.read_front::<L, WORDS>(skb);
    if !both && packet.read(skb, packet.ip, 0, Ipv4Hdr::LEN).is_err() {
        return Parsed::Other;
    }
    let protocol = packet.word(2) >> 16 & 0xFF;
    if protocol != u32::from(TCP) && protocol != u32::from(ICMP) {
        return Parsed::Other;
    }
    packet.ipv6 = false;
    let len = (packet.word(0) >> 24 & 0x0F) as usize * 4;
    packet.tcp = packet.ip + len;
    let addresses = [packet.words[3], packet.words[4]];
    let [source, destination] = origin.ends(&mut packet.key);
    source.set_mapped(addresses[0]);
    destination.set_mapped(addresses[1]);
    if protocol == u32::from(ICMP) {
        return Parsed::Icmp;
    }
    if packet.word(1) & MORE_OR_OFFSET != 0 {
        return Parsed::Unreadable;
    }
    if !(both && len == Ipv4Hdr::LEN) && packet.read_tcp(skb).is_err() {
        return Parsed::Unreadable;
    }
    let total = packet.word(0) & 0xFFFF;
    parse_tcp(skb, packet, origin, total, total == 0)
}

#[inline(always)]
fn parse_ipv6<L: Link>(skb: &TcContext, packet: &mut Packet, origin: Origin) -> Parsed {
    const WORDS: usize = Ipv6Hdr::LEN / 4;

    let both = packet.read_front::<L, WORDS>(skb);
    if !both && packet.read(skb, packet.ip, 0, Ipv6Hdr::LEN).is_err() {
        return Parsed::Other;
    }
    packet.ipv6 = true;
    packet.tcp = packet.ip + Ipv6Hdr::LEN;
    let [_, _, s0, s1, s2, s3, d0, d1, d2, d3, ..] = packet.words;
    let [source, destination] = origin.ends(&mut packet.key);
    source.set([s0, s1, s2, s3]);
    destination.set([d0, d1, d2, d3]);
    match (packet.word(1) >> 8) as u8 {
        TCP if both || packet.read_tcp(skb).is_ok() => {}
        TCP => return Parsed::Unreadable,
        ICMPV6 => return Parsed::Icmp,
        next if BEFORE_OTHERS.contains(&next) => {
            // What follows begins with what comes after it (RFC 8200, section 4).
            return match skb.load::<u8>(packet.tcp) {
                Ok(after) if after == TCP || BEFORE_OTHERS.contains(&after) => Parsed::Unreadable,
                _ => Parsed::Other,
            };
        }
        _ => return Parsed::Other,
    }
    let payload = packet.word(1) >> 16;
    parse_tcp(skb, packet, origin, Ipv6Hdr::LEN as u32 + payload, payload == 0)
}

/// The TCP header, which stands among the packet's words. A packet of many segments that is too long for its IP header has no
/// length there (BIG TCP).
#[inline(always)]
fn parse_tcp(skb: &TcContext, packet: &mut Packet, origin: Origin, total: u32, no_length: bool) -> Parsed {
    let length_flags_window = packet.word(TCP_AT + 3);
    packet.tcp_len = (length_flags_window >> 28) as usize * 4;
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
    let ports = packet.word(TCP_AT);
    let [source, destination] = origin.ends(&mut packet.key);
    source.port = (ports >> 16) as u16;
    destination.port = ports as u16;
    Parsed::Tcp
}

/// Whether this packet is certainly not a SYN, as nearly all are not. It only recognises packets without
/// IP options whose headers are in one piece: without CAP_PERFMON the verifier allows constant offsets
/// into a packet only.
#[inline(always)]
pub(super) fn is_not_syn<L: Link>(skb: &TcContext) -> bool {
    const VERSION_AND_LENGTH: u8 = 0x45;
    const PROTOCOL: usize = 9;
    const NEXT_HEADER: usize = 6;

    // SAFETY: the program's own context.
    match u16::from_be(unsafe { (*skb.skb.skb).protocol } as u16) {
        IPV4 if byte(skb, L::LEN) == Some(VERSION_AND_LENGTH) => match byte(skb, L::LEN + PROTOCOL) {
            Some(TCP) if !is_fragment::<L>(skb) => is_mid_stream(byte(skb, L::LEN + Ipv4Hdr::LEN + FLAGS)),
            Some(TCP) | None => false,
            Some(_) => true,
        },
        IPV6 => match byte(skb, L::LEN + NEXT_HEADER) {
            Some(TCP) => is_mid_stream(byte(skb, L::LEN + Ipv6Hdr::LEN + FLAGS)),
            // TCP may follow.
            Some(next) => !BEFORE_OTHERS.contains(&next),
            None => false,
        },
        _ => false,
    }
}

/// Whether it is a fragment of an IPv4 packet, or may be one.
#[inline(always)]
fn is_fragment<L: Link>(skb: &TcContext) -> bool {
    const MORE: usize = 6;
    const OFFSET: usize = 7;
    // The top two bits are reserved and "don't fragment".
    !matches!((byte(skb, L::LEN + MORE), byte(skb, L::LEN + OFFSET)), (Some(more), Some(0)) if more & 0x3F == 0)
}

/// Whether these are the flags of a segment of an established connection.
#[inline(always)]
fn is_mid_stream(flags: Option<u8>) -> bool {
    flags.is_some_and(|flags| flags & (SYN | ACK) != SYN)
}

/// A byte of the packet that is not its last, if it lies in its first piece.
///
/// Two bytes must be there because a comparison of the packet's very start with its end says nothing to the verifier ("This
/// doesn't give us any range", find_good_pkt_pointers, kernel/bpf/verifier.c).
#[inline(always)]
fn byte(skb: &TcContext, at: usize) -> Option<u8> {
    let (start, end) = (skb.data(), skb.data_end());
    // SAFETY: within the packet by the comparison.
    (start + at + 2 <= end).then(|| unsafe { *((start + at) as *const u8) })
}

/// A helper has failed, and with it everything: what is half rewritten must not leave.
pub(super) struct Failed;

impl Origin {
    /// Source and destination.
    #[inline(always)]
    fn ends(self, key: &mut Key) -> [&mut Address; 2] {
        match self {
            Self::Client => [&mut key.source, &mut key.backend],
            Self::Backend => [&mut key.backend, &mut key.source],
        }
    }
}

impl Packet {
    /// Reads the IP header, of so many words, and the TCP header behind it from the packet's first piece, where they nearly always
    /// lie; `false` if they do not. No helper is needed.
    #[inline(always)]
    fn read_front<L: Link, const IP: usize>(&mut self, skb: &TcContext) -> bool {
        let (start, end) = (skb.data(), skb.data_end());
        if start + L::LEN + IP * 4 + TcpHdr::LEN > end {
            return false;
        }
        let front = (start + L::LEN) as *const Word;
        // SAFETY: within the packet by the comparison.
        let word = |index: usize| u32::from_ne_bytes(unsafe { front.add(index).read() }.0);
        for index in 0..IP {
            self.words[index] = word(index);
        }
        for index in 0..TcpHdr::LEN / 4 {
            self.words[TCP_AT + index] = word(IP + index);
        }
        true
    }

    /// Reads the TCP header from wherever it is.
    #[inline(always)]
    fn read_tcp(&mut self, skb: &TcContext) -> Result<(), Failed> {
        self.read(skb, self.tcp, TCP_AT, TcpHdr::LEN)
    }

    /// Reads `len` bytes of the packet into its words, from the one with this index on.
    #[inline(always)]
    fn read(&mut self, skb: &TcContext, at: usize, index: usize, len: usize) -> Result<(), Failed> {
        let (_, into) = self.header().split_at_mut_checked(index * 4).ok_or(Failed)?;
        load_bytes(skb, at, into, len)
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

    /// The backend's host, whatever the port.
    #[inline(always)]
    pub(super) fn to_host(&self) -> Address {
        Address::new(self.key.backend.ip, 0)
    }

    /// Replaces a sequence or acknowledgement number of the TCP header.
    #[inline(always)]
    pub(super) fn set_number(
        &self,
        skb: &TcContext,
        field: usize,
        old: SeqNumber,
        new: SeqNumber,
    ) -> Result<(), Failed> {
        self.replace_u32(skb, self.tcp + field, old.0, new.0)
    }

    /// The same anywhere under the TCP checksum, at an even offset from the header.
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

    /// Reads the addresses as a header has them.
    #[inline(always)]
    pub(super) fn read_addresses(&self, skb: &TcContext, into: &mut HeaderAddresses) -> Result<(), Failed> {
        if self.ipv6 {
            into.ipv6 = 1;
            load_bytes(skb, self.ip + IPV6_ADDRESSES, &mut into.bytes, 32)?;
            let (_, ports) = into.bytes.split_at_mut(32);
            load_ports(skb, self.tcp, ports)
        } else {
            into.ipv6 = 0;
            load_bytes(skb, self.ip + IPV4_ADDRESSES, &mut into.bytes, 8)?;
            let (_, ports) = into.bytes.split_at_mut(8);
            load_ports(skb, self.tcp, ports)
        }
    }

    /// Makes what the segment acknowledges earlier by `less`, its SACK blocks as well (RFC 2018).
    #[inline(always)]
    pub(super) fn acknowledge_earlier(&self, skb: &TcContext, less: u32) -> Result<(), Failed> {
        let acknowledgement = self.segment.acknowledgement;
        self.set_number(skb, ACKNOWLEDGEMENT, acknowledgement, acknowledgement - less)?;
        self.sack_earlier(skb, less)
    }

    /// Makes the SACK blocks earlier by `less`.
    ///
    /// The option is looked for where every sender puts it: on a word's boundary behind two NOPs (RFC 2018, section 3; RFC 7323,
    /// appendix A), first or behind the timestamps. A block that is not found is only of less use to the client.
    #[inline(always)]
    pub(super) fn sack_earlier(&self, skb: &TcContext, less: u32) -> Result<(), Failed> {
        const EDGES: usize = 8;

        let first = self.tcp + TcpHdr::LEN;
        let at = if self.has_timestamps(skb) { first + TIMESTAMPS_LEN } else { first };
        if self.tcp_len + self.tcp < at + 4 {
            return Ok(());
        }
        let len = match skb.load::<[u8; 4]>(at) {
            Ok([NOP, NOP, SACK, len]) => usize::from(len),
            _ => return Ok(()),
        };
        for edge in 0..EDGES {
            if 2 + (edge + 1) * 4 > len {
                break;
            }
            let at = at + 4 + edge * 4;
            let old = u32::from_be(skb.load::<u32>(at).map_err(|_| Failed)?);
            self.replace_u32(skb, at, old, old.wrapping_sub(less))?;
        }
        Ok(())
    }

    /// Whether there may be a SACK block among the options: there are others than the timestamps.
    #[inline(always)]
    pub(super) fn may_have_sack(&self, skb: &TcContext) -> bool {
        self.tcp_len != TcpHdr::LEN
            && !(self.tcp_len == TcpHdr::LEN + TIMESTAMPS_LEN && self.has_timestamps(skb))
    }

    /// Whether the options begin with the timestamps, as those of nearly every segment do.
    #[inline(always)]
    pub(super) fn has_timestamps(&self, skb: &TcContext) -> bool {
        self.tcp_len >= TcpHdr::LEN + TIMESTAMPS_LEN
            && skb.load::<[u8; 4]>(self.tcp + TcpHdr::LEN).is_ok_and(|start| start == TIMESTAMPS)
    }
}

/// Options (RFC 9293, section 3.1; RFC 2018; RFC 7323).
const NOP: u8 = 1;
const SACK: u8 = 5;
/// Two NOPs, kind and length of the timestamps.
pub(super) const TIMESTAMPS: [u8; 4] = [NOP, NOP, 8, 10];
/// All of it.
pub(super) const TIMESTAMPS_LEN: usize = 12;

#[inline(always)]
fn load_ports(skb: &TcContext, tcp: usize, into: &mut [u8]) -> Result<(), Failed> {
    load_bytes(skb, tcp, into, 4)
}

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
