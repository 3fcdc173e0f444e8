//! Kernel parameters of the calling thread's network namespace (`/proc/sys`).

use std::{fs, io, path::PathBuf};

/// The file of `key`.
#[must_use]
pub fn path(key: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(key)
}

/// The value of `key`, which has slashes: `net/ipv4/ip_forward`. Without white space at either end.
///
/// # Errors
/// As open(2) and read(2).
pub fn read(key: &str) -> io::Result<String> {
    Ok(fs::read_to_string(path(key))?.trim().to_owned())
}

/// Sets `key`, unless it has this value already. Returns whether it was changed.
///
/// # Errors
/// As open(2) and write(2); nothing needs to be written where the value is right.
pub fn set(key: &str, value: &str) -> io::Result<bool> {
    if read(key)? == value {
        return Ok(false);
    }
    fs::write(path(key), value)?;
    Ok(true)
}
