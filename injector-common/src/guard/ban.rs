//! Bans.

/// A banned address (map `BANNED_ADDRESSES`) or network (map `BANNED_NETWORKS`).
///
/// Of networks one inside the other, the kernel finds the smallest only: the daemon gives it the latest end of all that it is in.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ban {
    /// When it ends, in nanoseconds of `CLOCK_BOOTTIME` ([`Ban::FOREVER`] if never).
    pub until_ns: u64,
    /// Who wants it, for a daemon that finds it: bits that only the daemon knows.
    pub origins: u32,
    /// Makes the size a multiple of eight.
    pub reserved: u32,
}

impl Ban {
    /// The end of a ban that does not end.
    pub const FOREVER: u64 = u64::MAX;

    /// Whether it holds now.
    #[must_use]
    #[inline(always)]
    pub const fn holds(&self, now_ns: u64) -> bool {
        now_ns < self.until_ns
    }
}

/// What the lists say of a source address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// It is in a network that may never be banned.
    pub allowed: bool,
    /// The end of the address's own ban; 0 if there is none.
    pub address_until_ns: u64,
    /// The end of the ban of the smallest banned network that it is in; 0 if there is none.
    pub network_until_ns: u64,
}

impl Listed {
    /// Whether nothing of this source may pass.
    #[must_use]
    #[inline(always)]
    pub const fn is_banned(&self, now_ns: u64) -> bool {
        !self.allowed && (now_ns < self.address_until_ns || now_ns < self.network_until_ns)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Moments, some of them the same.
    fn moment() -> impl Strategy<Value = u64> {
        prop_oneof![0_u64..4, Just(Ban::FOREVER), any::<u64>()]
    }

    proptest! {
        #[test]
        fn a_ban_holds_until_its_end(until_ns in moment(), now_ns in moment()) {
            let ban = Ban { until_ns, ..Ban::default() };
            prop_assert_eq!(ban.holds(now_ns), now_ns < until_ns);
        }

        #[test]
        fn a_source_is_banned_while_one_ban_holds_and_none_while_it_is_allowed(
            address_until_ns in moment(), network_until_ns in moment(), now_ns in moment(),
        ) {
            let listed = Listed { allowed: false, address_until_ns, network_until_ns };
            let holds = |until_ns| Ban { until_ns, ..Ban::default() }.holds(now_ns);
            prop_assert_eq!(listed.is_banned(now_ns), holds(address_until_ns) || holds(network_until_ns));
            let allowed = Listed { allowed: true, ..listed }.is_banned(now_ns);
            prop_assert!(!allowed);
        }
    }
}
