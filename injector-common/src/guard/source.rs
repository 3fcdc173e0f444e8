//! Limits per source: open connections, and new ones a second.

/// A source of connections and what its connections are counted of.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SourceKey {
    /// Its address, of which only the first bits count ([`mask`]): IPv6 in network order, IPv4 mapped into it.
    pub ip: [u32; 4],
    /// The listener ([`inline::Listener::id`](crate::inline::Listener::id)); 0 for all together.
    pub listener: u32,
}

/// The first bits of an address. `prefix` counts from the start of the mapped address: 128 for all of an IPv4 address.
#[must_use]
#[inline(always)]
pub const fn mask(ip: [u32; 4], prefix: u8) -> [u32; 4] {
    const fn word(word: u32, bits: u32) -> u32 {
        if bits >= 32 {
            word
        } else if bits == 0 {
            0
        } else {
            word & (u32::MAX << (32 - bits)).to_be()
        }
    }
    let prefix = prefix as u32;
    let [w0, w1, w2, w3] = ip;
    [
        word(w0, prefix),
        word(w1, prefix.saturating_sub(32)),
        word(w2, prefix.saturating_sub(64)),
        word(w3, prefix.saturating_sub(96)),
    ]
}

/// The limits on each source.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceLimits {
    /// Open connections; 0 if unlimited.
    pub connections: u32,
    /// New connections that may come at once; 0 if unlimited.
    pub burst: u32,
    /// The time in which one more new connection is allowed, in nanoseconds: up to a second, so that no product with a count of 32 bits
    /// overflows (programs have no multiplication that saturates).
    pub interval_ns: u64,
}

impl SourceLimits {
    /// Whether there is any.
    #[must_use]
    #[inline(always)]
    pub const fn is_set(&self) -> bool {
        self.connections != 0 || self.burst != 0
    }
}

/// The connections that a source has open.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceCounts {
    /// Handshakes of engine inline that are not finished: its address is not proven.
    pub pending: u32,
    /// Established with engine inline.
    pub established: u32,
    /// Sessions of the other engines.
    pub sessions: u32,
}

/// How much of its rate a source has used: the generic cell rate algorithm (ITU-T I.371, annex A).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// The theoretical arrival time of the next connection, in nanoseconds of `CLOCK_MONOTONIC`.
    pub arrival_ns: u64,
}

impl Rate {
    /// The state after one more connection now; `None` if it comes too early.
    #[must_use]
    #[inline(always)]
    pub const fn take(self, limits: &SourceLimits, now_ns: u64) -> Option<Self> {
        if limits.burst == 0 {
            return Some(self);
        }
        let from = if self.arrival_ns > now_ns { self.arrival_ns } else { now_ns };
        let ahead = from - now_ns;
        let tolerance = limits.interval_ns.wrapping_mul((limits.burst - 1) as u64);
        if ahead > tolerance {
            return None;
        }
        Some(Self { arrival_ns: from.saturating_add(limits.interval_ns) })
    }

    /// Whether one more comes too early, once `handshakes` that are under way have used the rate.
    #[must_use]
    #[inline(always)]
    pub const fn is_exceeded(self, limits: &SourceLimits, handshakes: u32, now_ns: u64) -> bool {
        let from = if self.arrival_ns > now_ns { self.arrival_ns } else { now_ns };
        let arrival_ns = from.saturating_add(limits.interval_ns.wrapping_mul(handshakes as u64));
        Self { arrival_ns }.take(limits, now_ns).is_none()
    }

    /// The state after one more connection, which is there though it may have come too early.
    #[must_use]
    #[inline(always)]
    pub const fn used(self, limits: &SourceLimits, now_ns: u64) -> Self {
        let from = if self.arrival_ns > now_ns { self.arrival_ns } else { now_ns };
        Self { arrival_ns: from.saturating_add(limits.interval_ns) }
    }
}

/// What becomes of another connection of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is admitted.
    Pass,
    /// It has too many open connections.
    TooManyConnections,
    /// It opens connections too fast.
    TooFast,
}

