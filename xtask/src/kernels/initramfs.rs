//! The first file system of a virtual machine: busybox, the modules that the root file system needs,
//! and the scripts.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail, ensure};

use super::cpio::Archive;
use crate::{cargo, setup::Kernel};

/// What reaches the root file system and the ports; a kernel may have some built in.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_console", "virtiofs", "overlay"];

const BUSYBOX: &str = "/bin/busybox";

/// Makes the archive; the machine runs `command` in a shell.
pub(super) fn build(kernel: &Kernel, command: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["bin", "modules", "proc", "sys", "dev", "lower", "layer", "new", "guest"] {
        archive.folder(folder);
    }
    archive.file("bin/busybox", &fs::read(BUSYBOX).with_context(|| format!("cannot read {BUSYBOX}"))?);
    archive.file("init", include_bytes!("init.sh"));
    for (number, path) in modules(kernel)?.iter().enumerate() {
        let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy();
        let name = name.split(".ko").next().unwrap_or_default();
        archive.file(&format!("modules/{number:02}-{name}.ko"), &unpacked(Path::new(path))?);
    }
    archive.file("guest/guest.sh", include_bytes!("guest.sh"));
    archive.file("guest/command", command.as_bytes());
    archive.file("guest/modules", kernel.modules().as_os_str().as_encoded_bytes());
    Ok(archive.finish())
}

/// The files of [`MODULES`] and of all that they depend on, in the order in which to load them.
fn modules(kernel: &Kernel) -> Result<Vec<String>> {
    let mut modprobe = Command::new("modprobe");
    modprobe.arg("--dirname").arg(&kernel.tree).args(["--set-version", &kernel.release]);
    modprobe.args(["--show-depends", "--all"]).args(MODULES);
    // An ordinary user's PATH lacks it, and root's may.
    modprobe.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    let output = modprobe.output().with_context(|| format!("cannot start `{}`", cargo::line(&modprobe)))?;
    ensure!(
        output.status.success(),
        "`{}` failed: {}",
        cargo::line(&modprobe),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(to_load(&String::from_utf8_lossy(&output.stdout)))
}

/// The files in modprobe's list, each once: `insmod FILE` or `builtin NAME`.
fn to_load(list: &str) -> Vec<String> {
    let mut files: Vec<String> = Vec::new();
    for file in list.lines().filter_map(|line| line.strip_prefix("insmod ")) {
        let file = file.trim();
        if !files.iter().any(|it| it == file) {
            files.push(file.to_owned());
        }
    }
    files
}

/// A module's contents; busybox cannot load a compressed one.
fn unpacked(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    };
    let output = Command::new(program).arg("-dc").arg(path).output();
    let output = output.with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{program} cannot unpack {}", path.display());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_once_and_in_order() {
        let list = "insmod /m/virtio.ko \ninsmod /m/virtio_ring.ko.xz\nbuiltin virtiofs\ninsmod /m/virtio.ko\n\
            insmod /m/overlay.ko.xz \n";
        assert_eq!(to_load(list), ["/m/virtio.ko", "/m/virtio_ring.ko.xz", "/m/overlay.ko.xz"]);
        assert_eq!(to_load("builtin virtiofs\n"), [""; 0]);
    }
}
