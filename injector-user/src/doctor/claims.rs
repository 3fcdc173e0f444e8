//! The addresses in the doctor's headers: this host's own, so that no block list, limit or ban hits anybody else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::observation::Family;

/// What a header says of its client and of where that connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claims {
    ipv4: (IpAddr, SocketAddr),
    ipv6: (IpAddr, SocketAddr),
}

/// For documentation (RFC 5737, RFC 3849): where this host has no address of a family.
const NOBODY: (IpAddr, IpAddr) =
    (IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)));

impl Claims {
    /// The client is the host itself, by the address that the kernel chose (`source`) or another of its own (`local`); the
    /// destination is where the listener is bound, or the client's own address where that is everywhere.
    pub(super) fn new(source: Option<IpAddr>, local: &[IpAddr], bind: &[SocketAddr]) -> Self {
        let port = bind.first().map_or(0, SocketAddr::port);
        let claim = |family: Family, nobody: IpAddr| {
            let fits = |ip: &IpAddr| Family::of(*ip) == family && !ip.is_loopback();
            let client = source
                .filter(|ip| Family::of(*ip) == family)
                .or_else(|| local.iter().copied().find(fits))
                .unwrap_or(nobody);
            let bound =
                bind.iter().find(|bound| Family::of(bound.ip()) == family && !bound.ip().is_unspecified());
            (client, bound.copied().unwrap_or(SocketAddr::new(client, port)))
        };
        Self { ipv4: claim(Family::V4, NOBODY.0), ipv6: claim(Family::V6, NOBODY.1) }
    }

    /// Source and destination for a header; the source has the port of the connection.
    pub(super) fn of(&self, family: Family, port: u16) -> (SocketAddr, SocketAddr) {
        let (client, destination) = match family {
            Family::V4 => self.ipv4,
            Family::V6 => self.ipv6,
        };
        (SocketAddr::new(client, port), destination)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_name_this_host() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let local = [ip("127.0.0.1"), ip("10.0.0.5"), ip("::1"), ip("fd25::5")];
        let bind = ["192.0.2.10:25".parse().unwrap(), "[::]:25".parse().unwrap()];
        let claims = Claims::new(Some(ip("10.0.0.1")), &local, &bind);
        let show = |claims: &Claims, family| {
            let (source, destination) = claims.of(family, 7);
            format!("{source} {destination}")
        };
        assert_eq!(show(&claims, Family::V4), "10.0.0.1:7 192.0.2.10:25");
        assert_eq!(show(&claims, Family::V6), "[fd25::5]:7 [fd25::5]:25");
        let claims = Claims::new(None, &[], &bind);
        assert_eq!(show(&claims, Family::V4), "192.0.2.1:7 192.0.2.10:25");
        assert_eq!(show(&claims, Family::V6), "[2001:db8::1]:7 [2001:db8::1]:25");
    }
}
