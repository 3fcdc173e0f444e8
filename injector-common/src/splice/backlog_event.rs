//! When the program `verdict` notifies the daemon to check a backlog.

/// Bytes after which a flow sends its first [`BacklogEvent`]: the backlog that a stalled target can
/// build up unnoticed.
pub const FIRST_NOTIFY: u64 = 64 * 1024;

/// When a flow that has carried `redirected` bytes sends its next [`BacklogEvent`]: after as many
/// bytes again, at most `step`. Long streams send few events for their size, short ones none.
#[must_use]
#[inline(always)]
pub const fn next_notify(redirected: u64, step: u64) -> u64 {
    let more = if redirected < step { redirected } else { step };
    redirected.wrapping_add(more)
}

/// A record of the ring buffer `BACKLOG_EVENTS`: the daemon should check the backlog of this
/// direction's target.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BacklogEvent {
    /// The source's socket cookie.
    pub source: u64,
}
