//! The same headers through two independent implementations, `ppp` and `proxy-header`.
//!
//! Where they differ from this crate, [`where_the_oracles_differ`] pins down how, so that a new version of either
//! which changes its mind is noticed.

use std::borrow::Cow;
use std::net::SocketAddr;

use injector_common::proxy::ParseError as E;
use injector_common::proxy::{Addresses, Announced, Command, ParseError, RawTlv, kind, parse};
use ppp::{HeaderResult, v1 as ppp1, v2 as ppp2};
use proptest::prelude::*;
use proxy_header::{ParseConfig, ProxiedAddress, ProxyHeader, Tlv as TheirTlv};

use crate::samples::{
    OwnedTlv, any_addresses, any_command, any_tlvs, binary, captured_local, encode_v1, encode_v2, ipv4, lend,
    tcp4_with,
};

proptest! {
    #[test]
    fn they_read_our_binary_headers(command in any_command(), tlvs in any_tlvs()) {
        let header = encode_v2(&command, &lend(&tlvs));
        let ours: Vec<RawTlv<'_>> = parse(&header).unwrap().tlvs.collect::<Result<_, _>>().unwrap();

        let theirs = ppp2::Header::try_from(&header[..]).unwrap();
        prop_assert_eq!(theirs.len(), header.len());
        prop_assert_eq!(theirs.addresses, ppp_addresses(&command));
        if let Command::Proxy(_) = command {
            prop_assert_eq!(theirs.protocol, ppp2::Protocol::Stream);
            let theirs: Vec<_> = theirs.tlvs().collect::<Result<_, _>>().unwrap();
            let theirs: Vec<_> = theirs.iter().map(|tlv| (tlv.kind, &tlv.value[..])).collect();
            prop_assert_eq!(theirs, kinds_and_values(&ours));
        } else {
            // ppp counts the whole block of a header without family as its addresses, and so sees no TLVs there.
            prop_assert_eq!(theirs.tlvs().count(), 0);
        }

        let (theirs, len) = ProxyHeader::parse(&header, ParseConfig::default()).unwrap();
        prop_assert_eq!(len, header.len());
        prop_assert_eq!(theirs.proxied_address().cloned(), proxied_address(&command));
        let theirs: Vec<_> = theirs.tlvs().collect::<Result<_, _>>().unwrap();
        let expected: Vec<_> = ours.iter().map(|tlv| TheirTlv::decode(tlv.kind, tlv.value).unwrap()).collect();
        prop_assert_eq!(&theirs, &expected);
        // Typed, they are what was asked for.
        for (theirs, sent) in theirs.iter().zip(&tlvs) {
            if !matches!(sent, OwnedTlv::Crc32c) {
                prop_assert_eq!(theirs, &their_tlv(sent));
            }
        }
    }

    #[test]
    fn they_read_our_lines(addresses in any_addresses()) {
        let line = encode_v1(&addresses);

        let theirs = ppp1::Header::try_from(&line[..]).unwrap();
        prop_assert_eq!(theirs.addresses, (addresses.source(), addresses.destination()).into());
        prop_assert_eq!(theirs.header.len(), line.len());

        let (theirs, len) = ProxyHeader::parse(&line, ParseConfig::default()).unwrap();
        prop_assert_eq!(theirs.proxied_address().cloned(), proxied_address(&Command::Proxy(addresses)));
        prop_assert_eq!(len, line.len());
    }

    #[test]
    fn we_read_headers_of_ppp(addresses in any_addresses(), tlvs in any_tlvs()) {
        let mut builder = ppp2::Builder::with_addresses(
            ppp2::Version::Two | ppp2::Command::Proxy,
            ppp2::Protocol::Stream,
            (addresses.source(), addresses.destination()),
        );
        // ppp leaves the checksum to the caller.
        let sent: Vec<_> = tlvs.iter().filter(|tlv| !matches!(tlv, OwnedTlv::Crc32c)).map(kind_and_value).collect();
        for (kind, value) in &sent {
            builder = builder.write_tlv(*kind, value).unwrap();
        }
        let header = builder.build().unwrap();

        let parsed = parse(&header).unwrap();
        prop_assert_eq!((parsed.command, parsed.len), (Announced::Proxy(addresses), header.len()));
        let read: Vec<_> = parsed.tlvs.collect::<Result<_, _>>().unwrap();
        let sent: Vec<_> = sent.iter().map(|(kind, value)| (*kind, &value[..])).collect();
        prop_assert_eq!(kinds_and_values(&read), sent);
    }

    #[test]
    fn we_read_headers_of_proxy_header(command in any_command(), tlvs in any_tlvs()) {
        let theirs = tlvs.iter().filter(|tlv| !matches!(tlv, OwnedTlv::Crc32c)).map(their_tlv);
        let mut header = Vec::new();
        ProxyHeader::with_tlvs(proxied_address(&command), theirs.clone()).encode_v2(&mut header).unwrap();

        let parsed = parse(&header).unwrap();
        prop_assert_eq!((parsed.command.addresses(), parsed.len), (command_addresses(&command), header.len()));
        let read: Vec<_> = parsed.tlvs.collect::<Result<_, _>>().unwrap();
        let read: Vec<_> = read.iter().map(|tlv| TheirTlv::decode(tlv.kind, tlv.value).unwrap()).collect();
        prop_assert_eq!(read, theirs.collect::<Vec<_>>());
    }

    /// proxy-header writes whatever checksum it is given: ours must find it wrong, and right once put right.
    #[test]
    fn we_verify_the_checksum_that_proxy_header_leaves_to_its_caller(addresses in any_addresses(), wrong: u32) {
        let encode = |checksum| {
            let tlvs = [TheirTlv::UniqueId(Cow::Borrowed(b"id")), TheirTlv::Crc32c(checksum)];
            let mut header = Vec::new();
            let address = proxied_address(&Command::Proxy(addresses));
            ProxyHeader::with_tlvs(address, tlvs).encode_v2(&mut header).unwrap();
            header
        };
        let Err(ParseError::Checksum { sent, computed }) = parse(&encode(wrong)).map(|_| ()) else {
            return Err(TestCaseError::reject("the checksum was right by chance"));
        };
        prop_assert_eq!(sent, wrong);
        let right = encode(computed);
        prop_assert!(parse(&right).unwrap().is_checksummed());
    }

    #[test]
    fn we_read_their_lines(addresses in any_addresses()) {
        let ppp = ppp1::Addresses::from((addresses.source(), addresses.destination())).to_string().into_bytes();
        let mut proxy_header = Vec::new();
        let address = proxied_address(&Command::Proxy(addresses)).unwrap();
        ProxyHeader::with_address(address).encode_v1(&mut proxy_header).unwrap();

        for line in [ppp, proxy_header] {
            // Both write a mapped address among IPv6 with a dotted tail, which the specification's notation has not.
            if addresses.source().is_ipv6() && line.contains(&b'.') {
                let refused = matches!(parse(&line), Err(E::Address { .. }));
                prop_assert!(refused);
            } else {
                prop_assert_eq!(parse(&line).unwrap().command, Announced::Proxy(addresses));
            }
        }
    }
}

