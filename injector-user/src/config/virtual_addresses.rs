//! `virtual_addresses` of a listener: addresses that are not this host's, whose packets come here.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::parse::{
    address::accepted,
    section::{Section, Spanned},
};

pub(super) const FIELD: &str = "virtual_addresses";

/// Reads the addresses. Each invalid one is reported, and each of a family that `bind` does not take.
pub(super) fn read(
    section: &Section<'_>,
    texts: &[Spanned<&str>],
    bind: &[SocketAddr],
) -> Vec<(usize, IpAddr)> {
    let mut addresses: Vec<(usize, IpAddr)> = Vec::new();
    for (at, text) in texts {
        let refused = |why: &str| section.report_field(*at, FIELD, &format!(" {text:?}: {why}"));
        match text.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
            Err(_) => refused("must be an IP address, such as \"192.0.2.10\" or \"2001:db8::10\""),
            Ok(ip)
                if ip.is_unspecified()
                    || ip.is_multicast()
                    || ip.is_loopback()
                    || ip == Ipv4Addr::BROADCAST =>
            {
                refused("must be an address to which clients connect");
            }
            Ok(ip) if addresses.iter().any(|(_, other)| *other == ip) => refused("is there twice"),
            // Without a valid `bind` that is what is reported.
            Ok(ip) if !bind.is_empty() && sockets(bind, ip).next().is_none() => {
                let (family, any) = if ip.is_ipv4() { ("IPv4", "0.0.0.0") } else { ("IPv6", "[::]") };
                refused(&format!("no address in `bind` takes {family}: add one, such as \"{any}:25\""));
            }
            Ok(ip) if bind.iter().any(|bound| bound.ip().to_canonical() == ip) => {
                refused("is in `bind` already, as an address of this host: leave it out here");
            }
            Ok(ip) => addresses.push((*at, ip)),
        }
    }
    addresses
}

/// The address with each port that `bind` takes in its family. Port 0 is none: the kernel chooses.
pub(super) fn sockets(bind: &[SocketAddr], ip: IpAddr) -> impl Iterator<Item = SocketAddr> {
    let accepts = bind.iter().flat_map(|bound| accepted(*bound));
    let of_family = accepts.filter(|bound| bound.ip().to_canonical().is_ipv4() == ip.is_ipv4());
    let mut ports: Vec<u16> = of_family.map(|bound| bound.port()).collect();
    ports.sort_unstable();
    ports.dedup();
    ports.into_iter().map(move |port| SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_the_ports_of_its_family() {
        let ports = |bind: &[&str], ip: &str| -> Vec<u16> {
            let bind: Vec<SocketAddr> = bind.iter().map(|bound| bound.parse().unwrap()).collect();
            sockets(&bind, ip.parse().unwrap()).map(|socket| socket.port()).collect()
        };
        for (bind, ipv4, ipv6) in [
            (&["0.0.0.0:25"][..], &[25][..], &[][..]),
            (&["[::]:25"], &[25], &[25]),
            (&["10.0.0.1:25", "10.0.0.2:25", "[fd00::1]:2525"], &[25], &[2525]),
            (&["[::ffff:10.0.0.1]:25"], &[25], &[]),
            (&["[::]:0", "0.0.0.0:587", "0.0.0.0:25"], &[25, 587], &[]),
        ] {
            assert_eq!(
                (&ports(bind, "192.0.2.10")[..], &ports(bind, "2001:db8::10")[..]),
                (ipv4, ipv6),
                "{bind:?}"
            );
        }
    }
}
