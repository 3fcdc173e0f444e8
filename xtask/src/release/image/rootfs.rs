//! The image's files, from Debian's packages: the C library and its needs, without a shell.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{
    command::{below, quietly},
    source_time::Time,
};
use crate::setup;

/// The C library, and the library that Rust unwinds with.
const PACKAGES: &str = "libc6,libgcc-s1";

/// The image's default user.
pub(super) const USER: &str = "65532:65532";

/// Unpacks the packages without running their scripts, and removes documentation.
///
/// # Errors
/// When the archive cannot be reached.
pub(super) fn debian(root: &Path, time: Time) -> Result<()> {
    // The release that the daemon was built on, because the C library must not be older.
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let suite =
        suite.context("/etc/os-release has no VERSION_CODENAME: the image can only be made on Debian")?;
    let archive = setup::debian_archive()?;
    eprintln!("image: {PACKAGES} of Debian {suite} …");
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=extract", "--quiet", &format!("--include={PACKAGES}"), suite]);
    command.arg(root).arg(archive).env("SOURCE_DATE_EPOCH", time.0.to_string());
    quietly(&mut command).context("cannot unpack Debian's packages")?;
    strip(root)?;
    complete(root)
}

/// Removes documentation and the state of apt and dpkg. Licences stay.
fn strip(root: &Path) -> Result<()> {
    for path in ["usr/share/man", "usr/share/lintian", "usr/share/locale", "var", "etc/apt", "tmp"] {
        let path = root.join(path);
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    let doc = root.join("usr/share/doc");
    for path in below(&doc)? {
        // Folders are tried too; one that is not empty stays.
        if path.is_dir() && !path.is_symlink() {
            let _ = fs::remove_dir(&path);
        } else if path.file_name().is_some_and(|name| name != "copyright") {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Creates users, and mount points, because the container's root is read-only.
fn complete(root: &Path) -> Result<()> {
    for (path, mode) in [
        ("dev", 0o755),
        ("proc", 0o755),
        ("sys", 0o755),
        ("etc/injector", 0o755),
        ("run/injector", 0o777),
        ("tmp", 0o1777),
    ] {
        let path = root.join(path);
        fs::create_dir_all(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    let text = |path: &str, text: &str| -> Result<()> {
        let path: PathBuf = root.join(path);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    text(
        "etc/passwd",
        "root:x:0:0:root:/:/usr/sbin/nologin\ninjector:x:65532:65532:injector:/:/usr/sbin/nologin\n",
    )?;
    text("etc/group", "root:x:0:\ninjector:x:65532:\n")?;
    // Backends may be host names.
    text("etc/nsswitch.conf", "hosts: files dns\n")
}
