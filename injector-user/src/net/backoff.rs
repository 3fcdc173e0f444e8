//! How long to wait after failed requests. Pure.

use std::time::Duration;

/// The time to wait, which doubles with each failure in a row.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    /// Waits for `first` after one failure, and never longer than `longest`.
    #[must_use]
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, failures: 0 }
    }

    /// A request failed.
    pub const fn failed(&mut self) {
        self.failures = self.failures.saturating_add(1);
    }

    /// A request succeeded.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }

    /// Whether the last request failed.
    #[must_use]
    pub const fn is_failing(&self) -> bool {
        self.failures > 0
    }

    /// The time to wait now; `None` unless the last request failed. `random`, from 0 to 1, shortens it by
    /// up to a quarter, so that many injectors do not ask at once.
    #[must_use]
    pub fn wait(&self, random: f64) -> Option<Duration> {
        let doublings = self.failures.checked_sub(1)?;
        let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
        let wait = self.first.saturating_mul(factor).min(self.longest);
        Some(wait.mul_f64(1.0 - random.clamp(0.0, 1.0) / 4.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_up_to_the_longest() {
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
        assert!(backoff.wait(0.0).is_none() && !backoff.is_failing());
        let mut waits = Vec::new();
        for _ in 0..40 {
            backoff.failed();
            waits.push(backoff.wait(0.0).unwrap().as_millis());
        }
        assert_eq!(waits[..6], [500, 1000, 2000, 4000, 8000, 10_000]);
        assert!(waits[6..].iter().all(|wait| *wait == 10_000) && backoff.is_failing());
        assert_eq!(backoff.wait(1.0), Some(Duration::from_millis(7500)));
        backoff.reset();
        backoff.failed();
        assert_eq!(backoff.wait(0.5), Some(Duration::from_micros(437_500)));
    }
}
