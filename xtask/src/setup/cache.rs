//! The folder of the tools that setup installs: outside `target/`, so that all clones share it.

use std::{
    fs::{self, File, TryLockError},
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use injector_testbed::tools;

/// The tool cache: one folder per tool, version and LLVM major, the logs, and the file that the
/// build script reads.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The cache that the environment names ([`tools::folder`]). Creates nothing.
    pub(super) fn locate() -> Result<Self> {
        Ok(Self { folder: tools::folder()? })
    }

    /// The folder of one tool.
    pub(super) fn tool(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A new folder beside the tools, to install into. The finished tool is then renamed into its
    /// place.
    pub(super) fn partial(&self) -> Result<tempfile::TempDir> {
        tempfile::Builder::new()
            .prefix(PARTIAL)
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in(&self.folder)
            .with_context(|| format!("cannot create a folder in {}", self.folder.display()))
    }

    /// The log of the command called `name`.
    pub(super) fn log(&self, name: &str) -> Result<PathBuf> {
        let logs = self.folder.join("logs");
        fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
        Ok(logs.join(format!("{name}.log")))
    }

    /// Creates the cache and locks it until the file is dropped.
    pub(super) fn lock(&self) -> Result<File> {
        let path = self.folder.join("setup.lock");
        let file = fs::create_dir_all(&self.folder)
            .and_then(|()| File::create(&path))
            .with_context(|| format!("cannot write to the tool cache {}", self.folder.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("setup: waiting for another setup …");
                file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        self.sweep();
        Ok(file)
    }

    /// Removes leftovers of a killed setup, which no running setup can use while the lock is held.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(PARTIAL)
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                eprintln!("setup: cannot remove {}: {error}", entry.path().display());
            }
        }
    }

    /// Writes the file that injector-user's build script reads. An unchanged file keeps its time,
    /// so cargo does not build again.
    pub(super) fn record(&self, text: &str) -> Result<()> {
        let path = self.folder.join("bpf-toolchain.env");
        if fs::read_to_string(&path).is_ok_and(|old| old == text) {
            return Ok(());
        }
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(&self.folder)?;
            let readable = fs::Permissions::from_mode(0o644);
            let mut builder = tempfile::Builder::new();
            let mut file =
                builder.prefix(".bpf-toolchain").permissions(readable).tempfile_in(&self.folder)?;
            file.write_all(text.as_bytes())?;
            file.persist(&path)?;
            Ok(())
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Moves a finished folder to its place in the cache, over an older one.
pub(super) fn replace(finished: &Path, place: &Path) -> Result<()> {
    if place.exists() {
        fs::remove_dir_all(place).with_context(|| format!("cannot remove {}", place.display()))?;
    }
    fs::rename(finished, place).with_context(|| format!("cannot create {}", place.display()))
}

const PARTIAL: &str = ".partial-";

/// A cache of its own, for a test.
#[cfg(test)]
pub(super) fn scratch() -> (tempfile::TempDir, Cache) {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let cache = Cache { folder: temporary.path().to_path_buf() };
    (temporary, cache)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("tools");
        (temporary, Cache { folder })
    }

    #[test]
    fn leftovers_of_a_killed_setup_are_removed_and_tools_kept() {
        let (_temporary, cache) = cache();
        drop(cache.lock().unwrap());
        let left = cache.partial().unwrap().keep();
        fs::create_dir(cache.tool("bpf-linker-1-llvm22")).unwrap();
        drop(cache.lock().unwrap());
        assert!(!left.exists());
        assert!(cache.tool("bpf-linker-1-llvm22").exists());
    }

    #[test]
    fn an_unchanged_record_is_not_written_again() {
        let (_temporary, cache) = cache();
        cache.record("TOOLCHAIN=a\n").unwrap();
        let path = cache.tool("bpf-toolchain.env");
        let written = fs::metadata(&path).unwrap().modified().unwrap();
        cache.record("TOOLCHAIN=a\n").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);
        cache.record("TOOLCHAIN=b\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "TOOLCHAIN=b\n");
    }
}
