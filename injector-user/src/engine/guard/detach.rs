//! Removes everything that the guard left in the kernel.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
};

use thiserror::Error;

use super::{
    attach::SET,
    pins::{self, LOCK, PinError},
};
use crate::engine::attach::{device_pins, lock::Lock, remove_filters, routes};

/// Why something that the guard left was not removed.
#[derive(Debug, Error)]
pub enum DetachError {
    /// A daemon uses it.
    #[error(
        "{0}; or remove it all the same with --force: then listeners reset connections of banned sources"
    )]
    Running(PinError),
    /// What is there cannot be read.
    #[error("{path}: {error}")]
    Read {
        /// The folder.
        path: PathBuf,
        /// The kernel's error.
        error: io::Error,
    },
    /// Something stays.
    #[error("not removed: {}", .0.join("; "))]
    Left(Vec<String>),
}

/// Removes what is pinned under `pin`, and what is attached by it. Returns what was removed.
///
/// # Errors
/// What could not be removed; everything else is. Nothing is, unless `force`, while a daemon runs.
pub fn detach(pin: &Path, force: bool) -> Result<Vec<String>, DetachError> {
    let failed = |error| DetachError::Read { path: pin.to_owned(), error };
    let folders = pins::folders(pin).map_err(failed)?;
    if folders.is_empty() {
        return Ok(Vec::new());
    }
    let _lock = match Lock::take_existing(&LOCK, pin).map_err(PinError::from) {
        Err(error @ PinError::Busy { .. }) if !force => return Err(DetachError::Running(error)),
        lock => lock.ok(),
    };
    let (mut removed, mut failures) = (Vec::new(), Vec::new());
    let mut note = |what: String, outcome: Result<bool, String>| match outcome {
        Ok(true) => removed.push(what),
        Ok(false) => {}
        Err(error) => failures.push(format!("{what}: {error}")),
    };
    for interface in routes::interfaces().map_err(failed)? {
        let outcome = remove_filters(interface.index, &interface.name, &SET, &HashSet::new());
        note(format!("filter of {}", interface.name), outcome.map_err(|error| error.to_string()));
    }
    for folder in folders {
        for part in fs::read_dir(&folder).into_iter().flatten().flatten().map(|part| part.path()) {
            for entry in fs::read_dir(&part).into_iter().flatten().flatten() {
                let path = entry.path();
                note(
                    path.display().to_string(),
                    device_pins::remove(&path).map_err(|error| error.to_string()),
                );
            }
            note(part.display().to_string(), remove_folder(&part));
        }
        note(folder.display().to_string(), remove_folder(&folder));
    }
    // It may be another's, too.
    if let Ok(true) = remove_folder(pin) {
        note(pin.display().to_string(), Ok(true));
    }
    if failures.is_empty() { Ok(removed) } else { Err(DetachError::Left(failures)) }
}

fn remove_folder(folder: &Path) -> Result<bool, String> {
    match fs::remove_dir(folder) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.to_string()),
    }
}
