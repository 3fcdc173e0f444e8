//! Frames with a SYN, each from a template of which only source and sequence number change.

use std::net::{Ipv4Addr, SocketAddrV4};

use etherparse::{PacketBuilder, TcpOptionElement};

/// The network of the forged sources, for tests of network devices (RFC 2544, section C.2.2).
pub const SOURCES: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);

/// Bits of [`SOURCES`].
pub const SOURCE_PREFIX: u8 = 15;

/// Length of the frames: Ethernet, IPv4, TCP with the options of Linux' SYNs.
pub(super) const FRAME: usize = 14 + 20 + 40;

/// Offsets in a frame.
const IP_CHECKSUM: usize = 14 + 10;
const SOURCE: usize = 14 + 12;
const PORT: usize = 14 + 20;
const SEQUENCE: usize = PORT + 4;
const TCP_CHECKSUM: usize = PORT + 16;

/// Hops that are left of a packet's way.
const TTL: u8 = 60;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HardwareAddress(pub [u8; 6]);

impl std::fmt::Display for HardwareAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What differs between SYNs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Syn {
    /// Its last bits are the host in [`SOURCES`].
    pub(super) host: u32,
    /// The source port.
    pub(super) port: u16,
    /// The sequence number.
    pub(super) sequence: u32,
}

/// A frame whose source, port and sequence number are zero.
#[derive(Clone, Debug)]
pub(super) struct Template([u8; FRAME]);

impl Template {
    pub(super) fn new(
        from: HardwareAddress,
        next_hop: HardwareAddress,
        target: SocketAddrV4,
    ) -> anyhow::Result<Self> {
        let options = [
            TcpOptionElement::MaximumSegmentSize(1460),
            TcpOptionElement::SelectiveAcknowledgementPermitted,
            TcpOptionElement::Timestamp(1, 0),
            TcpOptionElement::Noop,
            TcpOptionElement::WindowScale(7),
        ];
        let builder = PacketBuilder::ethernet2(from.0, next_hop.0)
            .ipv4([0; 4], target.ip().octets(), TTL)
            .tcp(0, target.port(), 0, 64_240)
            .syn()
            .options(&options)?;
        let mut frame = Vec::with_capacity(FRAME);
        builder.write(&mut frame, &[])?;
        Ok(Self(frame.as_slice().try_into()?))
    }

    pub(super) fn write(&self, syn: &Syn, frame: &mut [u8; FRAME]) {
        *frame = self.0;
        let host = syn.host & (u32::MAX >> SOURCE_PREFIX);
        let source = (u32::from(SOURCES) | host).to_be_bytes();
        let (port, sequence) = (syn.port.to_be_bytes(), syn.sequence.to_be_bytes());
        put(frame, SOURCE, &source);
        put(frame, PORT, &port);
        put(frame, SEQUENCE, &sequence);
        add(frame, IP_CHECKSUM, &[&source]);
        // The pseudo-header has the source too.
        add(frame, TCP_CHECKSUM, &[&source, &port, &sequence]);
    }
}

fn put(frame: &mut [u8; FRAME], at: usize, bytes: &[u8]) {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Adds words that were zero to a checksum (RFC 1624, equation 3).
fn add(frame: &mut [u8; FRAME], at: usize, fields: &[&[u8]]) {
    let old = u16::from_be_bytes([frame[at], frame[at + 1]]);
    let words = fields.iter().flat_map(|field| field.chunks_exact(2));
    let sum =
        words.fold(u32::from(!old), |sum, word| sum + u32::from(u16::from_be_bytes([word[0], word[1]])));
    // Two carries at most: there are fewer words than 2^16.
    let once = (sum & 0xFFFF) + (sum >> 16);
    let folded = (once & 0xFFFF) + (once >> 16);
    let [high, low] = u16::try_from(folded).map_or([0; 2], |folded| (!folded).to_be_bytes());
    (frame[at], frame[at + 1]) = (high, low);
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    use rand::{Rng as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn every_frame_is_a_syn_with_correct_checksums() {
        let target = "192.0.2.10:25".parse().unwrap();
        let (from, next_hop) = (HardwareAddress([2, 0, 0, 0, 0, 2]), HardwareAddress([2, 0, 0, 0, 0, 1]));
        let template = Template::new(from, next_hop, target).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut frame = [0; FRAME];
        let fixed = [(0, 0, 0), (u32::MAX, u16::MAX, u32::MAX)];
        let random =
            (0..10_000).map(|_| (rng.next_u32(), rng.next_u32().to_be_bytes()[0].into(), rng.next_u32()));
        for (host, port, sequence) in fixed.into_iter().chain(random.collect::<Vec<_>>()) {
            template.write(&Syn { host, port, sequence }, &mut frame);
            let packet = SlicedPacket::from_ethernet(&frame).unwrap();
            let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Tcp(tcp))) = (packet.net, packet.transport)
            else {
                panic!("not TCP over IPv4")
            };
            let header = ip.header();
            let source = header.source_addr();
            assert_eq!(u32::from(source) >> (32 - SOURCE_PREFIX), u32::from(SOURCES) >> (32 - SOURCE_PREFIX));
            assert_eq!((header.destination_addr(), tcp.destination_port()), (*target.ip(), target.port()));
            assert_eq!((tcp.source_port(), tcp.sequence_number()), (port, sequence));
            assert!(tcp.syn() && !tcp.ack() && tcp.options().len() == 20);
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            assert_eq!(
                tcp.checksum(),
                tcp.calc_checksum_ipv4(header.source(), header.destination()).unwrap()
            );
        }
    }

    #[test]
    fn a_hardware_address_is_printed_for_ip() {
        assert_eq!(HardwareAddress([2, 0, 0, 0, 0xAB, 1]).to_string(), "02:00:00:00:ab:01");
    }
}
