//! Installs what is missing.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

use super::{
    apt,
    cache::Cache,
    cargo_deb,
    explain::{package_names, refusal},
    group::Group,
    haproxy, job, kernels, kubernetes, linker,
    missing::Missing,
    receivers,
    survey::{self, Survey},
    toolchain::{self, NIGHTLY},
    wheel,
};

/// Installs until nothing is missing, or what was installed is still missing. One installation may
/// show the next need (a compiler its LLVM), hence a survey after each.
pub(super) fn install(groups: &[Group], cache: &Cache) -> Result<Survey> {
    let survey = survey::survey(groups, cache, false)?;
    if survey.missing.is_empty() {
        return finish(survey, cache);
    }
    if !apt::may_install()
        && let Some(why) = refusal(&survey.missing)
    {
        bail!("{why}");
    }
    let _lock = cache.lock()?;
    let mut before = Vec::new();
    loop {
        let survey = survey::survey(groups, cache, true)?;
        if survey.missing.is_empty() {
            return finish(survey, cache);
        }
        let missing: Vec<_> = survey.missing.iter().map(ToString::to_string).collect();
        if missing == before {
            bail!("still missing after it was installed: {}", missing.join("; "));
        }
        install_next(&survey.missing, cache)?;
        before = missing;
    }
}

fn finish(survey: Survey, cache: &Cache) -> Result<Survey> {
    if let Some(toolchain) = &survey.toolchain {
        cache.record(&toolchain.record())?;
    }
    Ok(survey)
}

/// Installs all missing packages or, where none is, the first of what else is missing.
fn install_next(missing: &[Missing], cache: &Cache) -> Result<()> {
    if let Some(why) = refusal(missing) {
        bail!("{why}");
    }
    let packages = package_names(missing);
    if !packages.is_empty() {
        return apt::install(&packages, cache);
    }
    match missing.first() {
        Some(Missing::Nightly { present, component, .. }) => install_nightly(*present, component, cache),
        Some(Missing::Link { name }) => link(name, cache),
        Some(Missing::Linker { llvm }) => linker::build(cache, *llvm),
        Some(Missing::HaProxy { series, suite }) => haproxy::fetch(cache, series, suite),
        Some(Missing::Receiver { package, .. }) => receivers::fetch(cache, package),
        Some(Missing::Kernel(wanted)) => kernels::fetch(cache, wanted),
        Some(Missing::Kubernetes) => kubernetes::install(cache),
        Some(Missing::Cluster(part)) => part.install(cache),
        Some(Missing::CargoDeb) => cargo_deb::build(cache),
        Some(Missing::Wheel(wheel)) => wheel::install(cache, wheel),
        Some(Missing::Package { .. } | Missing::LinkerByHand { .. }) | None => Ok(()),
    }
}

fn install_nightly(present: bool, component: &str, cache: &Cache) -> Result<()> {
    let arguments: &[&str] = if present {
        &["component", "add", component, "--toolchain", NIGHTLY]
    } else {
        &["toolchain", "install", NIGHTLY, "--profile", "minimal", "--component", component]
    };
    let command = format!("rustup {}", arguments.join(" "));
    eprintln!("setup: {command} …");
    let log = job::fresh(cache.log("rustup")?)?;
    job::run(Command::new("rustup").args(arguments).env_remove("RUST_BACKTRACE"), &log).with_context(|| {
        let by_hand = format!("run `{command}` on a machine that can");
        if component != "rust-src" {
            return by_hand;
        }
        format!(
            "compiling BPF needs a nightly with rust-src, or Debian's rustc-web with \
             libstd-rust-web-dev-bpf, which apt does not offer here: {by_hand}, or name a toolchain in {}",
            toolchain::CHOICE
        )
    })
}

fn link(name: &str, cache: &Cache) -> Result<()> {
    eprintln!("setup: rustup toolchain link {name} /usr");
    let log = job::fresh(cache.log("rustup")?)?;
    job::run(Command::new("rustup").args(["toolchain", "link", name]).arg(Path::new("/usr")), &log)
}
