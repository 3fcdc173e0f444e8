//! What the parser makes of given bytes.

use std::path::Path;

use injector_common::proxy::ParseError as E;
use injector_common::proxy::{Announced, Command, RawTlv, SIGNATURE, Tlv, Version, kind, parse};

use crate::samples::{addresses, binary, captured_local, crc32c_by_bits, encode_v2, ipv4, ipv6, tcp4_with};

#[test]
fn a_header_ends_where_the_payload_starts() {
    for header in [encode_v2(&Command::Proxy(ipv6()), &[Tlv::Crc32c]), b"PROXY UNKNOWN\r\n".to_vec()] {
        let alone = parse(&header).unwrap();
        assert_eq!(alone.len, header.len());

        let with_payload = [&header[..], b"EHLO client.example\r\n"].concat();
        assert_eq!(parse(&with_payload), Ok(alone));
    }
}

#[test]
fn commands_of_binary_headers() {
    let mapped_block =
        [&[0; 10][..], &[255, 255, 192, 0, 2, 1], &[0; 10], &[255, 255, 192, 0, 2, 2], &[0, 1, 0, 2]];
    let cases: [(&str, Vec<u8>, Announced); 8] = [
        ("IPv4", tcp4_with(&[]), Announced::Proxy(ipv4())),
        (
            "mapped on the wire",
            binary(0x21, 0x21, &mapped_block.concat()),
            Announced::Proxy(addresses("192.0.2.1:1", "192.0.2.2:2")),
        ),
        ("LOCAL", binary(0x20, 0x00, &[]), Announced::Local),
        ("LOCAL under a family, without addresses", binary(0x20, 0x21, &[]), Announced::Local),
        (
            "LOCAL with addresses",
            binary(0x20, 0x11, &[192, 0, 2, 1, 192, 0, 2, 2, 0, 1, 0, 2]),
            Announced::Local,
        ),
        ("LOCAL under a family that does not exist", binary(0x20, 0xFF, b"anything"), Announced::Local),
        ("UNSPEC", binary(0x21, 0x00, &[]), Announced::Unknown),
        ("UNSPEC with a block", binary(0x21, 0x00, b"anything"), Announced::Unknown),
    ];
    for (name, header, command) in cases {
        let parsed = parse(&header).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(
            (parsed.version, parsed.command, parsed.len),
            (Version::Two, command, header.len()),
            "{name}"
        );
        assert_eq!(parsed.tlvs.count(), 0, "{name}");
    }
}

#[test]
fn records_come_in_order_with_their_places() {
    let header = tcp4_with(b"\x02\x00\x02mx\x04\x00\x00\xee\x00\x01!\x04\x00\x01\x00\x20\x00\x01s");
    let parsed = parse(&header).unwrap();

    let tlvs: Result<Vec<_>, _> = parsed.tlvs.clone().collect();
    let raw = |kind, offset, value| RawTlv { kind, offset, value };
    let expected: [RawTlv<'_>; 5] = [
        raw(kind::AUTHORITY, 28, b"mx"),
        raw(kind::NOOP, 33, b""),
        raw(0xEE, 36, b"!"),
        raw(kind::NOOP, 40, b"\0"),
        raw(kind::SSL, 44, b"s"),
    ];
    assert_eq!(tlvs.unwrap(), expected);
    assert_eq!(parsed.tlv(kind::AUTHORITY), Some(&b"mx"[..]));
    assert_eq!(parsed.tlv(kind::UNIQUE_ID), None);
    assert!(!parsed.is_checksummed());
}

#[test]
fn the_captured_header_passes_its_checksum() {
    let header = captured_local();
    assert_eq!(header.len(), 100);

    let parsed = parse(&header).unwrap();
    assert_eq!(parsed.command, Announced::Local);
    assert_eq!(parsed.tlv(kind::CRC32C), Some(&[0xbc, 0xe5, 0x95, 0x1f][..]));
    assert_eq!(parsed.tlv(kind::NOOP).map(<[u8]>::len), Some(74));

    let mut bent = header;
    bent[99] = 1;
    let computed = crc32c_by_bits(&[&bent[..19], &[0; 4], &bent[23..]].concat());
    assert_eq!(parse(&bent), Err(E::Checksum { sent: 0xbce5_951f, computed }));
}

