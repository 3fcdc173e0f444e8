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
    /// Build as for the image: it follows Services of Kubernetes
    #[arg(long)]
    image: bool,
}

pub(crate) fn run(args: &BuildArgs) -> Result<()> {
    setup::ensure(&[setup::Group::Bpf])?;
    let path = if args.image { image_daemon(args.release)? } else { daemon(args.release)? };
    println!("{}", path.display());
    Ok(())
}

/// Builds `injector` and returns its path. The BPF toolchain must be set up.
///
/// # Errors
/// When it doesn't compile.
pub(crate) fn daemon(release: bool) -> Result<PathBuf> {
    with_features(release, &[])
}

/// The same for the image, whose daemon follows Services of Kubernetes.
///
/// # Errors
/// When it doesn't compile.
pub(crate) fn image_daemon(release: bool) -> Result<PathBuf> {
    with_features(release, &["--features", IMAGE_FEATURES])
}

/// Features of the image's daemon besides the default ones.
const IMAGE_FEATURES: &str = "injector-user/kubernetes";

fn with_features(release: bool, features: &[&str]) -> Result<PathBuf> {
    let mut command = cargo::cargo();
    command.arg("build").args(features).args(cargo::HOST_PACKAGES).args(["--bin", "injector"]);
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
