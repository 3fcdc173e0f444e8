//! What a packet is, as far as it must be known to drop those of a banned source.

/// What stands behind an IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// TCP, so many bytes behind the start of the IP header. Its ports can be read there.
    Tcp(usize),
    /// A part of TCP whose ports cannot be read. It is judged by its address alone.
    Portless,
    /// An extension header of IPv6 of this kind, so many bytes behind the start of the IP header.
    Extension(u8, usize),
    /// Anything else, which no ban concerns.
    Other,
}

/// `IPPROTO_TCP`.
pub const TCP: u8 = 6;
/// The length of an IPv4 header without options.
pub const IPV4_LEN: usize = 20;
/// The length of an IPv6 header.
pub const IPV6_LEN: usize = 40;
/// How many extension headers are read. Senders of mail have none; of many more, the verifier follows too many ways without
/// CAP_PERFMON.
pub const MAX_EXTENSIONS: u32 = 4;

/// The fragment header (RFC 8200, section 4.5).
const FRAGMENT: u8 = 44;
/// The authentication header (RFC 4302), whose length is counted in other units.
const AUTHENTICATION: u8 = 51;
/// Hop-by-hop options, routing, destination options (RFC 8200, section 4), mobility (RFC 6275), HIP (RFC 7401) and shim6 (RFC 5533).
const OPTIONS: [u8; 6] = [0, 43, 60, 135, 139, 140];

/// Reads an IPv4 header: its first byte, the field with flags and fragment offset, and the protocol (RFC 791, section 3.1).
#[must_use]
#[inline(always)]
pub const fn ipv4(first: u8, fragment: u16, protocol: u8) -> Content {
    const OFFSET: u16 = 0x1FFF;
    let len = (first & 0x0F) as usize * 4;
    if protocol != TCP {
        Content::Other
    } else if fragment & OFFSET != 0 || len < IPV4_LEN {
        Content::Portless
    } else {
        Content::Tcp(len)
    }
}

/// Reads the next header of an IPv6 header.
#[must_use]
#[inline(always)]
pub fn ipv6(next: u8) -> Content {
    after_header(next, IPV6_LEN)
}

/// Reads the first four bytes of an extension header of this kind at this place.
#[must_use]
#[inline(always)]
pub fn extension(kind: u8, at: usize, header: [u8; 4]) -> Content {
    let [next, len, offset @ ..] = header;
    match kind {
        FRAGMENT if u16::from_be_bytes(offset) & !7 != 0 => match after_header(next, at) {
            // What is not the first fragment has no header behind it.
            Content::Tcp(_) | Content::Extension(..) => Content::Portless,
            other => other,
        },
        FRAGMENT => after_header(next, at + 8),
        AUTHENTICATION => after_header(next, at + (len as usize + 2) * 4),
        _ => after_header(next, at + (len as usize + 1) * 8),
    }
}

#[inline(always)]
fn after_header(next: u8, at: usize) -> Content {
    if next == TCP {
        Content::Tcp(at)
    } else if next == FRAGMENT || next == AUTHENTICATION || OPTIONS.contains(&next) {
        Content::Extension(next, at)
    } else {
        Content::Other
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    extern crate std;

    #[test]
    fn ipv4_is_tcp_with_ports_a_part_of_it_or_nothing_to_ban() {
        for (first, fragment, protocol, expected) in [
            (0x45, 0x4000, TCP, Content::Tcp(20)),
            (0x4F, 0, TCP, Content::Tcp(60)),
            // The first fragment has the ports.
            (0x45, 0x2000, TCP, Content::Tcp(20)),
            (0x45, 0x2001, TCP, Content::Portless),
            (0x45, 0x0001, TCP, Content::Portless),
            (0x44, 0, TCP, Content::Portless),
            (0x45, 0, 17, Content::Other),
            (0x45, 1, 17, Content::Other),
        ] {
            assert_eq!(ipv4(first, fragment, protocol), expected, "{first:x} {fragment:x} {protocol}");
        }
    }

    #[test]
    fn tcp_is_found_behind_extension_headers() {
        assert_eq!(ipv6(TCP), Content::Tcp(40));
        assert_eq!(ipv6(17), Content::Other);
        assert_eq!(ipv6(0), Content::Extension(0, 40));
        assert_eq!(extension(0, 40, [TCP, 0, 0, 0]), Content::Tcp(48));
        assert_eq!(extension(60, 40, [FRAGMENT, 2, 0, 0]), Content::Extension(FRAGMENT, 64));
        assert_eq!(extension(51, 40, [TCP, 4, 0, 0]), Content::Tcp(64));
        // The first fragment, with the flag that more follow, and a later one.
        assert_eq!(extension(FRAGMENT, 40, [TCP, 9, 0, 1]), Content::Tcp(48));
        assert_eq!(extension(FRAGMENT, 40, [TCP, 0, 0, 8]), Content::Portless);
        assert_eq!(extension(FRAGMENT, 40, [60, 0, 0, 8]), Content::Portless);
        assert_eq!(extension(FRAGMENT, 40, [17, 0, 0, 8]), Content::Other);
    }

    /// An extension header of a chain: its kind, its bytes, and which next header it names at its start.
    fn header(kind: u8, len: u8, next: u8) -> Vec<u8> {
        let (len, size) = match kind {
            // RFC 8200, section 4.5: always eight bytes, here of the first fragment.
            44 => (0, 8),
            // RFC 4302, section 2.2: in units of four bytes, less two.
            51 => (len.max(1), (usize::from(len.max(1)) + 2) * 4),
            _ => (len, (usize::from(len) + 1) * 8),
        };
        // Options may look like anything; in a fragment header they are its offset.
        let mut header = std::vec![if kind == 44 { 0 } else { 0xA5 }; size];
        header[..2].copy_from_slice(&[next, len]);
        header
    }

    proptest! {
        /// The kinds are those of the registry "IPv6 Extension Header Types", without ESP (50), which hides what is behind it, and
        /// those for experiments.
        #[test]
        fn a_kind_is_tcp_an_extension_header_or_nothing_to_ban(kind: u8) {
            let expected = match kind {
                6 => Content::Tcp(40),
                0 | 43 | 44 | 51 | 60 | 135 | 139 | 140 => Content::Extension(kind, 40),
                _ => Content::Other,
            };
            prop_assert_eq!(ipv6(kind), expected);
        }

        #[test]
        fn tcp_is_found_behind_any_chain(
            chain in prop::collection::vec((prop::sample::select(&[0, 43, 44, 51, 60, 135, 139, 140][..]), 0..6_u8), 0..5),
        ) {
            let kinds: Vec<u8> = chain.iter().map(|(kind, _)| *kind).chain([6]).collect();
            let mut packet = std::vec![0; 40];
            for ((kind, len), next) in chain.iter().zip(&kinds[1..]) {
                packet.extend(header(*kind, *len, *next));
            }
            let mut content = ipv6(kinds[0]);
            while let Content::Extension(kind, at) = content {
                content = extension(kind, at, packet[at..at + 4].try_into().unwrap());
            }
            prop_assert_eq!(content, Content::Tcp(packet.len()));
        }
        /// So that a walk along the headers comes to an end.
        #[test]
        fn each_header_leads_further(kind: u8, at in 40_usize..4096, header: [u8; 4]) {
            if let Content::Tcp(next) | Content::Extension(_, next) = extension(kind, at, header) {
                prop_assert!(next >= at + 8);
            }
        }
    }
}
