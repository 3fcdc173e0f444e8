//! What holds for the PROXY header parser on any bytes: it never panics, never accepts part of a
//! header, and what it accepts encodes again to an equal header.
//!
//! The fuzz target checks this with a nightly compiler, and `injector-common`'s tests with any.

use injector_common::proxy::{
    Announced, Command, MAX_LEN, ParseError, Parsed, RawTlv, Tlv, Version, kind, parse, v1, v2,
};

/// Parses the input and checks the result.
///
/// # Panics
/// When the parser breaks one of its promises.
pub(crate) fn check(input: &[u8]) {
    match parse(input) {
        Ok(parsed) => {
            assert!(parsed.len <= input.len());
            assert_no_part_is_accepted(&input[..parsed.len]);
            assert_survives_encoding(&parsed);
        }
        Err(ParseError::Incomplete { needed }) => assert!(needed > input.len()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn assert_no_part_is_accepted(header: &[u8]) {
    for len in 0..header.len() {
        match parse(&header[..len]) {
            Err(ParseError::Incomplete { needed }) => assert!(len < needed && needed <= header.len()),
            other => panic!("{len} of {} bytes: {other:?}", header.len()),
        }
    }
}

fn assert_survives_encoding(parsed: &Parsed<'_>) {
    let mut out = [0; MAX_LEN];
    let tlvs: Vec<RawTlv<'_>> = parsed
        .tlvs
        .clone()
        .map(|tlv| tlv.expect("parse has walked it"))
        .filter(|tlv| sendable(tlv).is_some())
        .collect();
    let to_send: Vec<Tlv<'_>> = tlvs.iter().filter_map(sendable).collect();

    let len = match (parsed.version, parsed.command) {
        (_, Announced::Unknown) => return,
        (Version::One, Announced::Proxy(addresses)) => {
            v1::encode(&addresses, &mut out).expect("a line always fits")
        }
        (Version::One, Announced::Local) => panic!("version 1 has no LOCAL"),
        (Version::Two, Announced::Proxy(addresses)) => {
            match v2::encode(&Command::Proxy(addresses), &to_send, &mut out) {
                Ok(len) => len,
                Err(error) => return assert!(parsed.len > MAX_LEN, "{error}"),
            }
        }
        (Version::Two, Announced::Local) => match v2::encode(&Command::Local, &to_send, &mut out) {
            Ok(len) => len,
            Err(error) => return assert!(parsed.len > MAX_LEN, "{error}"),
        },
    };

    let again = parse(&out[..len]).expect("what was encoded parses");
    assert_eq!((again.version, again.command, again.len), (parsed.version, parsed.command, len));
    assert_eq!(again.is_checksummed(), parsed.is_checksummed());
    let read: Vec<RawTlv<'_>> = again.tlvs.map(|tlv| tlv.expect("parse has walked it")).collect();
    assert_eq!(read.len(), tlvs.len());
    for (read, sent) in read.iter().zip(&tlvs) {
        assert_eq!((read.kind, read.value.len()), (sent.kind, sent.value.len()));
        // Padding is sent as zeros whatever it was, and the checksum is of another header.
        assert!(matches!(read.kind, kind::NOOP | kind::CRC32C) || read.value == sent.value);
    }
}

/// What the encoder would be asked for; `None` for what it never sends.
fn sendable<'a>(tlv: &RawTlv<'a>) -> Option<Tlv<'a>> {
    match tlv.kind {
        kind::ALPN => Some(Tlv::Alpn(tlv.value)),
        kind::AUTHORITY => Some(Tlv::Authority(tlv.value)),
        kind::CRC32C => Some(Tlv::Crc32c),
        kind::NOOP => Some(Tlv::Noop(u16::try_from(tlv.value.len()).ok()?)),
        kind::UNIQUE_ID => Some(Tlv::UniqueId(tlv.value)),
        kind if kind::CUSTOM.contains(&kind) => Some(Tlv::Custom { kind, value: tlv.value }),
        _ => None,
    }
}
