//! `cargo xtask typos`: the spelling of code and documentation.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{
    cargo,
    setup::{self, Group},
};

#[derive(clap::Args, Default)]
pub(crate) struct TyposArgs {
    /// Correct what has one possible correction
    #[arg(long)]
    write: bool,
}

pub(crate) fn run(args: &TyposArgs) -> Result<()> {
    setup::ensure(&[Group::Lint])?;
    let mut command = Command::new(setup::typos()?);
    command.current_dir(cargo::workspace()).args(["--format", "brief"]);
    if args.write {
        command.arg("--write-changes");
    }
    cargo::run(&mut command)
        .context("correct the words, or add those that are right to typos.toml, each with its reason")
}
