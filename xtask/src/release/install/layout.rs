//! The folders below a prefix in which systemd, man and the shells look.

use std::path::{Path, PathBuf};

/// The configuration's path, with any prefix.
pub(crate) const CONFIG: &str = "/etc/injector/injector.toml";

/// The unit's `StateDirectory=`, which systemd makes.
pub(crate) const STATE: &str = "/var/lib/injector";

/// Folders as the installed system sees them; a `--destdir` is put in front of them later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    prefix: PathBuf,
}

impl Layout {
    pub(crate) fn new(prefix: &Path) -> Self {
        Self { prefix: prefix.to_path_buf() }
    }

    pub(crate) fn program(&self) -> PathBuf {
        self.prefix.join("bin/injector")
    }

    pub(crate) fn units(&self) -> PathBuf {
        self.of_systemd("lib/systemd/system", "/etc/systemd/system")
    }

    pub(crate) fn sysusers(&self) -> PathBuf {
        self.of_systemd("lib/sysusers.d", "/etc/sysusers.d").join("injector.conf")
    }

    pub(crate) fn tmpfiles(&self) -> PathBuf {
        self.of_systemd("lib/tmpfiles.d", "/etc/tmpfiles.d").join("injector.conf")
    }

    pub(crate) fn share(&self, path: &str) -> PathBuf {
        self.prefix.join("share").join(path)
    }

    /// The manifest's path.
    pub(crate) fn manifest(&self) -> PathBuf {
        self.share("injector/manifest")
    }

    /// systemd looks below /usr and /usr/local, and for everything else in /etc.
    fn of_systemd(&self, below_prefix: &str, otherwise: &str) -> PathBuf {
        if ["/usr", "/usr/local"].iter().any(|known| Path::new(known) == self.prefix) {
            self.prefix.join(below_prefix)
        } else {
            otherwise.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_where_systemd_looks() {
        for (prefix, expected) in [
            ("/usr", "/usr/lib/systemd/system"),
            ("/usr/local", "/usr/local/lib/systemd/system"),
            ("/usr/local/", "/usr/local/lib/systemd/system"),
            ("/opt/injector", "/etc/systemd/system"),
        ] {
            assert_eq!(Layout::new(Path::new(prefix)).units(), Path::new(expected), "{prefix}");
        }
    }
}
