//! bpf-linker, which makes one BPF object of the compiler's bitcode.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{cache::Cache, job, packages};
use crate::cargo;

/// The release that is built.
pub(super) const VERSION: &str = "0.13.0";

/// The LLVM majors this release can be linked with: its features `llvm-NN`.
const LLVMS: std::ops::RangeInclusive<u32> = 21..=23;

/// The folder of the linker's program for this LLVM, if it runs.
///
/// One in the cache was built for that LLVM. One in PATH is used only for a toolchain of rustup:
/// released linkers have a newer LLVM than any Rust, which can read older bitcode.
pub(super) fn find(cache: &Cache, llvm: u32, accept_path: bool) -> Option<PathBuf> {
    let cached = folder(cache, llvm).join("bin");
    if job::version(&cached.join("bpf-linker")).is_some_and(|printed| printed.contains(VERSION)) {
        return Some(cached);
    }
    let own = packages::program("bpf-linker").filter(|_| accept_path)?;
    job::version(&own)?;
    own.parent().map(Path::to_path_buf)
}

fn folder(cache: &Cache, llvm: u32) -> PathBuf {
    cache.tool(&format!("bpf-linker-{VERSION}-llvm{llvm}"))
}

/// The folder of LLVM's headers and libraries that the operator set as `LLVM_PREFIX`.
fn prefix() -> Option<PathBuf> {
    env::var_os("LLVM_PREFIX").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Whether the operator named an LLVM, so that no package is needed.
pub(super) fn has_own_llvm() -> bool {
    prefix().is_some()
}

/// Builds the linker, and moves it to its place if it runs.
///
/// # Errors
/// When it doesn't build or run. Nothing is left behind.
pub(super) fn build(cache: &Cache, llvm: u32) -> Result<()> {
    if !LLVMS.contains(&llvm) {
        bail!(
            "bpf-linker {VERSION} links with LLVM {} to {}, but the BPF compiler has {llvm}: choose another compiler with {}",
            LLVMS.start(),
            LLVMS.end(),
            super::toolchain::CHOICE
        );
    }
    eprintln!("setup: bpf-linker {VERSION} (LLVM {llvm}): building, about two minutes …");
    let partial = cache.partial()?;
    let log = job::fresh(cache.log("bpf-linker")?)?;
    job::run(&mut install_command(partial.path(), llvm), &log).context("bpf-linker could not be built")?;
    let program = partial.path().join("bin/bpf-linker");
    let printed = job::version(&program).unwrap_or_default();
    if !printed.contains(VERSION) {
        bail!("the bpf-linker just built doesn't run (it printed {printed:?}); see {}", log.display());
    }
    place(partial, &folder(cache, llvm))
}

fn install_command(root: &Path, llvm: u32) -> Command {
    let mut command = cargo_install(root, &format!("bpf-linker@{VERSION}"));
    command
        .args(["--no-default-features", "--features", &format!("llvm-{llvm}")])
        .env("LLVM_PREFIX", prefix().unwrap_or_else(|| format!("/usr/lib/llvm-{llvm}").into()));
    command
}

/// `cargo install` of one program at one version, built below the folder that it is installed into.
pub(super) fn cargo_install(root: &Path, what: &str) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo::forget_this_package(&mut command);
    command
        .args(["install", "--locked", "--no-track", what, "--root"])
        .arg(root)
        .env("CARGO_TARGET_DIR", root.join("target"))
        // Outside the workspace, whose settings must not apply.
        .current_dir(root);
    command
}

/// Moves the finished folder to its place, over one that no longer runs.
pub(super) fn place(partial: tempfile::TempDir, finished: &Path) -> Result<()> {
    let failed = |what: &str| format!("cannot {what} {}", finished.display());
    if let Err(error) = fs::remove_dir_all(partial.path().join("target")) {
        eprintln!("setup: cannot remove a build folder in {}: {error}", finished.display());
    }
    if finished.exists() {
        fs::remove_dir_all(finished).with_context(|| failed("remove the old"))?;
    }
    fs::rename(partial.path(), finished).with_context(|| failed("rename into place"))?;
    // The folder was renamed, so there is nothing to remove.
    let _ = partial.keep();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::script;

    fn tool(folder: &Path, script: &str) {
        fs::create_dir_all(folder.join("bin")).unwrap();
        script::write(&folder.join("bin/bpf-linker"), &format!("#!/bin/sh\n{script}\n"));
    }

    #[test]
    fn a_finished_tool_takes_the_place_of_a_broken_one_without_its_build_folder() {
        let cache = tempfile::tempdir().unwrap();
        let finished = cache.path().join("bpf-linker-1-llvm22");
        tool(&finished, "exit 1");
        let partial = tempfile::tempdir_in(cache.path()).unwrap();
        tool(partial.path(), "echo bpf-linker 1");
        fs::create_dir(partial.path().join("target")).unwrap();
        place(partial, &finished).unwrap();
        assert_eq!(job::version(&finished.join("bin/bpf-linker")).as_deref(), Some("bpf-linker 1"));
        assert!(!finished.join("target").exists());
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_linker_is_built_for_the_compilers_llvm() {
        let line = cargo::line(&install_command(Path::new("/partial"), 23));
        assert!(line.contains("--root /partial --no-default-features --features llvm-23"), "{line}");
        assert!(line.contains(&format!("bpf-linker@{VERSION}")), "{line}");
    }
}
