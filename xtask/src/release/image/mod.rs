//! `cargo xtask image`: makes an OCI image without a registry, and runs it with the DaemonSet's
//! capabilities.
//!
//! mmdebstrap takes the files from Debian's packages, umoci makes the image, and runc runs it.
//! `deploy/Containerfile` makes the same image where a registry has a base image.

mod bundle;
mod command;
mod layout;
mod rootfs;
mod source_time;
mod trial;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

pub(crate) use self::layout::TAG;
use self::source_time::Time;
use crate::{
    build,
    cargo::workspace,
    setup::{self, Group},
};

#[derive(clap::Args)]
pub(crate) struct ImageArgs {
    /// Folder of the image, an OCI layout [default: target/image]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Also run it under runc between a client and real mail servers, in network namespaces, and
    /// send a message through each engine
    #[arg(long)]
    run: bool,
}

pub(crate) fn run(args: &ImageArgs) -> Result<()> {
    let groups: &[Group] =
        if args.run { &[Group::Bpf, Group::Image, Group::Mail] } else { &[Group::Bpf, Group::Image] };
    // SAFETY: geteuid takes no arguments, touches no memory and cannot fail.
    ensure!(unsafe { libc::geteuid() } == 0, "unpacking Debian's packages with their owners needs root");
    setup::ensure(groups)?;
    let binary = build::image_daemon(true)?;
    let out = args.out.clone().unwrap_or_else(|| workspace().join("target/image"));
    let scratch = tempfile::Builder::new().prefix("inj-image-").tempdir()?;
    make(&out, &binary, scratch.path())?;
    println!("{}", layout::describe(&out)?);
    if args.run {
        trial::run(&out, scratch.path())?;
    }
    Ok(())
}

/// Makes the image of this daemon, in place of an older one.
///
/// # Errors
/// When Debian's archive cannot be reached, or umoci fails.
pub(crate) fn make(out: &Path, binary: &Path, scratch: &Path) -> Result<()> {
    let base = scratch.join("base");
    let time = Time::of_source()?;
    rootfs::debian(&base, time)?;
    layout::build(out, &base, binary, time, scratch)
}