#[test]
fn binary_headers_that_are_refused() {
    let with = |at: usize, byte: u8| {
        let mut header = tcp4_with(&[]);
        header[at] = byte;
        header
    };
    let mut checksummed = encode_v2(&Command::Proxy(ipv4()), &[Tlv::Crc32c]);
    let sent = u32::from_be_bytes(checksummed[31..35].try_into().unwrap());
    checksummed[27] ^= 1;
    let computed = crc32c_by_bits(&[&checksummed[..31], &[0; 4]].concat());

    let cases: Vec<(Vec<u8>, E)> = vec![
        (with(0, b'\n'), E::NotProxy),
        (with(11, b'\r'), E::NotProxy),
        (with(12, 0x11), E::Version { found: 1 }),
        (with(12, 0x31), E::Version { found: 3 }),
        (with(12, 0x22), E::Command { found: 2 }),
        (with(12, 0x2F), E::Command { found: 15 }),
        // A family without its transport and the reverse are none of the seven listed.
        (with(13, 0x01), E::Family { found: 0x01 }),
        (with(13, 0x10), E::Family { found: 0x10 }),
        (with(13, 0x13), E::Family { found: 0x13 }),
        (with(13, 0x41), E::Family { found: 0x41 }),
        (with(13, 0x12), E::NotTcp { found: 0x12 }),
        (with(13, 0x22), E::NotTcp { found: 0x22 }),
        (with(13, 0x31), E::NotTcp { found: 0x31 }),
        (with(13, 0x32), E::NotTcp { found: 0x32 }),
        (with(15, 11), E::AddressBlock { length: 11, needed: 12 }),
        (with(13, 0x21), E::AddressBlock { length: 12, needed: 36 }),
        (tcp4_with(b"\x04"), E::TlvTruncated { offset: 28, available: 1 }),
        (tcp4_with(b"\x04\x00"), E::TlvTruncated { offset: 28, available: 2 }),
        (tcp4_with(b"\x04\x00\x00\xe0\x00\x02a"), E::TlvTruncated { offset: 31, available: 4 }),
        (tcp4_with(b"\x04\xff\xff"), E::TlvTruncated { offset: 28, available: 3 }),
        (tcp4_with(b"\x02\x00\x00"), E::TlvEmpty { kind: 0x02, offset: 28 }),
        (tcp4_with(b"\x03\x00\x03abc"), E::TlvLength { kind: 0x03, offset: 28, len: 3 }),
        (
            tcp4_with(&[&b"\x05\x00\x81"[..], &[1; 129]].concat()),
            E::TlvLength { kind: 0x05, offset: 28, len: 129 },
        ),
        (tcp4_with(b"\xe0\x00\x01a\xe0\x00\x01a"), E::TlvDuplicate { kind: 0xe0, offset: 32 }),
        (tcp4_with(b"\xff\x00\x01a\x7f\x00\x01a\xff\x00\x01b"), E::TlvDuplicate { kind: 0xff, offset: 36 }),
        (checksummed, E::Checksum { sent, computed }),
    ];
    for (input, error) in cases {
        assert_eq!(parse(&input), Err(error), "{input:02x?}");
        assert!(!error.to_string().is_empty());
    }
}

#[test]
fn refused_before_the_whole_header_has_come() {
    // Length 512, sixteen bytes there: what the fixed bytes give away need not be waited for.
    let fixed = |version_command, family| [&SIGNATURE[..], &[version_command, family, 2, 0]].concat();
    let cases = [
        (fixed(0x21, 0x11), E::Incomplete { needed: 528 }),
        (fixed(0x20, 0xFF), E::Incomplete { needed: 528 }),
        (fixed(0x21, 0x12), E::NotTcp { found: 0x12 }),
        (fixed(0x21, 0x40), E::Family { found: 0x40 }),
        (fixed(0x10, 0x11), E::Version { found: 1 }),
    ];
    for (input, error) in cases {
        assert_eq!(parse(&input), Err(error), "{input:02x?}");
    }
}

