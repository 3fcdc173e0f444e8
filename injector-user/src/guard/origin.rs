//! Who wants a ban.

use std::sync::Arc;

use super::prefix_map::Tag;
use crate::config::Network;

/// Who wants a ban. Each has its own; a source is banned while one of them wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Origin {
    /// `[guard] deny` and the files of `deny_files`.
    List = 0,
    /// `injector ban`, by the operator or by fail2ban.
    Command = 1,
    /// A decision of CrowdSec.
    CrowdSec = 2,
}

impl Origin {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::List, Self::Command, Self::CrowdSec];

    /// Its bit in [`injector_common::guard::Ban::origins`].
    #[must_use]
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }

    /// Its name: in `injector bans`, and the label `origin` of metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::List => "list",
            Self::Command => "command",
            Self::CrowdSec => "crowdsec",
        }
    }
}

impl Tag for Origin {
    const FIRST: Self = Self::List;
}

/// A ban that an origin wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedBan {
    /// Whom.
    pub network: Network,
    /// Until when, in nanoseconds of `CLOCK_BOOTTIME`; [`injector_common::guard::Ban::FOREVER`] if without end.
    pub until_ns: u64,
    /// Why, in a few words. Shared by all of the same reason.
    pub reason: Arc<str>,
}

/// A ban in the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedBan {
    /// Who wants it.
    pub origin: Origin,
    /// Whom, until when and why.
    pub ban: WantedBan,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's maps have them, also from an earlier version.
    #[test]
    fn the_bits_of_origins_are_those_of_earlier_daemons() {
        assert_eq!(Origin::ALL.map(Origin::bit), [0b001, 0b010, 0b100]);
        assert_eq!(Origin::ALL.map(Origin::name), ["list", "command", "crowdsec"]);
    }
}
