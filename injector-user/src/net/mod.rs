//! TCP sockets, pipes for splice(2), peer-close monitoring, TLS for health checks, and pauses after failed
//! requests.

pub mod backoff;
pub mod hangup;
pub mod options;
pub mod socket;
pub mod source;
pub mod splice_pipe;
pub mod syn;
pub mod tls;

use std::net::SocketAddr;

/// An address in its own family. A socket of `[::]` has IPv4 addresses as `::ffff:192.0.2.7` (RFC 4291,
/// section 2.5.5.2); logs and look-ups want `192.0.2.7`.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        // A link-local address keeps its zone.
        ip if ip == address.ip() => address,
        ip => SocketAddr::new(ip, address.port()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_addresses_in_ipv6_are_ipv4_addresses_and_no_others() {
        for (address, expected) in [
            ("[::ffff:192.0.2.7]:40000", "192.0.2.7:40000"),
            ("192.0.2.7:40000", "192.0.2.7:40000"),
            ("[2001:db8::7]:40000", "[2001:db8::7]:40000"),
            ("[::1]:40000", "[::1]:40000"),
            ("[fe80::1%3]:40000", "[fe80::1%3]:40000"),
        ] {
            assert_eq!(canonical(address.parse().unwrap()), expected.parse().unwrap(), "{address}");
        }
    }
}
