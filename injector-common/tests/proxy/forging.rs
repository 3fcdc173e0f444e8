//! Clients that bring a header of their own.

use injector_common::proxy::{Forgery, SIGNATURE, forgery, parse};
use proptest::prelude::*;

use crate::samples::any_header;

#[test]
fn every_prefix_of_a_signature_is_undecided_and_one_differing_byte_decides() {
    for signature in [&SIGNATURE[..], b"PROXY "] {
        for end in 0..signature.len() {
            assert_eq!(forgery(&signature[..end]), Forgery::Undecided, "{end} bytes of {signature:?}");

            let mut other = signature[..=end].to_vec();
            other[end] ^= 0x80;
            assert_eq!(forgery(&other), Forgery::No, "byte {end} of {signature:?} differs");
        }
        assert_eq!(forgery(signature), Forgery::Yes);
        assert_eq!(forgery(&[signature, b"anything"].concat()), Forgery::Yes);
    }
}

#[test]
fn honest_openings_are_none() {
    let openings: [&[u8]; 9] = [
        b"EHLO client.example\r\n",
        b"a1 CAPABILITY\r\n",
        b"USER alice\r\n",
        b"\r\n",
        b"\r\nQUIT\r\n",
        b"PROXY\r\n",
        b"proxy TCP4",
        b"\x16\x03\x01\x02\x00\x01",
        b"P",
    ];
    for opening in openings {
        // A prefix needs more bytes; an honest client sends others than a forger.
        let expected = if opening == b"\r\n" || opening == b"P" { Forgery::Undecided } else { Forgery::No };
        assert_eq!(forgery(opening), expected, "{opening:?}");
    }
}

proptest! {
    #[test]
    fn whatever_parses_is_a_forgery_on_a_public_port(header in any_header()) {
        prop_assert!(parse(&header).is_ok());
        prop_assert_eq!(forgery(&header), Forgery::Yes);
    }
}
