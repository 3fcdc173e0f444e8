//! The backlog in the kernel, summed over all connections.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Bytes queued in the kernel over all connections, as of each direction's last check.
#[derive(Clone, Debug, Default)]
pub struct BacklogTotal(Arc<AtomicU64>);

impl BacklogTotal {
    /// The sum of all shares.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// A share for one direction, which starts at zero.
    pub(crate) fn share(&self) -> BacklogShare {
        BacklogShare { total: self.clone(), bytes: 0 }
    }
}

/// One direction's part of the sum. Dropping it subtracts the part.
#[derive(Debug)]
pub(crate) struct BacklogShare {
    total: BacklogTotal,
    bytes: u64,
}

impl BacklogShare {
    /// Replaces the previous value; returns the new sum.
    pub(crate) fn set(&mut self, bytes: u64) -> u64 {
        let change = bytes.wrapping_sub(self.bytes);
        self.bytes = bytes;
        self.total.0.fetch_add(change, Ordering::Relaxed).wrapping_add(change)
    }
}

impl Drop for BacklogShare {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_the_sum_of_the_live_shares() {
        let total = BacklogTotal::default();
        let (mut one, mut two) = (total.share(), total.share());
        assert_eq!(one.set(70), 70);
        assert_eq!(two.set(50), 120);
        assert_eq!(one.set(20), 70);
        drop(two);
        assert_eq!(total.bytes(), 20);
        drop(one);
        assert_eq!(total.bytes(), 0);
    }
}
