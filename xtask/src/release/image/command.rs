//! Runs the programs that make the image, and lists their files.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use crate::cargo;

/// Runs a program whose output matters only when it fails.
pub(super) fn quietly(command: &mut std::process::Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot start `{}`", cargo::line(command)))?;
    let printed = [output.stdout, output.stderr].concat();
    ensure!(
        output.status.success(),
        "`{}` failed ({}):\n{}",
        cargo::line(command),
        output.status,
        String::from_utf8_lossy(&printed).trim()
    );
    Ok(())
}

/// Every path below a folder; the contents of a folder come before it.
pub(super) fn below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(below(&entry.path())?);
        }
        found.push(entry.path());
    }
    Ok(found)
}
