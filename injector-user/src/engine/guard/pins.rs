//! Where the guard's maps and links are pinned, and who may use them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use thiserror::Error;

use crate::engine::attach::lock::{Lock, LockError, Name};

/// The lock of the guard.
pub(super) const LOCK: Name = Name { socket: b"injector/guard", setting: "guard.pin" };

/// The folder for pins of this layout of the maps. Its name must not be one that engine inline's pins have.
const LAYOUT: &str = "layout1";
/// How the names of such folders begin.
const LAYOUTS: &str = "layout";

/// The folders for pins, locked for this process.
#[derive(Debug)]
pub(super) struct Pins {
    /// The maps.
    pub(super) maps: PathBuf,
    /// The links to devices, or the programs of filters.
    pub(super) links: PathBuf,
    _lock: Lock,
}

/// Why the pins cannot be used.
#[derive(Debug, Error)]
pub enum PinError {
    /// Not in a BPF file system, or not writable.
    #[error(
        "{path}: {error}: guard.pin must be in a BPF file system (mount -t bpf bpf /sys/fs/bpf), and writable"
    )]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The kernel's error.
        error: io::Error,
    },
    /// Another process uses them.
    #[error(
        "another injector{} has [guard] {place}: stop it first",
        process.map(|process| format!(" (process {process})")).unwrap_or_default()
    )]
    Busy {
        /// Its process id, if it is in the same PID namespace.
        process: Option<i32>,
        /// What it shares with this process.
        place: String,
    },
}

impl From<LockError> for PinError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Busy { process, place } => Self::Busy { process, place },
            LockError::Folder { path, error } => Self::Folder { path, error },
        }
    }
}

/// Makes the folders, and locks them.
///
/// # Errors
/// [`PinError`].
pub(super) fn prepare(pin: &Path) -> Result<Pins, PinError> {
    let folder = pin.join(LAYOUT);
    let [maps, links] = ["maps", "links"].map(|part| folder.join(part));
    let failed = |path: &Path| {
        let path = path.to_owned();
        |error| PinError::Folder { path, error }
    };
    let there = pin.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    let found = rustix::fs::statfs(there).map_err(io::Error::from).map_err(failed(pin))?;
    if found.f_type != libc::BPF_FS_MAGIC {
        let error = io::Error::other(format!("{} is on another file system", there.display()));
        return Err(failed(pin)(error));
    }
    for part in [&maps, &links] {
        fs::create_dir_all(part).map_err(failed(part))?;
    }
    let lock = Lock::take(&LOCK, pin)?;
    Ok(Pins { maps, links, _lock: lock })
}

/// The folders that daemons left under this one, of any layout.
pub(super) fn folders(pin: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(pin) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut folders = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(LAYOUTS)) {
            folders.push(entry.path());
        }
    }
    Ok(folders)
}
