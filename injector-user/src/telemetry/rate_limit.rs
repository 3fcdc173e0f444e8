//! Warnings that repeat with every connection, logged with limited frequency.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The least time between two lines of a warning.
pub const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Allows a line, and counts those that it suppresses until the next.
#[derive(Debug, Default)]
pub struct RateLimit(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    suppressed: u64,
}

impl RateLimit {
    /// Whether to log now, with the number of occurrences since the last line, this one included.
    /// `None`: not now.
    #[must_use]
    pub fn allow(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *state;
        state.suppressed += 1;
        if state.last.is_some_and(|last| now.saturating_duration_since(last) < WARNING_INTERVAL) {
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_in_an_interval_counts_all_since_the_last() {
        let (limit, start) = (RateLimit::default(), Instant::now());
        let at = |seconds| limit.allow(start + Duration::from_secs(seconds));
        assert_eq!([0, 1, 59, 60, 61, 200].map(at), [Some(1), None, None, Some(3), None, Some(2)]);
    }
}
