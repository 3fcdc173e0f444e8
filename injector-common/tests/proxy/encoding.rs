//! Headers byte for byte, and those that are not made.

use injector_common::proxy::{Addresses, Command, EncodeError, MAX_LEN, SAFE_LEN, Tlv, v1, v2};

use crate::samples::{addresses, binary, crc32c_by_bits, encode_v1, encode_v2, ipv4, ipv6, tcp4_with};

#[test]
fn binary_headers_byte_for_byte() {
    #[rustfmt::skip]
    let ipv6_block = [
        0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x01,
        0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0x01, 0, 0, 0, 0, 0, 0, 0, 0x25,
        0xdc, 0x04, 0x03, 0xe1,
    ];
    let mapped = addresses("[::ffff:192.0.2.1]:56324", "[::ffff:198.51.100.25]:25");
    let cases: [(&str, Command, usize, Vec<u8>); 4] = [
        ("IPv4", Command::Proxy(ipv4()), 28, tcp4_with(&[])),
        ("mapped", Command::Proxy(mapped), 28, tcp4_with(&[])),
        ("IPv6", Command::Proxy(ipv6()), 52, binary(0x21, 0x21, &ipv6_block)),
        ("LOCAL", Command::Local, 16, binary(0x20, 0x00, &[])),
    ];
    for (name, command, len, expected) in cases {
        assert_eq!(encode_v2(&command, &[]), expected, "{name}");
        assert_eq!(expected.len(), len, "{name}");
        assert_eq!(v2::encoded_len(&command, &[]), Ok(len), "{name}");
    }
}

