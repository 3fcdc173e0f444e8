//! Landlock: what files the process may use from now on, whatever user it runs as (landlock(7), since
//! Linux 5.13).
//!
//! Rules belong to threads and are inherited, so this runs before the runtime starts any.
//!
//! A rule names a directory and holds for what is in it, also for files that are made later: a
//! configuration is replaced by renaming, and a rule for the file would not follow.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetError,
    RulesetStatus, path_beneath_rules,
};

/// The newest rights that are asked for: Linux 6.10 has `ioctl(2)` of devices. Older kernels enforce
/// those that they know.
const RIGHTS: ABI = ABI::V5;

/// What name lookups read (getaddrinfo(3)): settings and the libraries that they name, where
/// distributions have them. The kernel's own files: settings and counters of the network.
const SYSTEM: [&str; 13] = [
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/nix/store",
    "/gnu/store",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    "/proc",
    "/sys",
    "/dev/null",
    "/dev/urandom",
];

/// Directories, besides those of the system, that stay usable. Missing ones are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directories {
    /// Files in them can be read.
    pub read: Vec<PathBuf>,
    /// Files in them can be read, written, made and removed.
    pub write: Vec<PathBuf>,
    /// Files in them can be removed.
    pub remove: Vec<PathBuf>,
}

/// What the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enforced {
    /// All that was asked for.
    Fully,
    /// What this kernel knows.
    Partly,
    /// Nothing: the kernel has no Landlock, or it is switched off.
    No,
}

/// Denies this thread, and all that it starts, all files but those of the system, which it can read,
/// and of `directories`. It can execute nothing. Open files are not affected. Sets `no_new_privs`.
///
/// # Errors
/// When the kernel refuses the rules.
pub fn restrict(directories: &Directories) -> Result<Enforced, RulesetError> {
    let all = AccessFs::from_all(RIGHTS);
    let read: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
    let status = Ruleset::default()
        .handle_access(all)?
        .create()?
        .add_rules(path_beneath_rules(SYSTEM, read))?
        .add_rules(path_beneath_rules(&directories.read, read))?
        .add_rules(path_beneath_rules(&directories.write, all & !BitFlags::from(AccessFs::Execute)))?
        .add_rules(path_beneath_rules(&directories.remove, AccessFs::RemoveFile))?
        .restrict_self()?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Enforced::Fully,
        RulesetStatus::PartiallyEnforced => Enforced::Partly,
        RulesetStatus::NotEnforced => Enforced::No,
    })
}

/// The directories that reading `file` takes: its own, and that of the file that it links to.
#[must_use]
pub fn directories_of(file: &Path) -> Vec<PathBuf> {
    let resolved = file.canonicalize().ok();
    let mut directories: Vec<_> = [Some(file), resolved.as_deref()]
        .into_iter()
        .flatten()
        .filter_map(Path::parent)
        // A name alone is in the working directory.
        .map(|parent| if parent.as_os_str().is_empty() { PathBuf::from(".") } else { parent.to_owned() })
        .collect();
    directories.dedup();
    directories
}

#[cfg(test)]
mod tests {
    use std::{fs, io::ErrorKind, thread};

    use super::*;

    #[test]
    fn a_link_needs_its_own_directory_and_that_of_its_target() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("data")).unwrap();
        fs::write(root.join("data/file"), "").unwrap();
        std::os::unix::fs::symlink("data/file", root.join("link")).unwrap();
        assert_eq!(directories_of(&root.join("link")), [root.clone(), root.join("data")]);
        assert_eq!(directories_of(&root.join("data/file")), [root.join("data")]);
        assert_eq!(directories_of(Path::new("missing.toml")), [Path::new(".")]);
    }

    /// As Kubernetes replaces the files of a ConfigMap.
    #[test]
    fn a_file_behind_a_link_that_is_replaced_stays_readable() {
        let dir = tempfile::tempdir().unwrap();
        let version = |name: &str| {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("file"), name).unwrap();
            std::os::unix::fs::symlink(name, dir.path().join("..new")).unwrap();
            fs::rename(dir.path().join("..new"), dir.path().join("..data")).unwrap();
        };
        version("..1");
        let file = &dir.path().join("file");
        std::os::unix::fs::symlink("..data/file", file).unwrap();
        let (replaced, wait) = std::sync::mpsc::channel();
        let (restricted, begin) = std::sync::mpsc::channel();
        let text = thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let directories = Directories { read: directories_of(file), ..Directories::default() };
                restrict(&directories).unwrap();
                restricted.send(()).unwrap();
                wait.recv().unwrap();
                fs::read_to_string(file)
            });
            begin.recv().unwrap();
            version("..2");
            fs::remove_dir_all(dir.path().join("..1")).unwrap();
            replaced.send(()).unwrap();
            reader.join().unwrap()
        });
        assert_eq!(text.unwrap(), "..2");
    }

    #[test]
    fn only_the_named_directories_stay_usable() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for part in ["read", "write", "remove", "other"] {
            fs::create_dir(path(part)).unwrap();
            fs::write(path(part).join("file"), "text").unwrap();
        }
        let directories = Directories {
            read: vec![path("read")],
            write: vec![path("write")],
            remove: vec![path("remove")],
        };
        // On a thread of its own, because other tests need their files.
        let tried = thread::scope(|scope| {
            let tried = scope.spawn(|| -> Option<Vec<(&str, Option<ErrorKind>)>> {
                if restrict(&directories).unwrap() == Enforced::No {
                    return None;
                }
                let kind = |result: std::io::Result<()>| result.err().map(|error| error.kind());
                let read = |name: &str| kind(fs::read(path(name).join("file")).map(drop));
                let write = |name: &str| kind(fs::write(path(name).join("file"), "new"));
                Some(vec![
                    ("read", read("read")),
                    ("not written", write("read")),
                    ("read", read("write")),
                    ("written", write("write")),
                    ("made", kind(fs::write(path("write").join("new"), ""))),
                    ("renamed", kind(fs::rename(path("write").join("new"), path("write").join("file")))),
                    ("not read", read("remove")),
                    ("removed", kind(fs::remove_file(path("remove").join("file")))),
                    ("not read", read("other")),
                    ("not written", write("other")),
                    ("not removed", kind(fs::remove_file(path("other").join("file")))),
                    ("not executed", kind(std::process::Command::new("/bin/true").status().map(drop))),
                    ("resolver", kind(fs::read("/etc/hosts").map(drop))),
                    ("kernel", kind(fs::read("/proc/self/status").map(drop))),
                ])
            });
            tried.join().unwrap()
        });
        let Some(tried) = tried else {
            return eprintln!("skipped: this kernel does not enforce Landlock");
        };
        for (what, error) in tried {
            let expected = what.starts_with("not ").then_some(ErrorKind::PermissionDenied);
            assert_eq!(error, expected, "{what}");
        }
    }
}
