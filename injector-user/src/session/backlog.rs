//! How much may wait in the kernel for targets that do not keep up, and what is done above that: pure decisions.

use crate::config::Watermarks;

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
pub(super) fn judge(watermarks: &Watermarks, own: u64, total: u64) -> Judgement {
    if total > watermarks.total_limit && own > watermarks.low {
        return Judgement::Reset;
    }
    if own > watermarks.high || (total > watermarks.total_high && own > watermarks.low) {
        return Judgement::Hold;
    }
    Judgement::Go
}

#[cfg(test)]
mod tests {
    use super::*;

    const WATERMARKS: Watermarks = Watermarks { high: 100, low: 10, total_high: 1000, total_limit: 2000 };

    #[test]
    fn one_direction_is_held_above_its_mark() {
        for (own, expected) in [(0, Judgement::Go), (100, Judgement::Go), (101, Judgement::Hold)] {
            assert_eq!(judge(&WATERMARKS, own, own), expected, "{own}");
        }
    }

    #[test]
    fn above_the_total_everybody_with_a_backlog_is_held() {
        assert_eq!(judge(&WATERMARKS, 10, 1001), Judgement::Go);
        assert_eq!(judge(&WATERMARKS, 11, 1001), Judgement::Hold);
    }

    #[test]
    fn above_the_limit_everybody_with_a_backlog_is_reset() {
        assert_eq!(judge(&WATERMARKS, 10, 2001), Judgement::Go);
        assert_eq!(judge(&WATERMARKS, 11, 2001), Judgement::Reset);
    }
}
