//! The addresses in the doctor's headers. They are this host's own, so that block lists, limits and
//! bans affect no other host. To test what a server allows localhost, also 127.0.0.1, and an
//! address for documentation.

use std::net::{IpAddr, SocketAddr};

use super::observation::{Client, Family};

/// The client and the destination in a header, for each family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HeaderAddresses {
    ipv4: (IpAddr, SocketAddr),
    ipv6: (IpAddr, SocketAddr),
}

impl HeaderAddresses {
    /// The client is this host, by the address that the kernel chose (`source`) or another of its
    /// own (`local`). The destination is where the listener is bound, or the client's own address
    /// if it is bound to all addresses.
    pub(super) fn new(source: Option<IpAddr>, local: &[IpAddr], bind: &[SocketAddr]) -> Self {
        let port = bind.first().map_or(0, SocketAddr::port);
        let claim = |family: Family| {
            // An address for documentation (RFC 5737, RFC 3849), if this host has none of the
            // family.
            let documentation = Client::Documentation.ip(family);
            let fits = |ip: &IpAddr| Family::of(*ip) == family && !ip.is_loopback();
            let client = source
                .filter(|ip| Family::of(*ip) == family)
                .or_else(|| local.iter().copied().find(fits))
                .unwrap_or(documentation);
            let bound =
                bind.iter().find(|bound| Family::of(bound.ip()) == family && !bound.ip().is_unspecified());
            (client, bound.copied().unwrap_or(SocketAddr::new(client, port)))
        };
        Self { ipv4: claim(Family::V4), ipv6: claim(Family::V6) }
    }

    /// Source and destination of a header; the source has the port of the connection.
    pub(super) fn of(&self, family: Family, port: u16) -> (SocketAddr, SocketAddr) {
        let (client, destination) = match family {
            Family::V4 => self.ipv4,
            Family::V6 => self.ipv6,
        };
        (SocketAddr::new(client, port), destination)
    }

    /// The same with another client.
    pub(super) fn with_client(&self, client: Client, family: Family, port: u16) -> (SocketAddr, SocketAddr) {
        let (_, destination) = self.of(family, port);
        (SocketAddr::new(client.ip(family), port), destination)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_the_addresses_of_this_host() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let local = [ip("127.0.0.1"), ip("10.0.0.5"), ip("::1"), ip("fd25::5")];
        let bind = ["192.0.2.10:25".parse().unwrap(), "[::]:25".parse().unwrap()];
        let addresses = HeaderAddresses::new(Some(ip("10.0.0.1")), &local, &bind);
        let show = |addresses: &HeaderAddresses, family| {
            let (source, destination) = addresses.of(family, 7);
            format!("{source} {destination}")
        };
        assert_eq!(show(&addresses, Family::V4), "10.0.0.1:7 192.0.2.10:25");
        assert_eq!(show(&addresses, Family::V6), "[fd25::5]:7 [fd25::5]:25");
        let (source, destination) = addresses.with_client(Client::Localhost, Family::V4, 7);
        assert_eq!(format!("{source} {destination}"), "127.0.0.1:7 192.0.2.10:25");
        let addresses = HeaderAddresses::new(None, &[], &bind);
        assert_eq!(show(&addresses, Family::V4), "192.0.2.1:7 192.0.2.10:25");
        assert_eq!(show(&addresses, Family::V6), "[2001:db8::1]:7 [2001:db8::1]:25");
    }
}
