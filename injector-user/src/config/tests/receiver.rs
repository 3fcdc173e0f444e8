//! Receivers: what they accept.

use super::and;
use crate::config::{Config, CustomTlv};

fn parse(lines: &str) -> Config {
    Config::parse(&and(lines), "f.toml").unwrap()
}

#[test]
fn a_v1_header_without_checksum_is_accepted() {
    parse("[listener.receiver]\nversion = \"v1\"\ncrc32c = false");
}

#[test]
fn a_header_of_exactly_the_maximum_is_accepted() {
    // 52 + 3 + 177 = 232 bytes. `broken/receiver.toml` has 178 bytes of padding.
    parse("[listener.receiver]\nnoop = 177");
}

#[test]
fn custom_tlvs_are_text_or_hexadecimal() {
    let config = parse(
        "[[listener.receiver.custom]]\nkind = 0xE0\nvalue = \"é\"\n[[listener.receiver.custom]]\nkind = 0xEF\nhex = \"c0FFee\"",
    );
    assert_eq!(
        config.listeners[0].receiver.custom,
        [
            CustomTlv { kind: 0xE0, value: "é".as_bytes().to_vec() },
            CustomTlv { kind: 0xEF, value: vec![0xC0, 0xFF, 0xEE] },
        ]
    );
}