#[test]
fn records_byte_for_byte() {
    let cases: [(Tlv<'_>, &[u8]); 6] = [
        (Tlv::Alpn(b"imap"), b"\x01\x00\x04imap"),
        (Tlv::Authority(b"mx.example"), b"\x02\x00\x0amx.example"),
        (Tlv::UniqueId(&[7; 3]), b"\x05\x00\x03\x07\x07\x07"),
        (Tlv::Noop(0), b"\x04\x00\x00"),
        (Tlv::Noop(2), b"\x04\x00\x02\x00\x00"),
        (Tlv::Custom { kind: 0xEF, value: b"\xff" }, b"\xef\x00\x01\xff"),
    ];
    for (tlv, wire) in cases {
        assert_eq!(encode_v2(&Command::Proxy(ipv4()), &[tlv]), tcp4_with(wire), "{tlv:?}");
        assert_eq!(v2::encoded_len(&Command::Proxy(ipv4()), &[tlv]), Ok(28 + wire.len()), "{tlv:?}");
    }
    let all: Vec<_> = cases.iter().map(|(tlv, _)| *tlv).collect();
    let wire: Vec<_> = cases.iter().flat_map(|(_, wire)| wire.to_vec()).collect();
    assert_eq!(encode_v2(&Command::Proxy(ipv4()), &all), tcp4_with(&wire), "in the order given");
}

#[test]
fn the_checksum_covers_the_header_wherever_it_stands() {
    let others = [Tlv::Authority(b"mx.example"), Tlv::Noop(5)];
    for at in 0..=others.len() {
        let mut tlvs = others.to_vec();
        tlvs.insert(at, Tlv::Crc32c);
        let mut header = encode_v2(&Command::Proxy(ipv6()), &tlvs);

        let value_at = 52 + [0, 13, 13 + 8][at] + 3;
        let sent = u32::from_be_bytes(header[value_at..value_at + 4].try_into().unwrap());
        header[value_at..value_at + 4].fill(0);
        assert_eq!(sent, crc32c_by_bits(&header), "checksum as TLV {at}");
    }
    // The check value that every catalogue gives for this checksum: the yardstick itself is right.
    assert_eq!(crc32c_by_bits(b"123456789"), 0xe306_9283);
}

#[test]
fn records_that_are_not_sent() {
    let long = [1; 129];
    let huge = vec![1; 70_000];
    let cases: [(&str, Vec<Tlv<'_>>, EncodeError); 9] = [
        ("empty ALPN", vec![Tlv::Alpn(b"")], EncodeError::Empty { kind: 0x01 }),
        ("empty AUTHORITY", vec![Tlv::Authority(b"")], EncodeError::Empty { kind: 0x02 }),
        ("empty UNIQUE_ID", vec![Tlv::UniqueId(b"")], EncodeError::Empty { kind: 0x05 }),
        ("empty custom", vec![Tlv::Custom { kind: 0xE0, value: b"" }], EncodeError::Empty { kind: 0xE0 }),
        ("UNIQUE_ID of 129", vec![Tlv::UniqueId(&long)], EncodeError::Length { kind: 0x05, len: 129 }),
        (
            "two checksums",
            vec![Tlv::Crc32c, Tlv::Noop(0), Tlv::Crc32c],
            EncodeError::Duplicate { kind: 0x03 },
        ),
        (
            "two of a custom type",
            vec![Tlv::Custom { kind: 0xE1, value: b"a" }, Tlv::Custom { kind: 0xE1, value: b"b" }],
            EncodeError::Duplicate { kind: 0xE1 },
        ),
        ("largest NOOP", vec![Tlv::Noop(u16::MAX)], EncodeError::TooLong { needed: 65_566, limit: MAX_LEN }),
        (
            "more than a length field holds",
            vec![Tlv::Alpn(&huge)],
            EncodeError::TooLong { needed: 70_031, limit: MAX_LEN },
        ),
    ];
    for (name, tlvs, error) in cases {
        refuses(name, &Command::Proxy(ipv4()), &tlvs, error);
    }
    // SSL, its parts, NETNS, a registered type under a custom name, experiments and the range kept for the future.
    for kind in [0x00, 0x03, 0x20, 0x21, 0x30, 0xDF, 0xF0, 0xFF] {
        let custom = [Tlv::Custom { kind, value: b"x" }];
        refuses("not custom", &Command::Local, &custom, EncodeError::NotCustom { kind });
    }
    assert!(v2::encoded_len(&Command::Local, &[Tlv::UniqueId(&long[..128])]).is_ok());
}

/// Neither function accepts it, and the buffer stays as it was.
fn refuses(name: &str, command: &Command, tlvs: &[Tlv<'_>], error: EncodeError) {
    let mut out = [0xAA; 2 * MAX_LEN];
    assert_eq!(v2::encode(command, tlvs, &mut out), Err(error), "{name}");
    assert!(out.iter().all(|byte| *byte == 0xAA), "{name}: the buffer was touched");
    assert_eq!(v2::encoded_len(command, tlvs), Err(error), "{name}");
    assert!(!error.to_string().is_empty());
}

#[test]
fn the_buffer_is_the_limit() {
    let command = Command::Proxy(ipv4());
    let padded_to = |len: usize| [Tlv::Noop(u16::try_from(len - 28 - 3).unwrap())];
    let mut out = [0xAA; 4 * MAX_LEN];

    for limit in [28, SAFE_LEN, MAX_LEN] {
        let fits = if limit == 28 { vec![] } else { padded_to(limit).to_vec() };
        assert_eq!(v2::encode(&command, &fits, &mut out[..limit]), Ok(limit));
    }
    out.fill(0xAA);
    let too_long = Err(EncodeError::TooLong { needed: 28, limit: 27 });
    assert_eq!(v2::encode(&command, &[], &mut out[..27]), too_long);
    let too_long = Err(EncodeError::TooLong { needed: SAFE_LEN + 1, limit: SAFE_LEN });
    assert_eq!(v2::encode(&command, &padded_to(SAFE_LEN + 1), &mut out[..SAFE_LEN]), too_long);
    // No buffer raises the design limit.
    let too_long = Err(EncodeError::TooLong { needed: MAX_LEN + 1, limit: MAX_LEN });
    assert_eq!(v2::encode(&command, &padded_to(MAX_LEN + 1), &mut out), too_long);
    assert!(out.iter().all(|byte| *byte == 0xAA), "the buffer was touched");
}

#[test]
fn lines_as_they_are_sent() {
    let all_ones = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535";
    let cases: [(Addresses, &str); 6] = [
        (ipv4(), "PROXY TCP4 192.0.2.1 198.51.100.25 56324 25\r\n"),
        (ipv6(), "PROXY TCP6 2001:db8::1 2001:db8:0:1::25 56324 993\r\n"),
        (addresses("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:0"), "PROXY TCP4 192.0.2.1 192.0.2.2 1 0\r\n"),
        // No dotted tail: the specification's notation knows hexadecimal groups only.
        (addresses("192.0.2.1:1", "[2001:db8::2]:2"), "PROXY TCP6 ::ffff:c000:201 2001:db8::2 1 2\r\n"),
        (addresses("0.0.0.0:1", "[::]:2"), "PROXY TCP6 ::ffff:0:0 :: 1 2\r\n"),
        (
            addresses(all_ones, all_ones),
            "PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n",
        ),
    ];
    for (addresses, line) in cases {
        assert_eq!(String::from_utf8(encode_v1(&addresses)).unwrap(), line);

        let mut out = vec![0xAA; line.len() - 1];
        let too_long = Err(EncodeError::TooLong { needed: line.len(), limit: line.len() - 1 });
        assert_eq!(v1::encode(&addresses, &mut out), too_long);
        assert!(out.iter().all(|byte| *byte == 0xAA), "the buffer was touched");
    }
}
