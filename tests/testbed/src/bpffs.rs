//! A BPF file system of this process, for the inline engine's pins.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use tempfile::TempDir;

use crate::netns;

/// A mounted BPF file system, unmounted on drop; the namespaces of this process see it.
#[derive(Debug)]
pub struct BpfFs(TempDir);

impl BpfFs {
    /// Mounts one.
    ///
    /// # Errors
    /// When not root, or the kernel has no BPF file system.
    pub fn mount() -> anyhow::Result<Self> {
        let dir = netns::scratch_dir("bpffs")?;
        run("mount", &["-t", "bpf", "bpf"], dir.path())?;
        Ok(Self(dir))
    }

    /// The mount point.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        if let Err(error) = run("umount", &[], self.path()) {
            eprintln!("{error:#}");
        }
    }
}

fn run(program: &str, arguments: &[&str], path: &Path) -> anyhow::Result<()> {
    let output = Command::new(program).args(arguments).arg(path).output().context(program.to_owned())?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {}", path.display(), complaint.trim());
    Ok(())
}
