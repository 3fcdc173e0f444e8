//! Durations as text, in the configuration and on the command line.

use std::time::Duration;

/// Longer values are mistakes, and adding them to a clock could overflow.
const MAX_DURATION: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why a text is not a valid duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DurationError {
    /// Not a number with a unit.
    #[error("must be a duration such as 30s, \"1m 30s\" or 250ms")]
    NotADuration,
    /// Longer than seven days.
    #[error("must be at most 7days")]
    TooLong,
}

/// Parses `30s`, `1m 30s` or `250ms`, up to seven days.
///
/// # Errors
/// [`DurationError`].
pub fn parse_duration(text: &str) -> Result<Duration, DurationError> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration > MAX_DURATION => Err(DurationError::TooLong),
        Ok(duration) => Ok(duration),
        Err(_) => Err(DurationError::NotADuration),
    }
}