#[test]
fn where_the_oracles_differ() {
    let long_line = format!("PROXY UNKNOWN {}\r\n", "x".repeat(200)).into_bytes();
    let mut wrong_checksum = encode_v2(&Command::Proxy(ipv4()), &lend(&[OwnedTlv::Crc32c]));
    wrong_checksum[16] ^= 1;

    // The input, whether ppp and proxy-header take it (its TLVs included), and whether this crate does.
    let cases: Vec<(&str, Vec<u8>, bool, bool, bool)> = vec![
        // Text. Neither knows every rule of section 2.1.
        ("port with a sign", b"PROXY TCP4 1.2.3.4 5.6.7.8 +1 2\r\n".to_vec(), true, true, false),
        ("port with a leading zero", b"PROXY TCP4 1.2.3.4 5.6.7.8 01 2\r\n".to_vec(), false, true, false),
        ("dotted tail", b"PROXY TCP6 ::ffff:1.2.3.4 ::1 1 2\r\n".to_vec(), true, true, false),
        ("no space behind PROXY", b"PROXY_TCP4 1.2.3.4 5.6.7.8 1 2\r\n".to_vec(), false, true, false),
        ("a longer word than UNKNOWN", b"PROXY UNKNOWNS\r\n".to_vec(), false, true, false),
        ("more than 107 bytes", long_line, false, true, false),
        // Binary. Neither verifies a checksum or counts types.
        ("wrong checksum", wrong_checksum, true, true, false),
        ("the same type twice", tcp4_with(b"\xe0\x00\x01a\xe0\x00\x01b"), true, true, false),
        ("no value", tcp4_with(b"\x05\x00\x00"), true, true, false),
        ("UNIQUE_ID of 129", tcp4_with(&[&b"\x05\x00\x81"[..], &[1; 129]].concat()), true, true, false),
        ("checksum of three bytes", tcp4_with(b"\x03\x00\x03abc"), true, false, false),
        ("IPv4 without transport", binary(0x21, 0x10, &[0; 12]), true, false, false),
        // Valid, though not what a TCP proxy sends: this crate says precisely that.
        ("UDP", binary(0x21, 0x12, &[0; 12]), true, true, false),
        ("UNIX", binary(0x21, 0x31, &[0; 216]), true, true, false),
        // Wrongly refused by both: the family of LOCAL is to be ignored (section 2.2), not to be served with addresses.
        ("LOCAL under IPv4, empty", binary(0x20, 0x11, &[]), false, false, true),
        ("LOCAL under no family there is", binary(0x20, 0xFF, &[]), false, false, true),
        // proxy-header takes for TLVs what the specification says to ignore; ppp does not.
        ("UNSPEC with a block", binary(0x21, 0x00, b"anything"), true, false, true),
        // proxy-header knows authorities in UTF-8 only; here they are bytes, for the receiver to judge.
        ("AUTHORITY in Latin-1", tcp4_with(b"\x02\x00\x01\xfc"), true, false, true),
    ];
    for (name, input, ppp, proxy_header, ours) in cases {
        assert_eq!(ppp_takes(&input), ppp, "ppp, {name}");
        assert_eq!(proxy_header_takes(&input), proxy_header, "proxy-header, {name}");
        assert_eq!(parse(&input).is_ok(), ours, "this crate, {name}: {:?}", parse(&input));
    }
}

