//! Where a packet leaves to.

/// The next hop towards one end of a connection, as bpf_fib_lookup found it.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NextHop {
    /// `AF_INET` or `AF_INET6`, of `address`: an IPv4 route may have an IPv6 gateway (RFC 5549). With `address` it is a `struct
    /// bpf_redir_neigh`.
    pub family: u32,
    /// The gateway, or the destination itself; IPv4 in the first word, in network order.
    pub address: [u32; 4],
    /// The device; 0 if no route is known.
    pub ifindex: u32,
    /// The largest packet of the path, in bytes, IP header included.
    pub mtu: u32,
    /// `CLOCK_MONOTONIC` of the look-up, in units of 2^20 ns (1.05 ms).
    pub looked_up: u32,
}

impl NextHop {
    /// How long a look-up is used: 2^30 ns.
    const FRESH: u32 = 1 << 10;

    /// The clock of [`NextHop::looked_up`].
    #[must_use]
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "wraps after 52 days; only differences count")]
    pub const fn clock(now_ns: u64) -> u32 {
        (now_ns >> 20) as u32
    }

    /// Whether the route must be looked up again.
    #[must_use]
    #[inline(always)]
    pub const fn is_stale(&self, now_ns: u64) -> bool {
        self.ifindex == 0 || Self::clock(now_ns).wrapping_sub(self.looked_up) > Self::FRESH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_is_looked_up_every_second() {
        let at = |now_ns| NextHop { ifindex: 2, looked_up: NextHop::clock(now_ns), ..NextHop::default() };
        let start = 5_000_000_000;
        assert!(NextHop::default().is_stale(start));
        assert!(!at(start).is_stale(start) && !at(start).is_stale(start + 1_000_000_000));
        assert!(at(start).is_stale(start + 1_080_000_000));
        // The clock has wrapped.
        let late = u64::from(u32::MAX) << 20;
        assert!(!at(late).is_stale(late + (1 << 21)));
    }
}
