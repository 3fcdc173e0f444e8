//! The checks that a change must pass, and those that take longer.

pub(crate) mod ci;
pub(crate) mod deny;
#[cfg(test)]
mod docs;
pub(crate) mod fuzz;
#[cfg(test)]
mod glossary;
#[cfg(test)]
mod imports;
pub(crate) mod miri;
pub(crate) mod typos;

/// The files of the repository, from its root, as git lists them.
#[cfg(test)]
fn tracked_files() -> Vec<std::path::PathBuf> {
    let output = std::process::Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(crate::cargo::workspace())
        .output()
        .unwrap();
    assert!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    let names = String::from_utf8(output.stdout).unwrap();
    let files = names.split('\0').filter(|name| !name.is_empty()).map(std::path::PathBuf::from);
    files.filter(|file| crate::cargo::workspace().join(file).is_file()).collect()
}
