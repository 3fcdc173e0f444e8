//! The routers that this host sends packets through.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// `RTF_GATEWAY` (linux/route.h): the route leads through a router.
const THROUGH_GATEWAY: u32 = 0x2;

/// The next hops of the main table's routes, as far as `/proc/net` shows them: an IPv4 route through
/// an IPv6 router is not there. A file that cannot be read has none.
#[must_use]
pub fn gateways() -> Vec<IpAddr> {
    let read = |file| fs::read_to_string(file).unwrap_or_default();
    let (ipv4, ipv6) = (read("/proc/net/route"), read("/proc/net/ipv6_route"));
    let ipv4 = ipv4_gateways(&ipv4).map(IpAddr::V4);
    let mut gateways: Vec<_> = ipv4.chain(ipv6_gateways(&ipv6).map(IpAddr::V6)).collect();
    gateways.sort_unstable();
    gateways.dedup();
    gateways
}

/// After a title: device, destination, gateway, flags; each address is a word of this processor in
/// network order, in hexadecimal (fib_route_seq_show, net/ipv4/fib_trie.c).
fn ipv4_gateways(routes: &str) -> impl Iterator<Item = Ipv4Addr> {
    routes.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(2);
        let gateway = u32::from_str_radix(fields.next()?, 16).ok()?;
        let flags = u32::from_str_radix(fields.next()?, 16).ok()?;
        (flags & THROUGH_GATEWAY != 0).then(|| Ipv4Addr::from(gateway.to_ne_bytes()))
    })
}

/// Destination and its length, source and its length, next hop, metric, two counters, flags (rt6_info_route,
/// net/ipv6/route.c).
fn ipv6_gateways(routes: &str) -> impl Iterator<Item = Ipv6Addr> {
    routes.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(4);
        let gateway = u128::from_str_radix(fields.next()?, 16).ok()?;
        let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
        (flags & THROUGH_GATEWAY != 0).then(|| Ipv6Addr::from_bits(gateway))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_through_a_router_are_found() {
        let ipv4 = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n\
                    eth0\t00000000\tFE0200C0\t0003\t0\t0\t0\t00000000\n\
                    eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\n\
                    broken\n";
        // As a little-endian machine prints it.
        if cfg!(target_endian = "little") {
            assert_eq!(ipv4_gateways(ipv4).collect::<Vec<_>>(), [Ipv4Addr::new(192, 0, 2, 254)]);
        }
        let ipv6 = "00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
                    20010db8000000000000000000000001 00000400 00000001 00000000 00000003     eth0\n\
                    20010db8000000000000000000000000 40 00000000000000000000000000000000 00 \
                    00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n";
        assert_eq!(ipv6_gateways(ipv6).collect::<Vec<_>>(), ["2001:db8::1".parse::<Ipv6Addr>().unwrap()]);
    }
}
