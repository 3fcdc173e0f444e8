//! Putting the header into a packet.

use core::ptr;

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_csum_diff, bpf_skb_change_tail},
    programs::TcContext,
};
use injector_common::inline::{ACK, FIN, Flow, HeaderAddresses, IPV6_MIN_MTU, Key, PSH, Template, URG};
use network_types::{ip::Ipv6Hdr, tcp::TcpHdr};

use super::{
    maps,
    packet::{
        CHECKSUM, FLAGS, Failed, IPV4_ADDRESSES, IPV6_ADDRESSES, LONGEST, Packet, TCP, TIMESTAMPS,
        TIMESTAMPS_LEN, add_to_checksum, change_length, load_bytes, store_bytes,
    },
};

/// Appends the header to a segment without payload, from the client. Addresses and numbers are still the client's.
#[inline(never)]
pub(super) fn append(skb: &TcContext, packet: &Packet, flow: &Flow) -> Result<(), Failed> {
    let sum = put(skb, packet, flow, packet.tcp_len, 0, 0)?;
    add_to_checksum(skb, packet.tcp + CHECKSUM, sum)?;
    let len = packet.tcp_len as u16;
    change_length(skb, packet.tcp + CHECKSUM, len, len + flow.header_len as u16)
}

/// Puts the header in front of the payload of a client's segment. Addresses and numbers are still the client's. `false` if the packet
/// has no room for both, and is as it was. Of more than [`IPV6_MIN_MTU`] bytes it is unknown whether they arrive.
#[inline(never)]
pub(super) fn prepend(skb: &TcContext, packet: &Packet, flow: &Flow) -> Result<bool, Failed> {
    let room = (flow.backend_side.hop.mtu as usize).min(IPV6_MIN_MTU);
    // Read anew by each who uses it: the verifier forgets what an earlier check has said about a number that lies in a map.
    // SAFETY: a field.
    let payload = || unsafe { (&raw const packet.segment.payload).read_volatile() } as usize;
    let at = packet.tcp + packet.tcp_len;
    if at - packet.ip + flow.header_len as usize + payload() > room {
        return Ok(false);
    }
    let moved = maps::payload().ok_or(Failed)?;
    load_bytes(skb, at, moved, payload())?;
    // A whole number of words moves the payload: its sum stays.
    let sum = put(skb, packet, flow, packet.tcp_len, payload(), 0)?;
    store_bytes(skb, at + flow.header_len as usize, moved, payload())?;
    let payload = payload();
    add_to_checksum(skb, packet.tcp + CHECKSUM, sum)?;
    let len = (packet.tcp_len + payload) as u16;
    change_length(skb, packet.tcp + CHECKSUM, len, len + flow.header_len as u16).map(|()| true)
}

/// Puts the header in place of the payload of a client's segment.
///
/// What the payload's sum is need not be known: the checksum is made anew from what is left. A checksum that is still to be
/// computed is not touched by that, save by the length.
#[inline(always)]
pub(super) fn replace(skb: &TcContext, packet: &mut Packet, flow: &Flow) -> Result<(), Failed> {
    packet.clear_header();
    let len = packet.tcp_len;
    load_bytes(skb, packet.tcp, packet.header(), len)?;
    let tcp = packet.header();
    let checksum = u16::from_ne_bytes([tcp[CHECKSUM], tcp[CHECKSUM + 1]]);
    // An end and urgent data are the payload's.
    tcp[FLAGS] &= !(FIN | URG);
    [tcp[CHECKSUM], tcp[CHECKSUM + 1]] = [0; 2];
    [tcp[CHECKSUM + 2], tcp[CHECKSUM + 3]] = [0; 2];
    let flags = packet.header()[FLAGS];
    skb.store(packet.tcp + FLAGS, &flags, 0).map_err(|_| Failed)?;
    skb.store(packet.tcp + CHECKSUM + 2, &0_u16, 0).map_err(|_| Failed)?;
    let old_len = (packet.tcp_len as u32 + packet.segment.payload) as u16;
    let ends = sum_of_ends(&mut packet.key, old_len);
    let without_header = sum_with(packet.header(), ends);
    let sum = put(skb, packet, flow, packet.tcp_len, 0, without_header)?;
    // A checksum less a difference is the new one, which is nothing less this sum.
    add_to_checksum(skb, packet.tcp + CHECKSUM, add(sum, checksum.into()))?;
    let len = packet.tcp_len as u16 + flow.header_len as u16;
    change_length(skb, packet.tcp + CHECKSUM, old_len, len)
}

