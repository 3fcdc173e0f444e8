//! Where maps and links are pinned, and who may use them.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use thiserror::Error;

use super::{
    installation::{self, Installation, Layout, Unreadable, VERSION},
    maps::PINNED,
};
use crate::{
    config::Inline as Settings,
    engine::attach::{
        device_pins::{self, namespace, pin_name},
        lock::{Lock, LockError, Name, lock_folder},
    },
    os::bpf,
    telemetry::log::target,
};

/// The folders for pins, locked for this process.
#[derive(Debug)]
pub struct PinPaths {
    /// The maps.
    pub maps: PathBuf,
    /// The links to devices, or the programs of filters.
    pub links: PathBuf,
    /// What other daemons left attached, with maps of their own.
    pub(super) others: Vec<Installation>,
    _lock: Lock,
}

/// Why the pins cannot be used.
#[derive(Debug, Error)]
pub enum PinError {
    /// Not in a BPF file system, or not writable.
    #[error(
        "{path}: {error}: inline.pin must be in a BPF file system (mount -t bpf bpf /sys/fs/bpf), and writable"
    )]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The kernel's error.
        error: io::Error,
    },
    /// Another process uses them.
    #[error(
        "another injector{} runs engine \"inline\" {place}: stop it first",
        process.map(|process| format!(" (process {process})")).unwrap_or_default()
    )]
    Busy {
        /// Its process id, if it is in the same PID namespace.
        process: Option<i32>,
        /// What it shares with this process.
        place: String,
    },
    /// What is attached cannot be read.
    #[error("reading what is attached to the devices: {0}")]
    Read(io::Error),
    /// An earlier injector's programs whose maps are out of reach.
    #[error(
        "program {program} of an earlier injector is attached to {device}, and its pins are in a BPF file system \
         that this process does not see: both would serve the same connections. Run `injector inline detach` \
         as root where they are visible, or here with CAP_SYS_ADMIN"
    )]
    Unreachable {
        /// Its name.
        program: String,
        /// Where it is attached.
        device: String,
    },
}

/// The folder for pins of this layout.
#[must_use]
pub fn folder(pin: &Path) -> PathBuf {
    pin.join(format!("v{VERSION}"))
}

/// Checks that pins can be made there. Changes nothing.
///
/// # Errors
/// [`PinError::Folder`].
pub fn check(pin: &Path) -> Result<(), PinError> {
    let failed = |error| PinError::Folder { path: pin.to_owned(), error };
    let there = pin.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    let found = rustix::fs::statfs(there).map_err(|error| failed(error.into()))?;
    if found.f_type == libc::BPF_FS_MAGIC {
        return Ok(());
    }
    Err(failed(io::Error::other(format!("{} is on another file system", there.display()))))
}

/// Makes the folders, locks them, and finds what other daemons left attached in this network
/// namespace. Maps of this layout that are pinned elsewhere are taken over, with their connections.
///
/// # Errors
/// [`PinError`]. Nothing that was attached has changed then.
pub fn prepare(settings: &Settings) -> Result<PinPaths, PinError> {
    check(&settings.pin)?;
    let own = folder(&settings.pin);
    let (maps, links) = (own.join("maps"), own.join("links"));
    for folder in [&maps, &links] {
        fs::create_dir_all(folder).map_err(|error| PinError::Folder { path: folder.clone(), error })?;
    }
    let lock = Lock::take(&LOCK, &settings.pin)?;
    let mut others = Vec::new();
    let mut has_maps = fs::read_dir(&maps).is_ok_and(|mut maps| maps.next().is_some());
    let found = installation::find(&settings.pin).map_err(PinError::Read)?;
    if !has_maps {
        warn_of_unreadable(&found.unreadable);
    }
    for found in found.installations {
        if found.folder.as_ref() == Some(&own) {
            continue;
        }
        if let Some(root) =
            found.folder.as_deref().and_then(Path::parent).filter(|root| *root != settings.pin)
        {
            // Nothing else holds it; a daemon that starts meanwhile finds the namespace locked.
            drop(lock_folder(&LOCK, root)?);
        }
        if found.maps.is_empty() {
            return Err(unreachable(&found));
        }
        if found.layout == Layout::Own && !has_maps {
            take_over(&found, &maps, &links)
                .map_err(|error| PinError::Folder { path: own.clone(), error })?;
            has_maps = true;
        } else {
            others.push(found);
        }
    }
    Ok(PinPaths { maps, links, others, _lock: lock })
}

/// Warns of programs that may be an earlier injector's, whose pins this process does not see.
pub(super) fn warn_of_unreadable(programs: &[Unreadable]) {
    let devices: BTreeSet<_> = programs.iter().map(|program| program.device_name.as_str()).collect();
    if devices.is_empty() {
        return;
    }
    let devices = devices.into_iter().collect::<Vec<_>>().join(", ");
    tracing::warn!(target: target::ENGINE_INLINE, devices, "other BPF programs are attached, and this process may not read what they are (CAP_SYS_ADMIN). If they are an injector's whose pins were elsewhere, they may still open connections: remove them with `injector inline detach` as root, in Kubernetes with deploy/kubernetes/detach");
}

/// Why an installation without maps cannot stay.
fn unreachable(found: &Installation) -> PinError {
    let (program, device) = match (found.filters.first(), found.links.first()) {
        (Some(filter), _) => (filter.name().to_owned(), filter.device_name.clone()),
        (None, Some(link)) => (format!("with id {}", link.program), link.device_name.clone()),
        (None, None) => (String::new(), String::new()),
    };
    PinError::Unreachable { program, device }
}

/// Gives maps and links of this layout the configured place.
fn take_over(found: &Installation, maps: &Path, links: &Path) -> io::Result<()> {
    // Maps that are not pinned are for the programs' own use.
    for (name, map) in found.maps.iter().filter(|(name, _)| PINNED.contains(&name.as_str())) {
        bpf::pin(map.as_fd(), &maps.join(name))?;
    }
    let namespace = namespace()?;
    for link in &found.links {
        device_pins::replace_pin(link.link.as_fd(), &links.join(pin_name(namespace, link.device)))?;
    }
    found.remove_pins()?;
    let from = found.place();
    tracing::info!(target: target::ENGINE_INLINE, from, to = %maps.display(), "maps and links of an earlier injector were taken over, with their connections");
    Ok(())
}

/// The lock of the engine.
pub(super) const LOCK: Name = Name { socket: b"injector/engine.inline", setting: "inline.pin" };

impl From<LockError> for PinError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Busy { process, place } => Self::Busy { process, place },
            LockError::Folder { path, error } => Self::Folder { path, error },
        }
    }
}