/// Decides about another connection of a source. At a SYN, `counts` include handshakes; at accept, where the address is proven, they
/// do not: who sends SYNs in another's name must not shut it out.
#[must_use]
#[inline(always)]
pub const fn admit(limits: &SourceLimits, counts: &SourceCounts, rate: Rate, now_ns: u64) -> Verdict {
    let open = counts.pending.saturating_add(counts.established).saturating_add(counts.sessions);
    if limits.connections != 0 && open >= limits.connections {
        Verdict::TooManyConnections
    } else if rate.take(limits, now_ns).is_none() {
        Verdict::TooFast
    } else {
        Verdict::Pass
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_bits_count() {
        let ip = [
            0x2001_0DB8_u32.to_be(),
            0x0001_0002_u32.to_be(),
            0xAABB_CCDD_u32.to_be(),
            0x0102_0304_u32.to_be(),
        ];
        assert_eq!(mask(ip, 128), ip);
        assert_eq!(mask(ip, 64), [ip[0], ip[1], 0, 0]);
        assert_eq!(mask(ip, 48), [ip[0], 0x0001_0000_u32.to_be(), 0, 0]);
        assert_eq!(mask(ip, 0), [0; 4]);
        assert_eq!(mask(ip, 120), [ip[0], ip[1], ip[2], 0x0102_0300_u32.to_be()]);
    }

    #[test]
    fn a_burst_passes_and_then_one_each_interval() {
        let limits = SourceLimits { connections: 0, burst: 3, interval_ns: 10 };
        let mut rate = Rate::default();
        let mut admitted = 0;
        for now in 100..200 {
            // Two tries at each moment.
            for _ in 0..2 {
                if let Some(next) = rate.take(&limits, now) {
                    (rate, admitted) = (next, admitted + 1);
                }
            }
        }
        assert_eq!(admitted, 3 + 9);
    }

    #[test]
    fn handshakes_under_way_use_the_rate() {
        let limits = SourceLimits { connections: 0, burst: 3, interval_ns: 10 };
        assert!(!Rate::default().is_exceeded(&limits, 2, 100));
        assert!(Rate::default().is_exceeded(&limits, 3, 100));
        let mut rate = Rate::default();
        for handshakes in [1, 0] {
            rate = rate.used(&limits, 100);
            assert!(
                !rate.is_exceeded(&limits, handshakes, 100) && rate.is_exceeded(&limits, handshakes + 1, 100)
            );
        }
        assert!(!Rate::default().is_exceeded(&SourceLimits::default(), u32::MAX, 0));
    }

    #[test]
    fn zero_is_no_limit() {
        let full = SourceCounts { pending: u32::MAX, established: u32::MAX, sessions: u32::MAX };
        assert_eq!(admit(&SourceLimits::default(), &full, Rate { arrival_ns: u64::MAX }, 0), Verdict::Pass);
        let limits = SourceLimits { connections: 2, ..SourceLimits::default() };
        let open = |established, sessions| SourceCounts { pending: 0, established, sessions };
        assert_eq!(admit(&limits, &open(1, 0), Rate::default(), 0), Verdict::Pass);
        assert_eq!(admit(&limits, &open(1, 1), Rate::default(), 0), Verdict::TooManyConnections);
    }

    /// Limits as a configuration makes them: an interval of up to a second.
    fn limits() -> impl Strategy<Value = SourceLimits> {
        (0..4_u32, prop_oneof![0..4_u32, Just(u32::MAX)], prop_oneof![1..20_u64, Just(1_000_000_000)])
            .prop_map(|(connections, burst, interval_ns)| SourceLimits { connections, burst, interval_ns })
    }

    /// Moments, many of them close to each other, and to the end of all time.
    fn moment() -> impl Strategy<Value = u64> {
        prop_oneof![0..40_u64, u64::MAX - 40..=u64::MAX, any::<u64>()]
    }

    fn count() -> impl Strategy<Value = u32> {
        prop_oneof![0..3_u32, Just(u32::MAX)]
    }

    proptest! {
        #[test]
        fn a_mask_keeps_the_first_bits(ip: u128, prefix in 0..=128_u8) {
            let words = |ip: u128| {
                let bytes = ip.to_be_bytes();
                [0, 4, 8, 12].map(|at| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()))
            };
            let first = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            prop_assert_eq!(mask(words(ip), prefix), words(ip & first));
        }

        /// The same in numbers that cannot overflow, as ITU-T I.371 has it.
        #[test]
        fn a_rate_is_that_of_the_algorithm(limits in limits(), arrival_ns in moment(), now_ns in moment(), handshakes in count()) {
            let wide = |number: u64| u128::from(number);
            let from = wide(arrival_ns.max(now_ns));
            let interval = wide(limits.interval_ns);
            let is_early = |from: u128| {
                limits.burst > 0 && from - wide(now_ns) > interval * (u128::from(limits.burst) - 1)
            };
            let after = Rate { arrival_ns: u64::try_from(from + interval).unwrap_or(u64::MAX) };
            let rate = Rate { arrival_ns };
            let expected = if is_early(from) { None } else if limits.burst == 0 { Some(rate) } else { Some(after) };
            prop_assert_eq!(rate.take(&limits, now_ns), expected);
            prop_assert_eq!(rate.used(&limits, now_ns), after);
            // Time ends at `u64::MAX`.
            let under_way = (from + interval * u128::from(handshakes)).min(wide(u64::MAX));
            prop_assert_eq!(rate.is_exceeded(&limits, handshakes, now_ns), is_early(under_way));
        }

        #[test]
        fn a_source_has_as_many_connections_as_it_may(
            limits in limits(), (pending, established, sessions) in (count(), count(), count()), rate in moment(), now_ns in moment(),
        ) {
            let (counts, rate) = (SourceCounts { pending, established, sessions }, Rate { arrival_ns: rate });
            let open = [pending, established, sessions].map(u64::from).iter().sum::<u64>();
            let expected = if limits.connections > 0 && open >= u64::from(limits.connections) {
                Verdict::TooManyConnections
            } else if rate.take(&limits, now_ns).is_none() {
                Verdict::TooFast
            } else {
                Verdict::Pass
            };
            prop_assert_eq!(admit(&limits, &counts, rate, now_ns), expected);
            prop_assert_eq!(limits.is_set(), limits.connections > 0 || limits.burst > 0);
        }
    }
}