/// Turns a segment of the backend that has no payload round: it goes back as one of the client's, with the header.
///
/// Addresses and ports change places, which leaves every sum as it is. The timestamps do as well: the backend's echo is the
/// client's clock, and anything older would fail the test for wrapped sequence numbers (RFC 7323, section 5). Other options
/// are left out: a SACK block would not be the client's.
#[inline(always)]
pub(super) fn retransmit(skb: &TcContext, packet: &mut Packet, flow: &Flow) -> Result<(), Failed> {
    let with_timestamps = packet.has_timestamps();
    // One buffer for both headers.
    packet.clear_header();
    let len = packet.tcp_len;
    load_bytes(skb, packet.tcp, packet.header(), len)?;
    let without_old = sum_without(packet.header());
    let tcp = packet.header();
    let (checksum, value, echo) = ([tcp[16], tcp[17]], word(tcp, 24), word(tcp, 28));
    let [source, destination] = [word(tcp, 0), word(tcp, 2)];

    packet.clear_header();
    let tcp = packet.header();
    let mut tcp_len = TcpHdr::LEN;
    if with_timestamps {
        tcp_len += TIMESTAMPS_LEN;
        set_word(tcp, 20, TIMESTAMPS);
        set_word(tcp, 24, echo);
        set_word(tcp, 28, value);
    }
    [tcp[0], tcp[1]] = [destination[0], destination[1]];
    [tcp[2], tcp[3]] = [source[0], source[1]];
    set_word(tcp, 4, (flow.first + flow.offset).0.to_be_bytes());
    set_word(tcp, 8, flow.backend.acked.0.to_be_bytes());
    tcp[12] = ((tcp_len / 4) as u8) << 4;
    tcp[13] = ACK | PSH;
    [tcp[14], tcp[15]] = (flow.window as u16).to_be_bytes();
    // The checksum stays, and is changed by the difference.
    [tcp[16], tcp[17]] = checksum;

    let difference = put(skb, packet, flow, tcp_len, 0, without_old)?;
    let tcp = packet.tcp;
    store_bytes(skb, tcp, packet.header(), tcp_len)?;
    add_to_checksum(skb, packet.tcp + CHECKSUM, sum_with(packet.header(), difference))?;
    let new_len = tcp_len as u16 + flow.header_len as u16;
    change_length(skb, packet.tcp + CHECKSUM, packet.tcp_len as u16, new_len)?;
    swap_addresses(skb, packet)
}

#[inline(always)]
fn word(bytes: &[u8; LONGEST], at: usize) -> [u8; 4] {
    [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]
}

#[inline(always)]
fn set_word(bytes: &mut [u8; LONGEST], at: usize, word: [u8; 4]) {
    [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]] = word;
}

/// Nothing less these bytes.
#[inline(always)]
fn sum_without(bytes: &mut [u8; LONGEST]) -> u32 {
    // SAFETY: the buffer has the length given; zeros behind a header add nothing.
    unsafe { bpf_csum_diff(bytes.as_mut_ptr().cast(), LONGEST as u32, ptr::null_mut(), 0, 0) as u32 }
}

/// A sum and these bytes.
#[inline(always)]
fn sum_with(bytes: &mut [u8; LONGEST], sum: u32) -> u32 {
    // SAFETY: as above.
    unsafe { bpf_csum_diff(ptr::null_mut(), 0, bytes.as_mut_ptr().cast(), LONGEST as u32, sum) as u32 }
}

