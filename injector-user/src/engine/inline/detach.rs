//! Removes everything that the engine left in the kernel.

use std::{fs, io, path::Path};

use thiserror::Error;

use super::{
    installation::{self, Installation, entries, remove_folder},
    nat_rules,
    pins::{LOCK, PinError},
};
use crate::{
    engine::{attach::lock::Lock, bpf::chain},
    os::bpf,
};
use std::os::fd::AsFd as _;

/// Why something that the engine left was not removed.
#[derive(Debug, Error)]
pub enum DetachError {
    /// A daemon uses it.
    #[error(
        "{0}; or remove it all the same with --force: its connections break, and splice or relay serves new ones"
    )]
    Running(PinError),
    /// What is attached cannot be read.
    #[error("reading what is attached to the devices: {0}")]
    Read(io::Error),
    /// Something stays.
    #[error("not removed: {}; removed: {}", failures.join("; "), list_or_nothing(removed))]
    Left {
        /// What was removed.
        removed: Vec<String>,
        /// What was not, and why.
        failures: Vec<String>,
    },
}

fn list_or_nothing(names: &[String]) -> String {
    if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
}

/// What was removed, and what could not be.
#[derive(Debug, Default)]
struct Removal {
    removed: Vec<String>,
    failures: Vec<String>,
}

impl Removal {
    fn note<E: std::error::Error>(&mut self, what: String, outcome: Result<(), E>) {
        match outcome {
            Ok(()) => self.removed.push(what),
            Err(error) => self.failures.push(format!("{what}: {}", chain(&error))),
        }
    }
}

/// Removes everything of the engine, of any version: what is attached to devices of this network
/// namespace, wherever it is pinned, and what is pinned under `pin`. Connections through the engine
/// break.
///
/// # Errors
/// What could not be removed; everything else is. Nothing is, unless `force`, while a daemon runs.
pub fn detach(pin: &Path, force: bool) -> Result<Vec<String>, DetachError> {
    let _lock = match Lock::take_existing(&LOCK, pin).map_err(PinError::from) {
        Err(error @ PinError::Busy { .. }) if !force => return Err(DetachError::Running(error)),
        lock => lock.ok(),
    };
    let mut removal = Removal::default();
    for found in installation::find(pin).map_err(DetachError::Read)?.installations {
        remove(&mut removal, &found);
    }
    match nat_rules::delete() {
        Ok(tables) => removal.removed.extend(tables.into_iter().map(|table| format!("table inet {table}"))),
        Err(error) => removal.failures.push(format!("NAT tables: {error}")),
    }
    // What is attached by links and filters that could not be removed, and what the search missed.
    for left in installation::find(pin).map_err(DetachError::Read)?.installations {
        for name in left.attached() {
            removal.failures.push(format!("{name} is still attached"));
        }
    }
    let Removal { mut removed, failures } = removal;
    removed.sort();
    removed.dedup();
    if failures.is_empty() { Ok(removed) } else { Err(DetachError::Left { removed, failures }) }
}

fn remove(removal: &mut Removal, found: &Installation) {
    for filter in &found.filters {
        removal.note(filter.describe(), filter.filter.remove(&filter.device_name, filter.direction));
    }
    for link in &found.links {
        removal.note(link.describe(), bpf::detach_link(link.link.as_fd()));
    }
    let Some(folder) = &found.folder else { return };
    for part in ["links", "maps"] {
        let part = folder.join(part);
        for entry in entries(&part).unwrap_or_default() {
            let removed = fs::remove_file(entry.path());
            removal.note(entry.path().display().to_string(), removed);
        }
        if let Err(error) = remove_folder(&part) {
            removal.note(part.display().to_string(), Err(error));
        }
    }
    if let Err(error) = remove_folder(folder) {
        removal.note(folder.display().to_string(), Err(error));
    }
}
