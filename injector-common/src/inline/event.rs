//! Events that the daemon receives.

/// What happened to a connection (records of the ring buffer `EVENTS`). The connection itself is read in `CONNECTIONS`: its slot is not
/// used again before the sweep has found it twice: for a second at least.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// One of [`Event::ENDED`] and those that follow it.
    pub kind: u32,
    /// The connection's index.
    pub slot: u32,
    /// Which of those that had this index ([`Flow::created_ns`](super::Flow::created_ns)).
    pub created_ns: u64,
}

impl Event {
    /// Both sides have finished, one has reset, or another connection of the same addresses has taken its place.
    pub const ENDED: u32 = 1;
    /// The backend has refused the SYN. Its source address is not verified.
    pub const REFUSED: u32 = 2;
    /// It was silent for too long while it was open: both ends are to be reset.
    pub const EXPIRED: u32 = 3;
}
