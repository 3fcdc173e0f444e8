//! How long to wait after failed requests. Pure.

use std::time::Duration;

/// A short one: when the API is back, mail should follow its pods soon.
const LONGEST: Duration = Duration::from_secs(4);

/// The time to wait after the next failure. It doubles with each one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backoff {
    first: Duration,
    next: Duration,
}

impl Backoff {
    pub(super) const fn new(first: Duration) -> Self {
        Self { first, next: first }
    }

    /// The time to wait now. `random`, from 0 to 1, shortens it by up to a quarter, so that many
    /// injectors do not ask at once.
    pub(super) fn after_failure(&mut self, random: f64) -> Duration {
        let wait = self.next;
        self.next = (2 * wait).min(LONGEST);
        wait.mul_f64(1.0 - random.clamp(0.0, 1.0) / 4.0)
    }

    /// The API answers again.
    pub(super) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_up_to_the_longest() {
        let mut backoff = Backoff::new(Duration::from_millis(500));
        let waits: Vec<_> = (0..7).map(|_| backoff.after_failure(0.0).as_millis()).collect();
        assert_eq!(waits, [500, 1000, 2000, 4000, 4000, 4000, 4000]);
        assert_eq!(backoff.after_failure(1.0).as_millis(), 3000);
        backoff.reset();
        assert_eq!(backoff.after_failure(0.5).as_micros(), 437_500);
    }
}
