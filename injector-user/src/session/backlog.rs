//! How much may wait in the kernel for targets that do not keep up, and what is done above that: pure decisions, and
//! the sum over all connections.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::config::Marks;

/// What to do with a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Judgement {
    /// It keeps up.
    Go,
    /// Leave its source alone until the target has caught up, and go on in user space.
    Hold,
    /// Reset the connection: memory is running out.
    Reset,
}

/// What to do with a direction that has `own` bytes waiting, of `total` over all connections.
pub(super) fn judge(marks: &Marks, own: u64, total: u64) -> Judgement {
    if total > marks.total_limit && own > marks.low {
        return Judgement::Reset;
    }
    if own > marks.high || (total > marks.total_high && own > marks.low) {
        return Judgement::Hold;
    }
    Judgement::Go
}

/// Bytes waiting in the kernel over all connections, as far as they were looked at.
#[derive(Clone, Debug, Default)]
pub struct Ledger(Arc<AtomicU64>);

impl Ledger {
    /// The sum.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// A direction's part of it, which is nothing so far.
    pub(super) fn share(&self) -> Share {
        Share { ledger: self.clone(), bytes: 0 }
    }
}

/// One direction's part of the sum, given back when dropped.
#[derive(Debug)]
pub(super) struct Share {
    ledger: Ledger,
    bytes: u64,
}

impl Share {
    /// Replaces what was said before; returns the new sum.
    pub(super) fn set(&mut self, bytes: u64) -> u64 {
        let change = bytes.wrapping_sub(self.bytes);
        self.bytes = bytes;
        self.ledger.0.fetch_add(change, Ordering::Relaxed).wrapping_add(change)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKS: Marks = Marks { high: 100, low: 10, total_high: 1000, total_limit: 2000 };

    #[test]
    fn one_direction_is_held_above_its_mark() {
        for (own, expected) in [(0, Judgement::Go), (100, Judgement::Go), (101, Judgement::Hold)] {
            assert_eq!(judge(&MARKS, own, own), expected, "{own}");
        }
    }

    #[test]
    fn above_the_total_everybody_with_a_backlog_is_held() {
        assert_eq!(judge(&MARKS, 10, 1001), Judgement::Go);
        assert_eq!(judge(&MARKS, 11, 1001), Judgement::Hold);
    }

    #[test]
    fn above_the_limit_everybody_with_a_backlog_is_reset() {
        assert_eq!(judge(&MARKS, 10, 2001), Judgement::Go);
        assert_eq!(judge(&MARKS, 11, 2001), Judgement::Reset);
    }

    #[test]
    fn shares_add_up_and_are_given_back() {
        let ledger = Ledger::default();
        let (mut one, mut two) = (ledger.share(), ledger.share());
        assert_eq!(one.set(70), 70);
        assert_eq!(two.set(50), 120);
        assert_eq!(one.set(20), 70);
        drop(two);
        assert_eq!(ledger.total(), 20);
        drop(one);
        assert_eq!(ledger.total(), 0);
    }
}
