//! `cargo xtask ci`: the checks that a change must pass, the cheapest first.

use std::{
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result};

use super::{deny, typos};
use crate::{cargo, setup, test};

pub(crate) fn run() -> Result<()> {
    step("format", format)?;
    step("setup", || setup::ensure(&[&setup::Group::USUAL[..], &[setup::Group::Lint]].concat()))?;
    step("spelling", || typos::run(&typos::TyposArgs::default()))?;
    step("dependencies", || deny::run(&deny::DenyArgs::default()))?;
    step("lint", lint)?;
    step("lint the BPF programs", lint_bpf)?;
    step("docs", docs)?;
    step("build", build)?;
    step("test", || test::run(&test::TestArgs::default()))
}

fn step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    eprintln!("\n== {name}");
    let start = Instant::now();
    let result = work();
    // The tests' totals must be the last line of the output.
    if name != "test" {
        eprintln!("== {name}: {:.0} s", start.elapsed().as_secs_f32());
    }
    result
}

fn format() -> Result<()> {
    cargo::run(cargo::cargo().args(["fmt", "--all", "--check"]))
        .context("run `cargo fmt --all` (if cargo has no fmt: `rustup component add rustfmt clippy`)")
}

fn lint() -> Result<()> {
    const DENY: [&str; 3] = ["--", "-D", "warnings"];
    cargo::run(cargo::cargo().arg("clippy").args(cargo::HOST_PACKAGES).arg("--all-targets").args(DENY))?;
    cargo::run(cargo::cargo().args(["clippy", "--all-targets"]).args(RELAY_ONLY).args(DENY))
}

/// The daemon without BPF, which must build with stable Rust alone.
const RELAY_ONLY: [&str; 3] = ["--package", "injector-user", "--no-default-features"];

/// Lints the programs for the BPF target: with clippy if the BPF toolchain has it (Debian's does
/// not), else with the compiler's own lints.
fn lint_bpf() -> Result<()> {
    let toolchain = setup::bpf_toolchain()?;
    let clippy = toolchain.command("cargo").args(["clippy", "--version"]).stderr(Stdio::null()).output();
    let clippy = clippy.is_ok_and(|output| output.status.success());
    if !clippy {
        eprintln!("toolchain `{}` has no clippy: the compiler's warnings are denied instead", toolchain.name);
    }
    let mut command: Command = toolchain.command("cargo");
    command
        .current_dir(cargo::workspace())
        .args([if clippy { "clippy" } else { "check" }, "--package", "injector-ebpf", "--release"])
        .args(["--target", setup::BPF_TARGET])
        .env("CARGO_TERM_QUIET", "true")
        .env("RUSTFLAGS", format!("--cfg=bpf_target_arch=\"{}\" -Dwarnings", std::env::consts::ARCH));
    if toolchain.builds_core() {
        command.args(["-Z", "build-std=core"]);
    }
    cargo::run(&mut command)
}

fn docs() -> Result<()> {
    let mut command = cargo::cargo();
    command.arg("doc").args(cargo::HOST_PACKAGES).arg("--no-deps");
    cargo::run(command.env("RUSTDOCFLAGS", "-D warnings"))
}

fn build() -> Result<()> {
    // The full build comes last, because both write the daemon to the same path.
    cargo::run(cargo::cargo().arg("build").args(RELAY_ONLY))?;
    cargo::run(cargo::cargo().arg("build").args(cargo::HOST_PACKAGES).arg("--all-targets"))
}
