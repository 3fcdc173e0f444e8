//! `cargo xtask build`: the daemon, with the BPF programs inside.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::{cargo, setup};

#[derive(clap::Args)]
pub(crate) struct BuildArgs {
    /// Build what one installs: optimised, much slower to compile
    #[arg(long, short)]
    release: bool,
}

pub(crate) fn run(args: &BuildArgs) -> Result<()> {
    setup::ensure(&[setup::Group::Bpf])?;
    let path = daemon(args.release)?;
    println!("{}", path.display());
    Ok(())
}

/// Builds `injector` and tells where it is. What BPF needs must be set up.
///
/// # Errors
/// When it doesn't compile.
pub(crate) fn daemon(release: bool) -> Result<PathBuf> {
    let mut command = cargo::cargo();
    command.arg("build").args(cargo::HOST_PACKAGES).args(["--bin", "injector"]);
    if release {
        command.arg("--release");
    }
    cargo::executables(&mut command)?
        .into_iter()
        .find(|made| made.target == "injector" && made.kind == "bin")
        .map(|made| made.path)
        .context("cargo built no program `injector`; is it still a [[bin]] of injector-user?")
}
