//! `cargo xtask deny`: licences, duplicates and sources of the dependencies, by cargo-deny.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{
    cargo,
    setup::{self, Group},
};

#[derive(clap::Args, Default)]
pub(crate) struct DenyArgs {
    /// Also check for security advisories; downloads RustSec's database from GitHub
    #[arg(long)]
    advisories: bool,
}

pub(crate) fn run(args: &DenyArgs) -> Result<()> {
    setup::ensure(&[Group::Lint])?;
    let mut command = Command::new(setup::cargo_deny()?);
    cargo::forget_this_package(&mut command);
    command.current_dir(cargo::workspace()).args(["--locked", "check", "licenses", "bans", "sources"]);
    if args.advisories {
        command.arg("advisories");
    }
    cargo::run(&mut command).context("deny.toml has the rules; state an exception there, with its reason")
}
