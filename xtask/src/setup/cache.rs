//! The folder of the tools that setup installs: outside `target/`, so that all clones share it.

use std::{
    env,
    ffi::OsString,
    fs::{self, File, TryLockError},
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

/// The tool cache: one folder per tool, version and LLVM major, the logs, and the file that the
/// build script reads.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// `$INJECTOR_TOOLS`, else `$XDG_CACHE_HOME/injector/tools`, else `~/.cache/injector/tools`.
    /// Creates nothing.
    pub(super) fn locate() -> Result<Self> {
        let folder =
            folder(env::var_os("INJECTOR_TOOLS"), env::var_os("XDG_CACHE_HOME"), env::var_os("HOME"))?;
        Ok(Self { folder })
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

/// The cache's folder, by the same rule as in `injector-user/build.rs`. A build script runs in
/// another folder than xtask, so the path must be absolute. The XDG specification ignores relative
/// paths.
fn folder(tools: Option<OsString>, xdg_cache: Option<OsString>, home: Option<OsString>) -> Result<PathBuf> {
    if let Some(tools) = tools.filter(|path| !path.is_empty()).map(PathBuf::from) {
        if !tools.is_absolute() {
            bail!("INJECTOR_TOOLS={} must be an absolute path", tools.display());
        }
        return Ok(tools);
    }
    let absolute = |path: Option<OsString>| path.map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(xdg_cache)
        .or_else(|| absolute(home).map(|home| home.join(".cache")))
        .map(|cache| cache.join(Path::new("injector/tools")))
        .context("no folder for tools: set INJECTOR_TOOLS, XDG_CACHE_HOME or HOME")
}

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

    fn chosen(tools: &str, xdg: &str, home: &str) -> Result<PathBuf> {
        let set = |value: &str| (value != "unset").then(|| OsString::from(value));
        folder(set(tools), set(xdg), set(home))
    }

    #[test]
    fn the_most_specific_variable_decides() {
        for (tools, xdg, home, expected) in [
            ("/t", "/x", "/h", "/t"),
            ("unset", "/x", "/h", "/x/injector/tools"),
            ("", "/x", "/h", "/x/injector/tools"),
            ("unset", "relative", "/h", "/h/.cache/injector/tools"),
            ("unset", "unset", "/h", "/h/.cache/injector/tools"),
        ] {
            assert_eq!(chosen(tools, xdg, home).unwrap(), Path::new(expected), "{tools} {xdg} {home}");
        }
    }

    #[test]
    fn missing_and_relative_folders_are_rejected() {
        assert!(chosen("here", "/x", "/h").unwrap_err().to_string().contains("INJECTOR_TOOLS=here"));
        assert!(chosen("unset", "unset", "unset").is_err());
    }

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
