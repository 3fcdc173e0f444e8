//! What the programs need not look up.

/// What the daemon tells the programs (map `GUARD_SETTINGS`).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// 0 if no network is banned: then only addresses are looked up.
    pub networks: u32,
    /// 0 if no single address is banned.
    pub addresses: u32,
}

impl Settings {
    /// Whether anything is banned.
    #[must_use]
    #[inline(always)]
    pub const fn has_bans(&self) -> bool {
        self.networks | self.addresses != 0
    }
}
