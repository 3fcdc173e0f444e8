//! When the LAPI is asked next, and for what. Pure.

use std::time::Duration;

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
    /// Failures since the last success.
    failures: u32,
    /// When all decisions were read last; `None` if what came since then may be incomplete.
    complete: Option<Duration>,
}

impl Schedule {
    pub(super) const fn new(interval: Duration) -> Self {
        Self { interval, failures: 0, complete: None }
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
        self.failures = 0;
        if all {
            self.complete = Some(now);
        }
    }

    /// No answer was applied.
    pub(super) const fn failed(&mut self) {
        self.failures = self.failures.saturating_add(1);
        self.complete = None;
    }

    /// Whether the last attempt failed.
    pub(super) const fn is_failing(&self) -> bool {
        self.failures > 0
    }

    /// How long to wait. `jitter` is from 0 to 1; it spreads attempts of many edges by a quarter.
    pub(super) fn delay(&self, jitter: f64) -> Duration {
        let Some(doublings) = self.failures.checked_sub(1) else { return self.interval };
        let delay = MIN_BACKOFF.saturating_mul(1 << doublings.min(16)).min(MAX_BACKOFF);
        delay.mul_f64(0.75 + jitter.clamp(0.0, 1.0) / 4.0)
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
        assert!(!schedule.asks_for_all(RESYNC));
        assert!(schedule.asks_for_all(RESYNC + SECOND));
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
            assert!(schedule.delay(0.0) >= schedule.delay(1.0).mul_f64(0.74));
            delays.push(schedule.delay(1.0).as_secs());
        }
        assert_eq!(delays[..10], [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]);
        assert!(delays[10..].iter().all(|delay| *delay == 300));
        schedule.succeeded(true, SECOND);
        assert_eq!(schedule.delay(1.0), SECOND * 10);
    }
}
