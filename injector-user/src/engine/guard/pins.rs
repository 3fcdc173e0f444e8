//! Where the guard's maps and links are pinned, and who may use them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use thiserror::Error;

use super::maps::ADDRESSES as BANNED;
use crate::{
    engine::attach::{
        device_pins::namespace,
        lock::{Lock, LockError, Name},
    },
    os::bpffs,
};

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
    /// The folder of this layout.
    pub(super) folder: PathBuf,
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
    Ok(Pins { maps, folder, links, _lock: lock })
}

/// The folders for pins, wherever they are, by which a guard has attached programs in this network namespace.
pub(super) fn in_use_here() -> io::Result<Vec<PathBuf>> {
    /// How deep in a BPF file system a pin folder may be.
    const MAX_DEPTH: u32 = 6;

    let own = format!("{}-", namespace()?);
    let mut found = Vec::new();
    let mut folders: Vec<_> = bpffs::mounts().into_iter().map(|root| (root, 0)).collect();
    while let Some((folder, depth)) = folders.pop() {
        if is_used_by(&folder, &own) {
            found.push(folder);
        } else if depth < MAX_DEPTH {
            folders.extend(subfolders(&folder).map(|inside| (inside, depth + 1)));
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// Whether a guard has pinned links under a folder whose names begin like this.
fn is_used_by(folder: &Path, own: &str) -> bool {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let is_own = |link: fs::DirEntry| link.file_name().to_str().is_some_and(|name| name.starts_with(own));
    folders(folder)
        .unwrap_or_default()
        .iter()
        .any(|layout| layout.join("maps").join(BANNED).exists() && entries(&layout.join("links")).any(is_own))
}

fn subfolders(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let is_folder = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.filter(is_folder).map(|entry| entry.path())
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
