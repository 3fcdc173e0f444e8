//! Addresses of the testbed, in both families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Internet protocol version of one test case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order reports list them.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// `ipv4` or `ipv6`, as in the names of trials.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }
}

/// A host of the testbed, which has an address of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostAddresses {
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl HostAddresses {
    /// The address of that family.
    #[must_use]
    pub const fn of(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(self.v4),
            Family::V6 => IpAddr::V6(self.v6),
        }
    }
}

/// The client, 198.51.100.7/24 and 2001:db8:c::7/64: the mail servers must log it.
pub const CLIENT: HostAddresses = HostAddresses {
    v4: Ipv4Addr::new(198, 51, 100, 7),
    v6: Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 7),
};
/// The edge on the client's side.
pub const EDGE_OUTSIDE: HostAddresses = HostAddresses {
    v4: Ipv4Addr::new(198, 51, 100, 1),
    v6: Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 1),
};
/// The edge on the mail servers' side: the client that they see without the injector.
pub const EDGE_INSIDE: HostAddresses =
    HostAddresses { v4: Ipv4Addr::new(10, 25, 0, 1), v6: Ipv6Addr::new(0xfd25, 0, 0, 0, 0, 0, 0, 1) };
/// The mail servers.
pub const MAIL: HostAddresses =
    HostAddresses { v4: Ipv4Addr::new(10, 25, 0, 2), v6: Ipv6Addr::new(0xfd25, 0, 0, 0, 0, 0, 0, 2) };
/// The address of the splice engine.
pub const VIP_SPLICE: HostAddresses = vip(10);
/// The address of the relay engine.
pub const VIP_RELAY: HostAddresses = vip(11);
/// The address of the inline engine.
pub const VIP_INLINE: HostAddresses = vip(12);
/// The address of HAProxy, which distinguishes a fault of the testbed from one of the injector.
pub const VIP_HAPROXY: HostAddresses = vip(13);
/// Every public address on the edge.
pub const VIPS: [HostAddresses; 4] = [VIP_SPLICE, VIP_RELAY, VIP_INLINE, VIP_HAPROXY];

/// 192.0.2.N, and 2001:db8:a::N with the same digits (so 0x10 beside 10).
const fn vip(last: u8) -> HostAddresses {
    let digits = (last / 10) * 16 + last % 10;
    HostAddresses {
        v4: Ipv4Addr::new(192, 0, 2, last),
        v6: Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, digits as u16),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_alike_in_both_families() {
        assert_eq!(VIP_INLINE.v4.to_string(), "192.0.2.12");
        assert_eq!(VIP_INLINE.v6.to_string(), "2001:db8:a::12");
    }
}
