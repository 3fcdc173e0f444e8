//! What holds for every header and every input.

use injector_common::proxy::{
    Announced, Command, EncodeError, MAX_LEN, ParseError, RawTlv, Tlv, Version, kind, parse, v2,
};
use proptest::prelude::*;

use crate::samples::{
    OwnedTlv, any_addresses, any_command, any_header, any_input, any_tlvs, crc32c_by_bits, encode_v1,
    encode_v2, lend,
};

proptest! {
    #[test]
    fn binary_round_trip(command in any_command(), tlvs in any_tlvs(), payload: Vec<u8>) {
        let header = encode_v2(&command, &lend(&tlvs));
        let input = [&header[..], &payload].concat();
        let parsed = parse(&input).unwrap();

        let announced = match command {
            Command::Local => Announced::Local,
            Command::Proxy(addresses) => Announced::Proxy(addresses),
        };
        prop_assert_eq!((parsed.version, parsed.command, parsed.len), (Version::Two, announced, header.len()));
        prop_assert_eq!(v2::encoded_len(&command, &lend(&tlvs)), Ok(header.len()));

        let read: Vec<RawTlv<'_>> = parsed.tlvs.collect::<Result<_, _>>().unwrap();
        prop_assert_eq!(read.len(), tlvs.len());
        for (raw, sent) in read.iter().zip(&tlvs) {
            prop_assert_eq!((raw.kind, raw.value), (sent.lend().kind(), &wire_value(sent, raw, &header)[..]));
        }
    }

    #[test]
    fn line_round_trip(addresses in any_addresses(), payload: Vec<u8>) {
        let line = encode_v1(&addresses);
        let input = [&line[..], &payload].concat();
        let parsed = parse(&input).unwrap();

        prop_assert_eq!((parsed.version, parsed.len), (Version::One, line.len()));
        prop_assert_eq!(parsed.command, Announced::Proxy(addresses));
    }

    #[test]
    fn every_truncation_is_incomplete(header in any_header()) {
        for len in 0..header.len() {
            match parse(&header[..len]) {
                Err(ParseError::Incomplete { needed }) => {
                    prop_assert!(len < needed && needed <= header.len(), "{len} of {}: {needed}", header.len());
                }
                other => prop_assert!(false, "{len} of {}: {other:?}", header.len()),
            }
        }
    }

    #[test]
    fn a_shorter_buffer_is_refused_untouched(command in any_command(), tlvs in any_tlvs(), short in 0..MAX_LEN) {
        let tlvs = lend(&tlvs);
        let needed = v2::encoded_len(&command, &tlvs).unwrap();
        let limit = short % needed;
        let mut out = vec![0xAA; limit];

        prop_assert_eq!(v2::encode(&command, &tlvs, &mut out), Err(EncodeError::TooLong { needed, limit }));
        prop_assert!(out.iter().all(|byte| *byte == 0xAA));
    }

    /// A checksum can only speak for what it is known to cover: a flip that hides the checksum itself (in its own type
    /// and length, in the header's length, or PROXY turned into LOCAL) may leave a header that is valid without one.
    /// Such a header does not pass for a checksummed one; every other flip is caught.
    #[test]
    fn every_bit_flip_is_caught(addresses in any_addresses(), tlvs in any_tlvs(), payload: [u8; 8]) {
        let others = tlvs.iter().map(OwnedTlv::lend).filter(|tlv| *tlv != Tlv::Crc32c);
        let tlvs: Vec<_> = std::iter::once(Tlv::Crc32c).chain(others).collect();
        let header = encode_v2(&Command::Proxy(addresses), &tlvs);
        let checksum_at = if header[13] == 0x11 { 28 } else { 52 };
        let may_hide = |byte: usize| [12, 14, 15].contains(&byte) || (checksum_at..checksum_at + 3).contains(&byte);

        for bit in 0..header.len() * 8 {
            let mut input = [&header[..], &payload].concat();
            input[bit / 8] ^= 1 << (bit % 8);
            if let Ok(parsed) = parse(&input) {
                prop_assert!(may_hide(bit / 8), "bit {bit}: {parsed:?}");
                prop_assert!(!parsed.is_checksummed(), "bit {bit}: {parsed:?}");
            }
        }
    }

    /// Also shows that nothing panics: more bytes can complete a header, but never revise a verdict.
    #[test]
    fn verdicts_are_final(input in any_input(), more: Vec<u8>) {
        let longer = [&input[..], &more].concat();
        match parse(&input) {
            Ok(parsed) => {
                prop_assert!(parsed.len <= input.len());
                prop_assert_eq!(parse(&longer), Ok(parsed));
            }
            Err(ParseError::Incomplete { needed }) => {
                prop_assert!(needed > input.len());
                if longer.len() < needed {
                    prop_assert!(parse(&longer).is_err(), "shorter than it needs, yet accepted");
                }
            }
            Err(error) => prop_assert_eq!(parse(&longer), Err(error)),
        }
    }
}

/// What `sent` should look like on the wire; `raw` tells where it stands in `header`.
fn wire_value(sent: &OwnedTlv, raw: &RawTlv<'_>, header: &[u8]) -> Vec<u8> {
    match sent {
        OwnedTlv::Alpn(value) | OwnedTlv::UniqueId(value) | OwnedTlv::Custom(_, value) => value.clone(),
        OwnedTlv::Authority(name) => name.clone().into_bytes(),
        OwnedTlv::Noop(len) => vec![0; usize::from(*len)],
        OwnedTlv::Crc32c => {
            assert_eq!(raw.kind, kind::CRC32C);
            let mut zeroed = header.to_vec();
            zeroed[raw.offset + 3..raw.offset + 7].fill(0);
            crc32c_by_bits(&zeroed).to_be_bytes().to_vec()
        }
    }
}
