//! A TCP segment as the bytes of a packet. It shares no code with the programs: it computes lengths
//! and checksums itself.

use std::net::{IpAddr, SocketAddr};

/// The link-layer format of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    Ethernet,
    Raw,
}

/// Addresses of the link layer: destination and source.
pub(super) type Ethernet = [[u8; 6]; 2];

/// A TCP segment. Comparing two shows every field that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// `None` on a device without link-layer header.
    pub(super) ethernet: Option<Ethernet>,
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    /// Whole words.
    pub(super) options: Vec<u8>,
    pub(super) payload: Vec<u8>,
}

const ETHERNET: usize = 14;
const TCP: usize = 20;
const IPV4: usize = 20;
const IPV6: usize = 40;
/// `IPPROTO_TCP`.
const PROTOCOL: u8 = 6;

impl Segment {
    /// The packet, with its checksums.
    pub(super) fn packet(&self) -> Result<Vec<u8>, String> {
        let mut tcp = Vec::new();
        tcp.extend(self.source.port().to_be_bytes());
        tcp.extend(self.destination.port().to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledgement.to_be_bytes());
        let words = u8::try_from((TCP + self.options.len()) / 4).map_err(|error| error.to_string())?;
        tcp.extend([words << 4, self.flags]);
        tcp.extend(self.window.to_be_bytes());
        // The checksum, for now, and the urgent pointer.
        tcp.extend([0; 4]);
        tcp.extend(&self.options);
        tcp.extend(&self.payload);
        let checksum = !sum(&[&pseudo_header(self.source.ip(), self.destination.ip(), tcp.len()), &tcp]);
        put(&mut tcp, 16, &checksum.to_be_bytes())?;

        let mut packet = Vec::new();
        if let Some([destination, source]) = self.ethernet {
            packet.extend(destination);
            packet.extend(source);
            packet.extend(if self.source.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xDD] });
        }
        packet.extend(ip_header(self.source.ip(), self.destination.ip(), tcp.len())?);
        packet.extend(tcp);
        Ok(packet)
    }

    /// Parses a packet; an error if a length or a checksum is wrong.
    pub(super) fn read(packet: &[u8], link: Link) -> Result<Self, String> {
        let (ethernet, ip) = match link {
            Link::Ethernet => {
                let (header, ip) = packet.split_first_chunk::<ETHERNET>().ok_or("no Ethernet header")?;
                let (addresses, _) = header.as_chunks::<6>();
                let addresses: Ethernet = addresses.try_into().map_err(|_| "no Ethernet addresses")?;
                (Some(addresses), ip)
            }
            Link::Raw => (None, packet),
        };
        let (source, destination, tcp) = read_ip(ip)?;
        let left = sum(&[&pseudo_header(source, destination, tcp.len()), tcp]);
        if left != 0xFFFF {
            return Err(format!("the TCP checksum is wrong by {:#06x}", !left));
        }
        let header = tcp.first_chunk::<TCP>().ok_or("no TCP header")?;
        let [s0, s1, d0, d1, n0, n1, n2, n3, a0, a1, a2, a3, words, flags, w0, w1, ..] = *header;
        let end = usize::from(words >> 4) * 4;
        let (options, payload) = (tcp.get(TCP..end), tcp.get(end..));
        Ok(Self {
            ethernet,
            source: SocketAddr::new(source, u16::from_be_bytes([s0, s1])),
            destination: SocketAddr::new(destination, u16::from_be_bytes([d0, d1])),
            sequence: u32::from_be_bytes([n0, n1, n2, n3]),
            acknowledgement: u32::from_be_bytes([a0, a1, a2, a3]),
            flags,
            window: u16::from_be_bytes([w0, w1]),
            options: options.ok_or("TCP options that are not there")?.to_vec(),
            payload: payload.ok_or("a TCP header that is not there")?.to_vec(),
        })
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) -> Result<(), String> {
    let place = bytes.get_mut(at..at + value.len()).ok_or("a header that is too short")?;
    place.copy_from_slice(value);
    Ok(())
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn ip_header(source: IpAddr, destination: IpAddr, payload: usize) -> Result<Vec<u8>, String> {
    const HOPS: u8 = 64;
    let mut header = Vec::new();
    if source.is_ipv4() {
        let total = u16::try_from(IPV4 + payload).map_err(|error| error.to_string())?;
        header.extend([0x45, 0]);
        header.extend(total.to_be_bytes());
        // Identification; not to be fragmented.
        header.extend([0, 1, 0x40, 0, HOPS, PROTOCOL, 0, 0]);
    } else {
        let payload = u16::try_from(payload).map_err(|error| error.to_string())?;
        header.extend([0x60, 0, 0, 0]);
        header.extend(payload.to_be_bytes());
        header.extend([PROTOCOL, HOPS]);
    }
    header.extend(octets(source));
    header.extend(octets(destination));
    if source.is_ipv4() {
        let checksum = !sum(&[&header]);
        put(&mut header, 10, &checksum.to_be_bytes())?;
    }
    Ok(header)
}

/// Source, destination, and the payload, whose length must match the header.
fn read_ip(packet: &[u8]) -> Result<(IpAddr, IpAddr, &[u8]), String> {
    let field =
        |at: usize| packet.get(at..at + 2).and_then(|two| two.try_into().ok()).map(u16::from_be_bytes);
    let ipv6 = packet.first().is_some_and(|first| first >> 4 == 6);
    let (said, len) = if ipv6 { (field(4), IPV6) } else { (field(2), IPV4) };
    let (header, behind) = packet.split_at_checked(len).ok_or("no IP header")?;
    let said = usize::from(said.unwrap_or_default());
    let counted = if ipv6 { behind.len() } else { packet.len() };
    if said != counted {
        return Err(format!("the IP header gives {said} bytes, the packet has {counted}"));
    }
    if !ipv6 && sum(&[header]) != 0xFFFF {
        return Err("the IP checksum is wrong".to_owned());
    }
    let address = |at: usize| -> Option<IpAddr> {
        if ipv6 {
            let octets: [u8; 16] = header.get(at..at + 16)?.try_into().ok()?;
            Some(octets.into())
        } else {
            let octets: [u8; 4] = header.get(at..at + 4)?.try_into().ok()?;
            Some(octets.into())
        }
    };
    let ends = if ipv6 { (address(8), address(24)) } else { (address(12), address(16)) };
    match ends {
        (Some(source), Some(destination)) => Ok((source, destination, behind)),
        _ => Err("no IP addresses".to_owned()),
    }
}

/// What the TCP checksum covers besides the segment (RFC 9293, section 3.1; RFC 8200, section 8.1).
fn pseudo_header(source: IpAddr, destination: IpAddr, len: usize) -> Vec<u8> {
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    [&octets(source)[..], &octets(destination), &len.to_be_bytes(), &[0, 0, 0, PROTOCOL]].concat()
}

/// The ones' complement sum of 16-bit words (RFC 1071). Every part but the last has an even length.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for word in part.chunks(2) {
            let high = word.first().copied().unwrap_or_default();
            let low = word.get(1).copied().unwrap_or_default();
            sum += u32::from(u16::from_be_bytes([high, low]));
        }
    }
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(ends: [&str; 2], ethernet: bool) -> Segment {
        Segment {
            ethernet: ethernet.then_some([[2; 6], [4; 6]]),
            source: ends[0].parse().unwrap(),
            destination: ends[1].parse().unwrap(),
            sequence: 0x0102_0304,
            acknowledgement: 0xFFFF_FFFE,
            flags: 0x18,
            window: 500,
            options: vec![1, 1, 1, 0],
            payload: b"odd".to_vec(),
        }
    }

    #[test]
    fn written_segments_parse_back() {
        for ends in [["192.0.2.1:1", "198.51.100.2:65535"], ["[2001:db8::1]:1", "[2001:db8::ffff]:65535"]] {
            for (ethernet, link) in [(true, Link::Ethernet), (false, Link::Raw)] {
                let segment = segment(ends, ethernet);
                assert_eq!(Segment::read(&segment.packet().unwrap(), link).unwrap(), segment);
            }
        }
    }

    #[test]
    fn every_changed_byte_of_ip_and_tcp_is_detected() {
        for ends in [["192.0.2.1:1", "198.51.100.2:2"], ["[2001:db8::1]:1", "[2001:db8::2]:2"]] {
            let whole = segment(ends, false).packet().unwrap();
            // Not under any checksum in IPv6: version and class, flow label, protocol, hops.
            let free = if ends[0].starts_with('[') { vec![0, 1, 2, 3, 6, 7] } else { vec![] };
            for at in (0..whole.len()).filter(|at| !free.contains(at)) {
                let mut changed = whole.clone();
                changed[at] ^= 0x01;
                Segment::read(&changed, Link::Raw).expect_err(&format!("byte {at}"));
            }
            assert!(Segment::read(&whole[..whole.len() - 1], Link::Raw).is_err());
        }
    }

    #[test]
    fn a_known_checksum() {
        // The example of RFC 1071, section 3.
        assert_eq!(sum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]), 0xddf2);
    }
}
