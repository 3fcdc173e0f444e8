//! The injector's image, as `cargo xtask image` makes it.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};

use super::{machines::Cluster, node::output};
use crate::{build, release::image};

/// The name by which the nodes know it, without its tag.
const NAME: &str = "localhost/injector";

/// Which daemon is in the image.
#[derive(clap::Args)]
pub(super) struct DaemonArgs {
    /// Use this binary [default: a build with optimisation, as for an image]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Build without optimisation: minutes faster, and its numbers are of no use
    #[arg(long, conflicts_with = "binary")]
    debug: bool,
}

/// The daemon's path, built if none is given.
///
/// # Errors
/// When it does not compile.
pub(super) fn daemon(args: &DaemonArgs) -> Result<PathBuf> {
    match &args.binary {
        Some(binary) => {
            ensure!(binary.is_file(), "{} is not a file", binary.display());
            Ok(binary.clone())
        }
        None => build::image_daemon(!args.debug),
    }
}

/// The image's name with its tag.
pub(super) fn name() -> String {
    format!("{NAME}:{}", image::TAG)
}

pub(super) fn build_and_import(cluster: &Cluster, args: &DaemonArgs) -> Result<()> {
    import(cluster, &daemon(args)?)
}

/// Makes the image and imports it at all nodes.
///
/// # Errors
/// When it cannot be made, or a node refuses it.
pub(super) fn import(cluster: &Cluster, daemon: &Path) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("inj-image-").tempdir()?;
    let layout = scratch.path().join("image");
    image::make(&layout, daemon, scratch.path())?;
    let archive = scratch.path().join("injector.tar");
    output(Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&layout).arg("."))?;
    cluster.import(&archive, NAME)
}
