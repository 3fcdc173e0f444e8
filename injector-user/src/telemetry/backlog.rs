//! The backlog in the kernel, summed over all connections.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

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
    pub(crate) fn share(&self) -> Share {
        Share { ledger: self.clone(), bytes: 0 }
    }
}

/// One direction's part of the sum, given back when dropped.
#[derive(Debug)]
pub(crate) struct Share {
    ledger: Ledger,
    bytes: u64,
}

impl Share {
    /// Replaces what was said before; returns the new sum.
    pub(crate) fn set(&mut self, bytes: u64) -> u64 {
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
