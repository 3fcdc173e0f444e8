//! Headers to start from, and strategies that make more.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use injector_common::proxy::{Addresses, Command, MAX_LEN, SIGNATURE, Tlv, v1, v2};
use proptest::prelude::*;

/// Documentation addresses: a client and the address it connected to.
pub(crate) fn ipv4() -> Addresses {
    addresses("192.0.2.1:56324", "198.51.100.25:25")
}

pub(crate) fn ipv6() -> Addresses {
    addresses("[2001:db8::1]:56324", "[2001:db8:0:1::25]:993")
}

pub(crate) fn addresses(source: &str, destination: &str) -> Addresses {
    Addresses::new(source.parse().unwrap(), destination.parse().unwrap())
}

/// A version 2 header of these last fixed bytes, with a right length field.
pub(crate) fn binary(version_command: u8, family: u8, block: &[u8]) -> Vec<u8> {
    let length = u16::try_from(block.len()).unwrap();
    [&SIGNATURE[..], &[version_command, family], &length.to_be_bytes(), block].concat()
}

/// PROXY over TCP and IPv4 with these bytes behind the addresses, which start at byte 28.
pub(crate) fn tcp4_with(tlvs: &[u8]) -> Vec<u8> {
    binary(0x21, 0x11, &[&[192, 0, 2, 1, 198, 51, 100, 25, 0xdc, 0x04, 0, 25], tlvs].concat())
}

/// A LOCAL header as a load balancer in the field sends it: IPv4 for its family, yet no addresses, a checksum and
/// padding.
pub(crate) fn captured_local() -> Vec<u8> {
    let checksum = [0x03, 0x00, 0x04, 0xbc, 0xe5, 0x95, 0x1f];
    let padding = [&[0x04, 0x00, 0x4a][..], &[0; 0x4a]].concat();
    binary(0x20, 0x11, &[&checksum[..], &padding].concat())
}

/// CRC32C by its definition, bit by bit (RFC 4960, appendix B; the polynomial reflected), to check the crate in use.
pub(crate) fn crc32c_by_bits(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

pub(crate) fn encode_v2(command: &Command, tlvs: &[Tlv<'_>]) -> Vec<u8> {
    let mut out = [0xAA; MAX_LEN];
    let len = v2::encode(command, tlvs, &mut out).unwrap();
    out[..len].to_vec()
}

pub(crate) fn encode_v1(addresses: &Addresses) -> Vec<u8> {
    let mut out = [0xAA; v1::MAX_LEN];
    let len = v1::encode(addresses, &mut out).unwrap();
    out[..len].to_vec()
}

// Strategies are boxed: as one nested type they are large enough to overflow the stack of a test thread.

pub(crate) fn any_addresses() -> BoxedStrategy<Addresses> {
    (any_ip(), any_ip(), any::<u16>(), any::<u16>())
        .prop_map(|(source, destination, from, to)| {
            Addresses::new(SocketAddr::new(source, from), SocketAddr::new(destination, to))
        })
        .boxed()
}

/// Plain, mapped and native, and IPv6 with runs of zeros.
fn any_ip() -> BoxedStrategy<IpAddr> {
    let sparse = proptest::array::uniform8(prop_oneof![Just(0u16), any::<u16>()]);
    prop_oneof![
        3 => any::<Ipv4Addr>().prop_map(IpAddr::from),
        1 => any::<Ipv4Addr>().prop_map(|ip| ip.to_ipv6_mapped().into()),
        2 => any::<Ipv6Addr>().prop_map(IpAddr::from),
        2 => sparse.prop_map(|groups| Ipv6Addr::from(groups).into()),
    ]
    .boxed()
}

pub(crate) fn any_command() -> BoxedStrategy<Command> {
    prop_oneof![1 => Just(Command::Local), 4 => any_addresses().prop_map(Command::Proxy)].boxed()
}

/// A record that owns its value.
#[derive(Clone, Debug)]
pub(crate) enum OwnedTlv {
    Alpn(Vec<u8>),
    Authority(String),
    Crc32c,
    UniqueId(Vec<u8>),
    Noop(u16),
    Custom(u8, Vec<u8>),
}

impl OwnedTlv {
    pub(crate) fn lend(&self) -> Tlv<'_> {
        match self {
            Self::Alpn(value) => Tlv::Alpn(value),
            Self::Authority(value) => Tlv::Authority(value.as_bytes()),
            Self::Crc32c => Tlv::Crc32c,
            Self::UniqueId(value) => Tlv::UniqueId(value),
            Self::Noop(len) => Tlv::Noop(*len),
            Self::Custom(kind, value) => Tlv::Custom { kind: *kind, value },
        }
    }
}

pub(crate) fn lend(tlvs: &[OwnedTlv]) -> Vec<Tlv<'_>> {
    tlvs.iter().map(OwnedTlv::lend).collect()
}

/// Some records, in any order, none twice but padding, and short enough that MAX_LEN holds them all.
pub(crate) fn any_tlvs() -> BoxedStrategy<Vec<OwnedTlv>> {
    use proptest::collection::vec;
    use proptest::option::of;

    let once = (
        of(vec(any::<u8>(), 1..40).prop_map(OwnedTlv::Alpn)),
        of("[a-z0-9.-]{1,60}".prop_map(OwnedTlv::Authority)),
        of(Just(OwnedTlv::Crc32c)),
        of(vec(any::<u8>(), 1..=128).prop_map(OwnedTlv::UniqueId)),
        of((0xE0..=0xE7u8, vec(any::<u8>(), 1..40)).prop_map(|(kind, value)| OwnedTlv::Custom(kind, value))),
        of((0xE8..=0xEFu8, vec(any::<u8>(), 1..40)).prop_map(|(kind, value)| OwnedTlv::Custom(kind, value))),
    );
    (once, vec((0..40u16).prop_map(OwnedTlv::Noop), 0..3))
        .prop_map(|((alpn, authority, checksum, unique_id, custom, other), padding)| {
            let once = [alpn, authority, checksum, unique_id, custom, other];
            once.into_iter().flatten().chain(padding).collect::<Vec<_>>()
        })
        .prop_shuffle()
        .boxed()
}

/// A valid header of either version.
pub(crate) fn any_header() -> BoxedStrategy<Vec<u8>> {
    prop_oneof![
        1 => any_addresses().prop_map(|addresses| encode_v1(&addresses)),
        3 => (any_command(), any_tlvs()).prop_map(|(command, tlvs)| encode_v2(&command, &lend(&tlvs))),
    ]
    .boxed()
}

/// Bytes that come close to a header, or not at all.
pub(crate) fn any_input() -> BoxedStrategy<Vec<u8>> {
    use proptest::collection::vec;
    use proptest::sample::Index;

    let noise = || vec(any::<u8>(), 0..200);
    let bent = (any_header(), vec((any::<Index>(), any::<u8>()), 1..4)).prop_map(|(mut header, changes)| {
        for (at, byte) in changes {
            *at.get_mut(&mut header) = byte;
        }
        header
    });
    let after_signature =
        (0x20..=0x21u8, any::<u8>(), 0..120u16, noise()).prop_map(|(command, family, length, noise)| {
            [&SIGNATURE[..], &[command, family], &length.to_be_bytes(), &noise].concat()
        });
    let line = "PROXY (TCP4|TCP6|UNKNOWN|TCP) ?[0-9a-f.: ]{0,60}\r?\n?".prop_map(String::into_bytes);
    prop_oneof![noise(), bent, after_signature, line].boxed()
}