/// Makes the packet as long as a TCP header of `tcp_len` bytes, the header, and so many bytes of payload; fills in the header,
/// sets the lengths in IP, and returns the header's sum added to `sum`. The header is written with its own length, though the flow
/// knows it too: a changed configuration must not reach into a connection.
#[inline(always)]
fn put(
    skb: &TcContext,
    packet: &Packet,
    flow: &Flow,
    tcp_len: usize,
    payload: usize,
    sum: u32,
) -> Result<u32, Failed> {
    let template = maps::template(flow.listener, packet.ipv6).ok_or(Failed)?;
    if template.len != flow.header_len {
        return Err(Failed);
    }
    // Read anew: to the compiler it is the flow's, of which the verifier does not know that it is bounded.
    // SAFETY: a field.
    let len = unsafe { (&raw const template.len).read_volatile() } as usize;
    let at = packet.tcp + tcp_len;
    let end = at + len + payload;
    // SAFETY: the program's own context.
    if unsafe { bpf_skb_change_tail(skb.as_ptr().cast(), end as u32, 0) } != 0 {
        return Err(Failed);
    }
    store_bytes(skb, at, &template.bytes, len)?;
    let addresses = &flow.addresses.bytes;
    let addresses_len = if packet.ipv6 { HeaderAddresses::IPV6 } else { HeaderAddresses::IPV4 };
    store_bytes(skb, at + Template::ADDRESSES_AT, addresses, addresses_len)?;
    set_lengths(skb, packet, end - packet.ip)?;
    // SAFETY: the addresses are in a map value, and have this length or more.
    let sum = unsafe {
        let (none, addresses) = (ptr::null_mut(), addresses.as_ptr().cast_mut().cast());
        bpf_csum_diff(none, 0, addresses, addresses_len as u32, add(template.sum, sum))
    };
    Ok(sum as u32)
}

/// The sum of what the TCP checksum covers besides the segment (RFC 9293, section 3.1), for a segment of `len` bytes. An
/// address that is mapped into IPv6 has the sum that it has in IPv4, for 0xFFFF is zero.
#[inline(always)]
fn sum_of_ends(key: &mut Key, len: u16) -> u32 {
    let mut sum = add(u32::from(len.to_be()), u32::from(u16::from(TCP).to_be()));
    for ip in [&mut key.source.ip, &mut key.destination.ip] {
        // SAFETY: 16 bytes of a map value.
        sum = unsafe { bpf_csum_diff(ptr::null_mut(), 0, ip.as_mut_ptr().cast(), 16, sum) as u32 };
    }
    sum
}

/// Ones' complement addition (RFC 1071).
#[inline(always)]
fn add(one: u32, other: u32) -> u32 {
    let (sum, carry) = one.overflowing_add(other);
    sum + u32::from(carry)
}

/// Says in the IP header how long the packet is from there on.
#[inline(always)]
fn set_lengths(skb: &TcContext, packet: &Packet, len: usize) -> Result<(), Failed> {
    const TOTAL_LENGTH: usize = 2;
    const IP_CHECKSUM: usize = 10;
    const PAYLOAD_LENGTH: usize = 4;

    if packet.ipv6 {
        let len = (len - Ipv6Hdr::LEN) as u16;
        return skb.store(packet.ip + PAYLOAD_LENGTH, &len.to_be(), 0).map_err(|_| Failed);
    }
    let old = skb.load::<u16>(packet.ip + TOTAL_LENGTH).map_err(|_| Failed)?;
    let new = (len as u16).to_be();
    skb.l3_csum_replace(packet.ip + IP_CHECKSUM, old.into(), new.into(), 2).map_err(|_| Failed)?;
    skb.store(packet.ip + TOTAL_LENGTH, &new, 0).map_err(|_| Failed)
}

/// Source becomes destination.
#[inline(always)]
fn swap_addresses(skb: &TcContext, packet: &Packet) -> Result<(), Failed> {
    if packet.ipv6 {
        let [source, destination] =
            skb.load::<[[u8; 16]; 2]>(packet.ip + IPV6_ADDRESSES).map_err(|_| Failed)?;
        skb.store(packet.ip + IPV6_ADDRESSES, &[destination, source], 0).map_err(|_| Failed)
    } else {
        let [source, destination] =
            skb.load::<[[u8; 4]; 2]>(packet.ip + IPV4_ADDRESSES).map_err(|_| Failed)?;
        skb.store(packet.ip + IPV4_ADDRESSES, &[destination, source], 0).map_err(|_| Failed)
    }
}
