//! How long a client may stay once its backend has finished. Pure.

use std::time::{Duration, Instant};

/// How often the client's send queue is checked while it holds bytes of the finished backend.
const DELIVERY_CHECK: Duration = Duration::from_secs(1);

/// The state of a connection of which one side has finished.
#[derive(Debug)]
pub(super) struct FinWait {
    /// When this side has finished.
    since: Instant,
    /// When the client was first seen to have acknowledged every byte, and the FIN.
    delivered: Option<Instant>,
    /// What both peers had acknowledged at the last check. It starts at an arbitrary value.
    acked: Option<u64>,
    /// The time from the last check to the next.
    next_check: Duration,
}

impl FinWait {
    /// `limit` is the client's time.
    pub(super) fn new(now: Instant, limit: Duration) -> Self {
        Self { since: now, delivered: None, acked: None, next_check: DELIVERY_CHECK.min(limit) }
    }

    /// The time from the last check to the next.
    pub(super) fn next_check(&self) -> Duration {
        self.next_check
    }

    /// Time since one side has finished.
    pub(super) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }

    /// Whether the peers have acknowledged something since the last check: a slow reader is active
    /// although no byte is read or written.
    pub(super) fn progress(&mut self, acked: u64) -> bool {
        self.acked.replace(acked).is_some_and(|before| before != acked)
    }

    /// Measures `limit` from the delivery of the backend's last byte, or from `active` if that is
    /// later. `unacknowledged` is the length of the client's send queue, in which a FIN counts as
    /// one byte. Returns whether the client's time is over.
    pub(super) fn is_over(
        &mut self,
        now: Instant,
        unacknowledged: u64,
        active: Option<Instant>,
        limit: Duration,
    ) -> bool {
        if unacknowledged > 0 && self.delivered.is_none() {
            self.next_check = DELIVERY_CHECK.min(limit);
            return false;
        }
        let delivered = *self.delivered.get_or_insert(now);
        let start = active.map_or(delivered, |active| active.max(delivered));
        self.next_check = limit.saturating_sub(now.saturating_duration_since(start));
        self.next_check.is_zero()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(15);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Checks `after` seconds from `start`: whether the time is over, and the seconds to the next check.
    fn check(
        wait: &mut FinWait,
        (start, after): (Instant, u64),
        unacknowledged: u64,
        active: Option<Instant>,
    ) -> (bool, u64) {
        let over = wait.is_over(start + seconds(after), unacknowledged, active, LIMIT);
        (over, wait.next_check().as_secs())
    }

    #[test]
    fn the_time_counts_from_the_delivery() {
        let start = Instant::now();
        let mut wait = FinWait::new(start, LIMIT);
        assert_eq!(check(&mut wait, (start, 100), 1, None), (false, 1));
        assert_eq!(check(&mut wait, (start, 200), 0, None), (false, 15));
        assert_eq!(check(&mut wait, (start, 214), 0, None), (false, 1));
        assert_eq!(check(&mut wait, (start, 215), 0, None), (true, 0));
    }

    #[test]
    fn later_activity_restarts_the_time_where_it_counts() {
        let start = Instant::now();
        let mut wait = FinWait::new(start, LIMIT);
        let active = Some(start + seconds(10));
        assert_eq!(check(&mut wait, (start, 1), 0, Some(start)), (false, 15));
        assert_eq!(check(&mut wait, (start, 16), 0, active), (false, 9));
        assert_eq!(check(&mut wait, (start, 25), 0, active), (true, 0));
    }

    #[test]
    fn acknowledgements_are_progress() {
        let mut wait = FinWait::new(Instant::now(), LIMIT);
        assert_eq!([5, 5, 9, 9].map(|acked| wait.progress(acked)), [false, false, true, false]);
    }

    proptest! {
        /// A client is never closed before its time after the delivery is over, and always is then,
        /// at the latest one check later.
        #[test]
        fn a_client_has_exactly_its_time(delivered in 0..500_u64, limit in 1..120_u64) {
            let (start, limit) = (Instant::now(), seconds(limit));
            let mut wait = FinWait::new(start, limit);
            let (mut now, end) = (start, start + seconds(delivered));
            while !wait.is_over(now, u64::from(now < end), None, limit) {
                now += wait.next_check();
            }
            prop_assert!(now >= end + limit);
            prop_assert!(now <= end + limit + DELIVERY_CHECK);
        }
    }
}
