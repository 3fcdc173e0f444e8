//! `cargo xtask image`: makes an OCI image without a registry, and runs it with the DaemonSet's
//! capabilities.
//!
//! mmdebstrap takes the files from Debian's packages, umoci makes the image, and runc runs it.
//! `deploy/Containerfile` makes the same image where a registry has a base image.

mod bundle;
mod layout;
mod rootfs;
mod trial;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    build,
    cargo::{self, workspace},
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

/// The image's name in its layout.
const TAG: &str = "latest";

pub(crate) fn run(args: &ImageArgs) -> Result<()> {
    let groups: &[Group] =
        if args.run { &[Group::Bpf, Group::Image, Group::Mail] } else { &[Group::Bpf, Group::Image] };
    // SAFETY: geteuid takes no arguments, touches no memory and cannot fail.
    ensure!(unsafe { libc::geteuid() } == 0, "unpacking Debian's packages with their owners needs root");
    setup::ensure(groups)?;
    let binary = build::daemon(true)?;
    let out = args.out.clone().unwrap_or_else(|| workspace().join("target/image"));
    let scratch = tempfile::Builder::new().prefix("inj-image-").tempdir()?;
    let base = scratch.path().join("base");
    let time = Time::of_source()?;
    rootfs::debian(&base, time)?;
    layout::build(&out, &base, &binary, time, scratch.path())?;
    println!("{}", layout::describe(&out)?);
    if args.run {
        trial::run(&out, scratch.path())?;
    }
    Ok(())
}

/// The time of all files in the image, in seconds since 1970: the same source makes the same image.
#[derive(Debug, Clone, Copy)]
struct Time(u64);

impl Time {
    /// `SOURCE_DATE_EPOCH`, or the last commit.
    fn of_source() -> Result<Self> {
        if let Ok(text) = std::env::var("SOURCE_DATE_EPOCH") {
            return Ok(Self(text.parse().context("SOURCE_DATE_EPOCH is not a number")?));
        }
        let mut git = std::process::Command::new("git");
        git.current_dir(workspace()).args(["log", "-1", "--format=%ct"]);
        let commit = git.output().ok().and_then(|it| String::from_utf8_lossy(&it.stdout).trim().parse().ok());
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Ok(Self(commit.unwrap_or_else(now)))
    }

    fn system(self) -> SystemTime {
        UNIX_EPOCH + std::time::Duration::from_secs(self.0)
    }

    /// In the form of `--created` (RFC 3339).
    fn rfc3339(self) -> Result<String> {
        let output = std::process::Command::new("date")
            .args(["--utc", "--date", &format!("@{}", self.0), "+%Y-%m-%dT%H:%M:%SZ"])
            .output()
            .context("cannot run date")?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

/// Runs a program whose output matters only when it fails.
fn quietly(command: &mut std::process::Command) -> Result<()> {
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
fn below(folder: &Path) -> Result<Vec<PathBuf>> {
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
