//! `cargo xtask fuzz`: a short run of the parser's fuzz target with a fixed seed.

use std::fs;

use anyhow::{Context as _, Result};

use crate::{
    cargo,
    setup::{self, Group},
};

#[derive(clap::Args)]
pub(crate) struct FuzzArgs {
    /// How long inputs are tried
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// Seed of libFuzzer's random numbers; 0 takes another one each time
    #[arg(long, default_value_t = 1)]
    seed: u32,
}

pub(crate) fn run(args: &FuzzArgs) -> Result<()> {
    setup::ensure(&[Group::Fuzz])?;
    // Ignored by git; libFuzzer adds the inputs that reach new code.
    let corpus = cargo::workspace().join("fuzz/corpus/parse");
    fs::create_dir_all(&corpus).with_context(|| format!("cannot create {}", corpus.display()))?;
    let mut command = setup::nightly(setup::cargo_fuzz()?);
    command
        .current_dir(cargo::workspace())
        .args(["run", "parse", "fuzz/corpus/parse", "fuzz/seeds/parse", "--"])
        .arg(format!("-max_total_time={}", args.seconds))
        .arg(format!("-seed={}", args.seed))
        .arg("-max_len=700");
    cargo::run(&mut command).context("fuzz/README.md explains how to repeat a failure")
}
