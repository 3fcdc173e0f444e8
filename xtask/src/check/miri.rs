//! `cargo xtask miri`: the parsers of PROXY headers under Miri, which finds undefined behaviour.

use anyhow::Result;

use crate::{
    cargo,
    setup::{self, Group},
};

/// Miri interprets each instruction, so a property is tried with few inputs.
const CASES: &str = "4";

/// These try every bit and every length of a header, which takes minutes and reaches no other code.
const EXHAUSTIVE: [&str; 2] =
    ["properties::every_bit_flip_is_caught", "properties::every_truncation_is_incomplete"];

#[derive(clap::Args)]
pub(crate) struct MiriArgs {
    /// Only tests whose name contains this
    filter: Option<String>,
}

pub(crate) fn run(args: &MiriArgs) -> Result<()> {
    setup::ensure(&[Group::Miri])?;
    let mut command = setup::nightly("cargo");
    command
        .current_dir(cargo::workspace())
        .args(["miri", "test", "--package", "injector-common", "--test", "proxy", "--"])
        .args(&args.filter)
        .args(EXHAUSTIVE.iter().flat_map(|name| ["--skip", name]))
        .env("PROPTEST_CASES", CASES)
        // Tests read the fuzzer's seeds, and proptest the working directory.
        .env("MIRIFLAGS", "-Zmiri-disable-isolation")
        .env("CARGO_TARGET_DIR", cargo::workspace().join("target/miri"));
    cargo::run(&mut command)
}
