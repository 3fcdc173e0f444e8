//! The backpressure decision: what to do with a direction whose target does not keep up. Pure.

use crate::config::Watermarks;

/// What to do with a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BackpressureAction {
    /// The target keeps up.
    Continue,
    /// Stop redirecting until the target has caught up, then forward in user space.
    Pause,
    /// Reset the connection: the kernel holds too much for all connections together.
    Reset,
}

/// Decides for a direction with a backlog of `own` bytes, while all connections together have
/// `total`.
pub(super) fn decide_backpressure(watermarks: &Watermarks, own: u64, total: u64) -> BackpressureAction {
    if total > watermarks.total_limit && own > watermarks.low {
        return BackpressureAction::Reset;
    }
    if own > watermarks.high || (total > watermarks.total_high && own > watermarks.low) {
        return BackpressureAction::Pause;
    }
    BackpressureAction::Continue
}

#[cfg(test)]
mod tests {
    use super::*;

    const WATERMARKS: Watermarks = Watermarks { high: 100, low: 10, total_high: 1000, total_limit: 2000 };

    #[test]
    fn a_direction_is_paused_above_its_high_watermark() {
        for (own, expected) in [
            (0, BackpressureAction::Continue),
            (100, BackpressureAction::Continue),
            (101, BackpressureAction::Pause),
        ] {
            assert_eq!(decide_backpressure(&WATERMARKS, own, own), expected, "{own}");
        }
    }

    #[test]
    fn above_the_total_watermark_directions_with_a_backlog_are_paused() {
        assert_eq!(decide_backpressure(&WATERMARKS, 10, 1001), BackpressureAction::Continue);
        assert_eq!(decide_backpressure(&WATERMARKS, 11, 1001), BackpressureAction::Pause);
    }

    #[test]
    fn above_the_total_limit_directions_with_a_backlog_are_reset() {
        assert_eq!(decide_backpressure(&WATERMARKS, 10, 2001), BackpressureAction::Continue);
        assert_eq!(decide_backpressure(&WATERMARKS, 11, 2001), BackpressureAction::Reset);
    }
}
