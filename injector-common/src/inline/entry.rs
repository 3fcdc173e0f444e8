//! What the map `FLOWS` says of a packet's addresses.

use super::{Flow, Timeouts};

/// Which connection a packet with these addresses belongs to (map `FLOWS`, by [`Key`](super::Key)). Each connection has two
/// entries, one for each direction.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// One of [`Entry::FROM_CLIENT`] and those that follow it.
    pub origin: u32,
    /// The index of the connection in `CONNECTIONS` that these addresses have; 0 if none is established.
    pub established: u32,
    /// The same of the one that is being opened. A SYN never touches the one that is established.
    pub pending: u32,
}

impl Entry {
    /// The packets come from a client.
    pub const FROM_CLIENT: u32 = 1;
    /// The packets come from a backend.
    pub const FROM_BACKEND: u32 = 2;
    /// The packets belong to a program with another layout, which handles them (an upgrade).
    pub const FOREIGN: u32 = 3;
}

/// Where a connection's slot of `CONNECTIONS` is in its life ([`Flow::phase`]). A slot is used again only after it was out of `FLOWS`
/// for a whole round of the sweep, so that no program that runs meanwhile still reads it.
#[repr(u64)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Free.
    Free,
    /// Being opened.
    Pending,
    /// The client has answered the backend.
    Established,
    /// Out of `FLOWS`.
    Removed,
}

impl Phase {
    /// The phase with this number.
    #[must_use]
    #[inline(always)]
    pub const fn of(number: u64) -> Self {
        match number {
            1 => Self::Pending,
            2 => Self::Established,
            3 => Self::Removed,
            _ => Self::Free,
        }
    }
}

/// What the sweep does with a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sweep {
    /// Nothing.
    Keep,
    /// Takes it out of `FLOWS`: its handshake was not finished in time.
    Abandon,
    /// The same: it has ended long enough ago.
    Forget,
    /// The same, and notifies the daemon: it was open, and silent for too long.
    Expire,
    /// Makes it free.
    Release,
}

/// How much of a resource is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// Less than half of it.
    Low,
    /// Less than three quarters.
    Medium,
    /// Less than seven eighths.
    High,
    /// More.
    Full,
}

impl Pressure {
    /// Of `used` of `capacity`.
    #[must_use]
    #[inline(always)]
    pub const fn of(used: u32, capacity: u32) -> Self {
        if used < capacity / 2 {
            Self::Low
        } else if used < capacity / 4 * 3 {
            Self::Medium
        } else if used < capacity / 8 * 7 {
            Self::High
        } else {
            Self::Full
        }
    }
}

const SECOND: u64 = 1_000_000_000;

/// How long a handshake may take: longer than a client tries (`tcp_syn_retries`). With many of them, as in a flood of SYNs, only as
/// long as a client that exists needs.
#[must_use]
#[inline(always)]
const fn opening_ns(pressure: Pressure) -> u64 {
    match pressure {
        Pressure::Low => 60 * SECOND,
        Pressure::Medium => 5 * SECOND,
        Pressure::High | Pressure::Full => 2 * SECOND,
    }
}

/// How long an ended connection stays, so that segments that are sent again find it. While the backend is in TIME_WAIT, no other
/// client's may have its port, which is why that time is not shortened.
#[must_use]
#[inline(always)]
const fn ended_ns(pressure: Pressure, no_time_wait: bool) -> u64 {
    match (pressure, no_time_wait) {
        (Pressure::Low, _) | (_, false) => Flow::TIME_WAIT_NS,
        (Pressure::Medium, true) => 30 * SECOND,
        (Pressure::High, true) => 10 * SECOND,
        // New connections are worth more than retransmissions of old ones.
        (Pressure::Full, true) => SECOND,
    }
}

/// How long a reset connection stays: what had been under way is over by then.
const RESET_NS: u64 = 10 * SECOND;

/// How long a refused handshake stays, and counts as one that is open: the client's next SYN goes to the socket because of it.
const REFUSED_NS: u64 = 4 * SECOND;

/// How long, in seconds, both sides may be silent while the client has not acknowledged all of a backend that has finished: the
/// backend sends it again meanwhile, unless it has given up.
const UNDELIVERED: u32 = 60;

/// Decides what the sweep does with a slot. `opening` is the pressure on handshakes, `slots` that on the map.
#[must_use]
#[inline(always)]
pub fn sweep(flow: &Flow, now_ns: u64, opening: Pressure, slots: Pressure) -> Sweep {
    let silent = now_ns.saturating_sub(flow.last_ns);
    match Phase::of(flow.phase) {
        Phase::Free => Sweep::Keep,
        Phase::Removed => Sweep::Release,
        Phase::Pending if flow.is(super::Flag::Refused) && silent > REFUSED_NS => Sweep::Abandon,
        Phase::Pending if silent > opening_ns(opening) => Sweep::Abandon,
        Phase::Pending => Sweep::Keep,
        Phase::Established if flow.is(super::Flag::Replaced) => Sweep::Forget,
        // The daemon has reset what the client had forgotten.
        Phase::Established if flow.is_reset() || (flow.is(super::Flag::Superseded) && !flow.closed()) => {
            if silent > RESET_NS {
                Sweep::Forget
            } else {
                Sweep::Keep
            }
        }
        Phase::Established if flow.closed() => {
            if silent > ended_ns(slots, flow.leaves_no_time_wait()) {
                Sweep::Forget
            } else {
                Sweep::Keep
            }
        }
        Phase::Established if silent > u64::from(flow.timeout()) * SECOND => Sweep::Expire,
        Phase::Established => Sweep::Keep,
    }
}

impl Flow {
    /// After how many seconds without a packet the connection is over, while it is open.
    #[must_use]
    #[inline(always)]
    pub const fn timeout(&self) -> u32 {
        let Timeouts { idle, half_closed, client_fin } = self.timeouts;
        let of_client = if self.is_delivered() { client_fin } else { UNDELIVERED };
        if self.is(super::Flag::BackendFin) {
            if half_closed < of_client { half_closed } else { of_client }
        } else if self.is(super::Flag::ClientFin) {
            half_closed
        } else {
            idle
        }
    }

    /// Whether it is over because the client stays after the backend has finished, once it is silent for too long.
    #[must_use]
    #[inline(always)]
    pub const fn waits_for_client_fin(&self) -> bool {
        self.is_delivered() && self.timeouts.client_fin <= self.timeouts.half_closed
    }

    /// Whether the backend has finished, and the client has acknowledged all of it.
    const fn is_delivered(&self) -> bool {
        self.is(super::Flag::BackendFin) && self.backend.is_acked()
    }
}
