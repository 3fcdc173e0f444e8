//! Waiting for something in the cluster. An interruption ends every wait.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use crate::interruption::is_interrupted;

/// How often a condition is checked.
const INTERVAL: Duration = Duration::from_millis(50);

/// Asks until there is an answer.
///
/// # Errors
/// After the limit, after an interruption, and when the question fails.
pub(super) fn wait<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if is_interrupted() {
            bail!("interrupted");
        }
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("waited {limit:.0?} for {what}");
        }
        thread::sleep(INTERVAL);
    }
}

/// Lets time pass.
///
/// # Errors
/// After an interruption.
pub(super) fn pause(duration: Duration) -> Result<()> {
    let end = Instant::now() + duration;
    while Instant::now() < end {
        if is_interrupted() {
            bail!("interrupted");
        }
        thread::sleep(INTERVAL.min(duration));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_the_wait_and_a_limit_names_what_was_awaited() {
        let mut asked = 0;
        let answer = wait("three", Duration::from_secs(5), || {
            asked += 1;
            Ok((asked == 3).then_some(asked))
        });
        assert_eq!(answer.unwrap(), 3);
        let error = wait::<()>("a pod", Duration::ZERO, || Ok(None)).unwrap_err();
        assert!(error.to_string().contains("a pod"), "{error}");
    }
}
