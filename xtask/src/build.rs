//! `cargo xtask build`: the daemon, with the BPF programs inside.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::{
    cargo::{self, Executable},
    setup,
};

#[derive(clap::Args)]
pub(crate) struct BuildArgs {
    /// Build with optimisation, as for an installation; compiles much longer
    #[arg(long, short)]
    release: bool,
}

pub(crate) fn run(args: &BuildArgs) -> Result<()> {
    setup::ensure(&[setup::Group::Bpf])?;
    let path = daemon(args.release)?;
    println!("{}", path.display());
    Ok(())
}

/// Builds `injector` and returns its path. The BPF toolchain must be set up.
///
/// # Errors
/// When it doesn't compile.
pub(crate) fn daemon(release: bool) -> Result<PathBuf> {
    let mut command = cargo::cargo();
    command.arg("build").args(cargo::HOST_PACKAGES).args(["--bin", "injector"]);
    if release {
        command.arg("--release");
    }
    among(&cargo::executables(&mut command)?)
}

/// The path of `injector` among the executables that were built.
///
/// # Errors
/// When it is not among them.
pub(crate) fn among(built: &[Executable]) -> Result<PathBuf> {
    let daemon = built.iter().find(|made| made.target == "injector" && made.kind == "bin" && !made.harness);
    let missing = "cargo built no program `injector`; is it still a [[bin]] of injector-user?";
    daemon.map(|daemon| daemon.path.clone()).context(missing)
}

/// Builds every test program and the daemon together. Built alone, the daemon would be linked with
/// libraries of other features, because dependencies of the tests add some.
///
/// # Errors
/// When they don't compile.
pub(crate) fn everything() -> Result<Vec<Executable>> {
    let mut command = cargo::cargo();
    command.arg("build").args(cargo::HOST_PACKAGES).arg("--all-targets");
    cargo::executables(&mut command)
}

/// The package whose test targets need privileges.
pub(crate) const SUITE: &str = "injector-suite";

/// Whether it is a test program that needs privileges.
pub(crate) fn is_privileged(program: &&Executable) -> bool {
    program.package == SUITE && program.kind == "test"
}