#[test]
fn incomplete_inputs_say_what_they_need() {
    let cases: [(&[u8], usize); 10] = [
        (b"", 15),
        (b"\r", 16),
        (&SIGNATURE, 16),
        (b"P", 15),
        (b"PROXY", 15),
        (b"PROXY ", 15),
        (b"PROXY UNKNOWN", 15),
        (b"PROXY UNKNOWN\r", 15),
        (b"PROXY TCP4 1.2.3.4 5", 22),
        (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r", 32),
    ];
    for (input, needed) in cases {
        assert_eq!(parse(input), Err(E::Incomplete { needed }), "{input:?}");
    }
}

#[test]
fn lines_that_are_read() {
    let worst = format!("PROXY UNKNOWN {0} {0} 65535 65535\r\n", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff");
    assert_eq!(worst.len(), 107);
    let proxy = |source, destination| Announced::Proxy(addresses(source, destination));
    let cases: [(&str, Announced); 10] = [
        ("PROXY TCP4 192.0.2.1 198.51.100.25 56324 25\r\n", Announced::Proxy(ipv4())),
        ("PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n", proxy("0.0.0.0:0", "255.255.255.255:65535")),
        ("PROXY TCP6 2001:db8::1 2001:db8:0:1::25 56324 993\r\n", Announced::Proxy(ipv6())),
        ("PROXY TCP6 2001:0DB8:0:0:0:0:0:0001 2001:db8:0:1::25 56324 993\r\n", Announced::Proxy(ipv6())),
        ("PROXY TCP6 :: ::1 1 2\r\n", proxy("[::]:1", "[::1]:2")),
        ("PROXY TCP6 ::ffff:c000:201 ::ffff:c000:202 1 2\r\n", proxy("192.0.2.1:1", "192.0.2.2:2")),
        ("PROXY UNKNOWN\r\n", Announced::Unknown),
        ("PROXY UNKNOWN \r\n", Announced::Unknown),
        ("PROXY UNKNOWN  whatever \0\u{fc}\r\n", Announced::Unknown),
        (&worst, Announced::Unknown),
    ];
    for (line, command) in cases {
        let parsed = parse(line.as_bytes()).unwrap_or_else(|error| panic!("{line:?}: {error}"));
        assert_eq!(
            (parsed.version, parsed.command, parsed.len),
            (Version::One, command, line.len()),
            "{line:?}"
        );
        assert_eq!(parsed.tlvs.count(), 0, "{line:?}");
    }
}

#[test]
fn lines_that_are_refused() {
    let ends_too_late = format!("PROXY UNKNOWN {}\r\n", "x".repeat(92));
    assert_eq!(ends_too_late.len(), 108);
    let never_ends = "PROXY ".to_owned() + &"x".repeat(100);
    let cases: Vec<(&str, E)> = vec![
        ("PROXX TCP4", E::NotProxy),
        ("proxy TCP4", E::NotProxy),
        ("PROXY\tTCP4", E::NotProxy),
        ("PROXY\r\n", E::NotProxy),
        ("HELO", E::NotProxy),
        ("PROXY \r\n", E::Protocol { offset: 6 }),
        ("PROXY  TCP4 192.0.2.1 192.0.2.2 1 2\r\n", E::Protocol { offset: 6 }),
        ("PROXY TCP5 192.0.2.1 192.0.2.2 1 2\r\n", E::Protocol { offset: 6 }),
        ("PROXY tcp4 192.0.2.1 192.0.2.2 1 2\r\n", E::Protocol { offset: 6 }),
        ("PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n", E::Protocol { offset: 6 }),
        ("PROXY UNKNOWNS\r\n", E::Protocol { offset: 6 }),
        ("PROXY TCP4\t192.0.2.1 192.0.2.2 1 2\r\n", E::Protocol { offset: 6 }),
        ("PROXY TCP4\r\n", E::MissingField { offset: 10 }),
        ("PROXY TCP4 \r\n", E::Address { offset: 11 }),
        ("PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n", E::Address { offset: 11 }),
        ("PROXY TCP4 192.0.2.01 192.0.2.2 1 2\r\n", E::Address { offset: 11 }),
        ("PROXY TCP4 192.0.2.256 192.0.2.2 1 2\r\n", E::Address { offset: 11 }),
        ("PROXY TCP4 192.0.2 192.0.2.2 1 2\r\n", E::Address { offset: 11 }),
        ("PROXY TCP4 0xc0.0.2.1 192.0.2.2 1 2\r\n", E::Address { offset: 11 }),
        ("PROXY TCP4 mx.example 192.0.2.2 1 2\r\n", E::Address { offset: 11 }),
        ("PROXY TCP4 ::1 ::2 1 2\r\n", E::Address { offset: 11 }),
        ("PROXY TCP4 192.0.2.1 ::2 1 2\r\n", E::Address { offset: 21 }),
        ("PROXY TCP4 192.0.2.1 1.\u{e9}.3.4 1 2\r\n", E::Address { offset: 21 }),
        ("PROXY TCP4 192.0.2.1\r\n", E::MissingField { offset: 20 }),
        ("PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n", E::Address { offset: 11 }),
        ("PROXY TCP6 ::1 ::ffff:192.0.2.1 1 2\r\n", E::Address { offset: 15 }),
        ("PROXY TCP6 fe80::1%eth0 ::2 1 2\r\n", E::Address { offset: 11 }),
        ("PROXY TCP6 [::1] ::2 1 2\r\n", E::Address { offset: 11 }),
        ("PROXY TCP6 1::2::3 ::2 1 2\r\n", E::Address { offset: 11 }),
        ("PROXY TCP6 1:2:3:4:5:6:7 ::2 1 2\r\n", E::Address { offset: 11 }),
        ("PROXY TCP6 00001:: ::2 1 2\r\n", E::Address { offset: 11 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2\r\n", E::MissingField { offset: 30 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n", E::MissingField { offset: 32 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2  1 2\r\n", E::Port { offset: 31 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n", E::Port { offset: 31 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2 00 2\r\n", E::Port { offset: 31 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2 +1 2\r\n", E::Port { offset: 31 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2 -1 2\r\n", E::Port { offset: 31 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2 65536 2\r\n", E::Port { offset: 31 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2 1 smtp\r\n", E::Port { offset: 33 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2 1 \r\n", E::Port { offset: 33 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n", E::ExtraField { offset: 35 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n", E::ExtraField { offset: 35 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n", E::LineEnding { offset: 34 }),
        ("PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\r\n", E::LineEnding { offset: 34 }),
        ("PROXY TCP4\r192.0.2.1 192.0.2.2 1 2\r\n", E::LineEnding { offset: 10 }),
        ("PROXY UNKNOWN a\nb\r\n", E::LineEnding { offset: 15 }),
        (&ends_too_late, E::LineTooLong),
        (&never_ends, E::LineTooLong),
    ];
    for (line, error) in cases {
        assert_eq!(parse(line.as_bytes()), Err(error), "{line:?}");
        assert!(!error.to_string().is_empty());
    }
    let incomplete = E::Incomplete { needed: 107 };
    assert_eq!(parse(&never_ends.as_bytes()[..105]), Err(incomplete), "CRLF may still come in time");
}

/// The fuzzer starts from these: a seed that is no header would start it nowhere.
#[test]
fn every_fuzz_seed_parses_whole() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/parse");
    let mut names = Vec::new();
    for entry in seeds.read_dir().unwrap() {
        let path = entry.unwrap().path();
        let seed = std::fs::read(&path).unwrap();
        let parsed = parse(&seed).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(parsed.len <= seed.len());
        names.push(path);
    }
    assert!(names.len() >= 8, "{names:?}");
}