/// For the same reason both take the checksum of the captured header for part of an address, and never see it.
#[test]
fn the_oracles_misread_the_captured_header() {
    let header = captured_local();
    assert!(parse(&header).unwrap().is_checksummed());

    let theirs = ppp2::Header::try_from(&header[..]).unwrap();
    assert!(theirs.tlvs().all(|tlv| tlv.unwrap().kind == 0), "the padding's zeros");

    let (theirs, _) = ProxyHeader::parse(&header, ParseConfig::default()).unwrap();
    assert_eq!(theirs.crc32c(), None);
    assert_eq!(theirs.tlvs().count(), 24, "the padding's zeros, three for each");
}

fn ppp_takes(input: &[u8]) -> bool {
    match HeaderResult::parse(input) {
        HeaderResult::V1(header) => header.is_ok(),
        HeaderResult::V2(header) => header.is_ok_and(|header| header.tlvs().all(|tlv| tlv.is_ok())),
    }
}

fn proxy_header_takes(input: &[u8]) -> bool {
    ProxyHeader::parse(input, ParseConfig::default())
        .is_ok_and(|(header, _)| header.tlvs().all(|tlv| tlv.is_ok()))
}

fn command_addresses(command: &Command) -> Option<Addresses> {
    match command {
        Command::Local => None,
        Command::Proxy(addresses) => Some(*addresses),
    }
}

fn both_ends(command: &Command) -> Option<(SocketAddr, SocketAddr)> {
    command_addresses(command).map(|addresses| (addresses.source(), addresses.destination()))
}

fn ppp_addresses(command: &Command) -> ppp2::Addresses {
    both_ends(command).map_or(ppp2::Addresses::Unspecified, ppp2::Addresses::from)
}

fn proxied_address(command: &Command) -> Option<ProxiedAddress> {
    both_ends(command).map(|(source, destination)| ProxiedAddress::stream(source, destination))
}

fn kinds_and_values<'a>(tlvs: &[RawTlv<'a>]) -> Vec<(u8, &'a [u8])> {
    tlvs.iter().map(|tlv| (tlv.kind, tlv.value)).collect()
}

fn kind_and_value(tlv: &OwnedTlv) -> (u8, Vec<u8>) {
    match tlv {
        OwnedTlv::Alpn(value) => (kind::ALPN, value.clone()),
        OwnedTlv::Authority(name) => (kind::AUTHORITY, name.clone().into_bytes()),
        OwnedTlv::Crc32c => (kind::CRC32C, vec![0; 4]),
        OwnedTlv::UniqueId(value) => (kind::UNIQUE_ID, value.clone()),
        OwnedTlv::Noop(len) => (kind::NOOP, vec![0; usize::from(*len)]),
        OwnedTlv::Custom(kind, value) => (*kind, value.clone()),
    }
}

fn their_tlv(tlv: &OwnedTlv) -> TheirTlv<'static> {
    let (kind, value) = kind_and_value(tlv);
    TheirTlv::decode(kind, &value).unwrap().into_owned()
}
