//! When the LAPI is asked next, and for what. Pure.

use std::time::Duration;

use crate::net::backoff::Backoff;

/// The longest time between two attempts while the LAPI is away.
const MAX_BACKOFF: Duration = Duration::from_secs(300);
/// The first attempt after a failure.
const MIN_BACKOFF: Duration = Duration::from_secs(1);
/// How often all decisions are asked for, although deltas work. Heals what a delta cannot tell: an end that came nearer, a
/// ban that did not fit before, a second client with the same API key.
const RESYNC: Duration = Duration::from_secs(6 * 3600);

/// What has happened so far.
#[derive(Debug)]
pub(super) struct Schedule {
    interval: Duration,
    /// The pauses after failures.
    backoff: Backoff,
    /// When all decisions were read last; `None` if what came since then may be incomplete.
    complete: Option<Duration>,
}

impl Schedule {
    pub(super) const fn new(interval: Duration) -> Self {
        Self { interval, backoff: Backoff::new(MIN_BACKOFF, MAX_BACKOFF), complete: None }
    }

    /// Whether to ask for all decisions, at this time since the start.
    ///
    /// After any failure, because the LAPI may have counted the changes of a lost answer as delivered; and because a LAPI
    /// that was away may have forgotten decisions that were deleted meanwhile.
    pub(super) fn asks_for_all(&self, now: Duration) -> bool {
        self.complete.is_none_or(|at| now.saturating_sub(at) >= RESYNC)
    }

    /// An answer was applied.
    pub(super) const fn succeeded(&mut self, all: bool, now: Duration) {
        self.backoff.reset();
        if all {
            self.complete = Some(now);
        }
    }

    /// No answer was applied.
    pub(super) const fn failed(&mut self) {
        self.backoff.failed();
        self.complete = None;
    }

    /// Whether the last attempt failed.
    pub(super) const fn is_failing(&self) -> bool {
        self.backoff.is_failing()
    }

    /// How long to wait. `random` is as in [`Backoff::wait`].
    pub(super) fn delay(&self, random: f64) -> Duration {
        self.backoff.wait(random).unwrap_or(self.interval)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn deltas_follow_a_full_answer_until_the_next_failure() {
        let mut schedule = Schedule::new(SECOND * 10);
        assert!(schedule.asks_for_all(SECOND));
        schedule.succeeded(true, SECOND);
        assert!(!schedule.asks_for_all(SECOND * 11));
        schedule.succeeded(false, SECOND * 11);
        let six_hours = SECOND * 6 * 3600;
        assert!(!schedule.asks_for_all(six_hours));
        assert!(schedule.asks_for_all(six_hours + SECOND));
        schedule.failed();
        assert!(schedule.asks_for_all(SECOND * 12) && schedule.is_failing());
        schedule.succeeded(true, SECOND * 12);
        assert!(!schedule.asks_for_all(SECOND * 13) && !schedule.is_failing());
    }

    #[test]
    fn attempts_become_rare_but_never_rarer_than_five_minutes() {
        let mut schedule = Schedule::new(SECOND * 10);
        assert_eq!(schedule.delay(0.5), SECOND * 10);
        let mut delays = Vec::new();
        for _ in 0..40 {
            schedule.failed();
            delays.push(schedule.delay(0.0).as_secs());
        }
        assert_eq!(delays[..10], [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]);
        assert!(delays[10..].iter().all(|delay| *delay == 300));
        schedule.succeeded(true, SECOND);
        assert_eq!(schedule.delay(1.0), SECOND * 10);
    }
}
