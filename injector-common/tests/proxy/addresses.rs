//! Which family a pair of addresses is announced in.

use std::net::{SocketAddr, SocketAddrV6};

use injector_common::proxy::{Addresses, Command, parse};

use crate::samples::encode_v2;

#[test]
fn pairs_are_normalised() {
    let cases = [
        // name, source, destination, as announced
        ("plain", "192.0.2.1:1", "192.0.2.2:2", ("192.0.2.1:1", "192.0.2.2:2")),
        ("both mapped", "[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2", ("192.0.2.1:1", "192.0.2.2:2")),
        ("source mapped, IPv4", "[::ffff:192.0.2.1]:1", "192.0.2.2:2", ("192.0.2.1:1", "192.0.2.2:2")),
        ("native", "[2001:db8::1]:1", "[2001:db8::2]:2", ("[2001:db8::1]:1", "[2001:db8::2]:2")),
        ("mixed", "192.0.2.1:1", "[2001:db8::2]:2", ("[::ffff:192.0.2.1]:1", "[2001:db8::2]:2")),
        (
            "mixed the other way",
            "[2001:db8::1]:1",
            "192.0.2.2:2",
            ("[2001:db8::1]:1", "[::ffff:192.0.2.2]:2"),
        ),
        (
            "mapped, native",
            "[::ffff:192.0.2.1]:1",
            "[2001:db8::2]:2",
            ("[::ffff:192.0.2.1]:1", "[2001:db8::2]:2"),
        ),
        // RFC 4291, section 2.5.5.1: deprecated, and not what a dual-stack socket gives.
        ("compatible", "[::192.0.2.1]:1", "[::192.0.2.2]:2", ("[::192.0.2.1]:1", "[::192.0.2.2]:2")),
    ];
    for (name, source, destination, announced) in cases {
        let addresses = Addresses::new(source.parse().unwrap(), destination.parse().unwrap());
        let expected: (SocketAddr, SocketAddr) = (announced.0.parse().unwrap(), announced.1.parse().unwrap());
        assert_eq!((addresses.source(), addresses.destination()), expected, "{name}");
        assert_eq!(matches!(addresses, Addresses::V4 { .. }), expected.0.is_ipv4(), "{name}");
    }
}

#[test]
fn scope_and_flow_do_not_travel() {
    let link_local = SocketAddrV6::new("fe80::1".parse().unwrap(), 25, 7, 3);
    let addresses = Addresses::new(link_local.into(), link_local.into());

    let plain: SocketAddr = "[fe80::1]:25".parse().unwrap();
    assert_eq!((addresses.source(), addresses.destination()), (plain, plain));
}

#[test]
fn a_pair_made_by_hand_is_normalised_when_sent() {
    let mapped = |text: &str| -> SocketAddrV6 { text.parse().unwrap() };
    let by_hand =
        Addresses::V6 { source: mapped("[::ffff:192.0.2.1]:1"), destination: mapped("[::ffff:192.0.2.2]:2") };

    let header = encode_v2(&Command::Proxy(by_hand), &[]);

    assert_eq!(header.len(), 28);
    let announced = parse(&header).unwrap().command.addresses().unwrap();
    assert_eq!(announced, Addresses::new(by_hand.source(), by_hand.destination()));
}
