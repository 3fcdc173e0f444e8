//! How many connections there are.

use super::Pressure;
use crate::guard::SourceLimits;

/// Connections of a listener (map `USAGE`, at [`Listener::id`](super::Listener::id)); at 0 those of all. The daemon reads and writes it in
/// memory, without a system call. Limits hold for the connections of all engines together.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Handshakes that are not finished. Written by the program.
    pub pending: u32,
    /// Established, and not yet ended. Written by the program.
    pub established: u32,
    /// Sessions of the other engines. Written by the daemon.
    pub sessions: u32,
    /// The limit. Written by the daemon.
    pub limit: u32,
    /// Of all: how many slots of `CONNECTIONS` are not free, those of ended connections included. Written by the program.
    pub slots: u32,
    /// Of all: which bits of an IPv4 address are its source. Written by the daemon, as what follows.
    pub source_mask_ipv4: u32,
    /// The same of an IPv6 address.
    pub source_mask_ipv6: [u32; 4],
    /// The limits on each source.
    pub source_limits: SourceLimits,
    /// Opened since the map was made. Written by the program.
    pub accepted: u64,
    /// The listener's name, for a daemon that finds connections of an earlier one; all zero if the place is free. Written by the daemon.
    pub name: [u8; Self::NAME_LEN],
}

impl Default for Usage {
    fn default() -> Self {
        Self {
            pending: 0,
            established: 0,
            sessions: 0,
            limit: 0,
            slots: 0,
            source_mask_ipv4: 0,
            source_mask_ipv6: [0; 4],
            source_limits: SourceLimits::default(),
            accepted: 0,
            name: [0; Self::NAME_LEN],
        }
    }
}

impl Usage {
    /// Room for a name: 63 characters, and zero.
    pub const NAME_LEN: usize = 64;
    /// How many places there are: that of all, and of as many listeners.
    pub const COUNT: u32 = 65;
    /// Where the counts of all listeners stand.
    pub const ALL: u32 = 0;

    /// Whether another connection may be opened. A handshake counts, so that those that finish together do not exceed the limit.
    #[must_use]
    #[inline(always)]
    pub const fn has_room(&self) -> bool {
        self.pending.saturating_add(self.established).saturating_add(self.sessions) < self.limit
    }

    /// How much of the room that connections leave is taken by handshakes. A flood of SYNs takes it all, and then clients that exist
    /// go to the sockets: what is not finished has to leave soon.
    #[must_use]
    #[inline(always)]
    pub const fn pressure_of_handshakes(&self) -> Pressure {
        let connections = self.established.saturating_add(self.sessions);
        Pressure::of(self.pending, self.limit.saturating_sub(connections))
    }
}

/// What the program needs to know of its host (map `SETTINGS`).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The source ports that it may use towards backends.
    pub ports: super::PortRange,
    /// How many handshakes may be open at the same time.
    pub max_pending: u32,
    /// How many slots `CONNECTIONS` has, the unused first one included.
    pub slots: u32,
}
