//! What the programs need not look up.

/// What the daemon tells the programs (map `GUARD_SETTINGS`).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Of banned networks: the lowest bit says whether there are any, the others are different after each change.
    pub networks: u32,
    /// The same of single addresses.
    pub addresses: u32,
}

const ANY: u32 = 1;

impl Settings {
    /// Whether anything is banned.
    #[must_use]
    #[inline(always)]
    pub const fn has_bans(&self) -> bool {
        (self.networks | self.addresses) & ANY != 0
    }

    /// Whether networks are banned.
    #[must_use]
    #[inline(always)]
    pub const fn has_networks(&self) -> bool {
        self.networks & ANY != 0
    }

    /// Whether single addresses are banned.
    #[must_use]
    #[inline(always)]
    pub const fn has_addresses(&self) -> bool {
        self.addresses & ANY != 0
    }

    /// Tells the bans from all earlier ones: what a program has looked up is true as long as it is the same.
    #[must_use]
    #[inline(always)]
    pub const fn generation(&self) -> u64 {
        (self.networks as u64) << 32 | self.addresses as u64
    }

    /// What is written after a change: whether networks and addresses are banned now.
    #[must_use]
    pub const fn after(self, networks: bool, addresses: bool) -> Self {
        let last = if self.networks > self.addresses { self.networks } else { self.addresses };
        let next = (last | ANY).wrapping_add(1);
        Self { networks: next | networks as u32, addresses: next | addresses as u32 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn after_each_change_the_generation_is_another(changes in proptest::collection::vec(any::<(bool, bool)>(), 1..100)) {
            let mut settings = Settings::default();
            for (networks, addresses) in changes {
                let before = settings.generation();
                settings = settings.after(networks, addresses);
                prop_assert!(settings.generation() > before);
                prop_assert_eq!(settings.has_networks(), networks);
                prop_assert_eq!(settings.has_addresses(), addresses);
                prop_assert_eq!(settings.has_bans(), networks || addresses);
            }
        }
    }

    #[test]
    fn the_last_number_is_followed_by_the_first() {
        let last = Settings { networks: u32::MAX, addresses: u32::MAX - 1 };
        assert_eq!(last.after(false, true), Settings { networks: 0, addresses: 1 });
    }

    /// It wrote 0 and 1.
    #[test]
    fn what_an_earlier_daemon_wrote_is_understood() {
        let earlier = Settings { networks: 0, addresses: 1 };
        assert!(earlier.has_addresses() && !earlier.has_networks() && earlier.has_bans());
    }
}
