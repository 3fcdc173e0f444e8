//! Waiting for a condition.

use std::fmt::Debug;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::sockets::LIMIT;

/// How often the value is read.
const INTERVAL: Duration = Duration::from_millis(20);

/// Reads a value until `accept` accepts it, for at most [`LIMIT`], and returns it.
///
/// # Errors
/// When no value is accepted in time; the error has the last value, or the last error of `read`.
pub fn wait_until<T: Debug>(
    what: &str,
    mut read: impl FnMut() -> anyhow::Result<T>,
    accept: impl Fn(&T) -> bool,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match read() {
            Ok(value) if accept(&value) => return Ok(value),
            value if Instant::now() > deadline => bail!("{what}: still {value:?}"),
            _ => thread::sleep(INTERVAL),
        }
    }
}
