//! cargo-deb, which makes the Debian package.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use super::{cache::Cache, job, linker};

/// The release that is built.
pub(super) const VERSION: &str = "3.8.0";

/// The program in the cache, if it runs. One in PATH does not count, because the package's contents
/// depend on the release of cargo-deb.
pub(super) fn find(cache: &Cache) -> Option<PathBuf> {
    let program = cache.tool(&folder()).join("bin/cargo-deb");
    job::version(&program).filter(|printed| printed.contains(VERSION)).map(|_| program)
}

fn folder() -> String {
    format!("cargo-deb-{VERSION}")
}

/// Builds it, and moves it to its place if it runs.
///
/// # Errors
/// When it doesn't build or run. Nothing is left behind.
pub(super) fn build(cache: &Cache) -> Result<()> {
    eprintln!("setup: cargo-deb {VERSION}: building, about two minutes …");
    let partial = cache.partial()?;
    let log = job::fresh(cache.log("cargo-deb")?)?;
    let mut command = linker::cargo_install(partial.path(), &format!("cargo-deb@{VERSION}"));
    job::run(&mut command, &log).context("cargo-deb could not be built")?;
    let printed = job::version(&partial.path().join("bin/cargo-deb")).unwrap_or_default();
    if !printed.contains(VERSION) {
        bail!("the cargo-deb just built doesn't run (it printed {printed:?}); see {}", log.display());
    }
    linker::place(partial, &cache.tool(&folder()))
}
