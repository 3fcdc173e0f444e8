//! The versions of HAProxy that the benchmark compares with, those of Debian unstable, 13 and 12.
//!
//! The system's own HAProxy is used if it has that version. Another one comes from this system's
//! Debian archive, with all its libraries, the C library included, and is unpacked into the tool
//! cache.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use injector_bench::systems::Build;

use super::{
    cache::Cache,
    job,
    packages::program,
    private_apt::{self, PrivateApt},
};

/// Series of HAProxy, and the Debian release that has it; the newest first.
pub(super) const RELEASES: [(&str, &str); 3] = [("3.2", "sid"), ("3.0", "trixie"), ("2.6", "bookworm")];

/// The program of that series, if it runs.
pub(super) fn find(cache: &Cache, series: &str) -> Option<Build> {
    let own = program("haproxy").map(|own| vec![own]);
    own.into_iter().chain(in_prefix(&folder(cache, series))).find_map(|command| build(series, command))
}

fn folder(cache: &Cache, series: &str) -> PathBuf {
    cache.tool(&format!("haproxy-{series}"))
}

/// Runs a program to get its version; `None` if it is of another series.
fn build(series: &str, command: Vec<PathBuf>) -> Option<Build> {
    let (program, arguments) = command.split_first()?;
    let output = Command::new(program).args(arguments).arg("-v").output().ok()?;
    let version = version(&String::from_utf8_lossy(&output.stdout))?;
    let of_series = version.strip_prefix(series).is_some_and(|rest| rest.starts_with(['.', '-']));
    of_series.then(|| Build { series: series.to_owned(), version, command })
}

/// `HAProxy version 3.0.11-1+deb13u3 2026/10/01 - …`
fn version(printed: &str) -> Option<String> {
    printed.lines().next()?.strip_prefix("HAProxy version ")?.split(' ').next().map(str::to_owned)
}

/// The program in an unpacked tree, run by that tree's dynamic loader with that tree's libraries.
fn in_prefix(prefix: &Path) -> Option<Vec<PathBuf>> {
    let haproxy = prefix.join("usr/sbin/haproxy");
    if !haproxy.is_file() {
        return None;
    }
    let folders = libraries(prefix);
    let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    let loaders = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("ld-linux"));
    let loader = loaders.map(|entry| entry.path()).find(|path| path.is_file())?;
    let path = std::env::join_paths(&folders).ok()?;
    Some(vec![loader, "--library-path".into(), path.into(), haproxy])
}

/// `lib/TRIPLET` and `usr/lib/TRIPLET`; older releases have the C library in the former.
fn libraries(prefix: &Path) -> Vec<PathBuf> {
    let roots = ["lib", "usr/lib"].map(|root| prefix.join(root));
    let entries = roots.iter().filter_map(|root| fs::read_dir(root).ok()).flatten().flatten();
    let triplets =
        entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains("-linux-gnu"));
    triplets.filter(|path| path.is_dir()).collect()
}

/// Downloads and unpacks a series.
///
/// # Errors
/// When the archive cannot be reached, or its program does not run. The cache is then unchanged.
pub(super) fn fetch(cache: &Cache, series: &str, suite: &str) -> Result<()> {
    eprintln!("setup: HAProxy {series} of Debian {suite}, with its libraries …");
    let log = job::fresh(cache.log(&format!("haproxy-{series}"))?)?;
    let partial = cache.partial()?;
    let apt = PrivateApt::new(&partial.path().join("apt"), suite)?;
    let run = |arguments: &[&str]| job::run(apt.command("apt-get").args(arguments), &log);
    run(&["update"]).with_context(|| format!("cannot fetch the lists of Debian {suite}"))?;
    // No package counts as installed, so all dependencies of HAProxy are downloaded too.
    run(&["install", "-y", "--no-install-recommends", "--download-only", "haproxy"])
        .with_context(|| format!("cannot fetch HAProxy of Debian {suite}"))?;
    let tree = partial.path().join("tree");
    private_apt::unpack(&apt.downloaded(), &tree, &log)?;
    let command = in_prefix(&tree).context("the packages contain no HAProxy that can run")?;
    ensure!(
        build(series, command).is_some(),
        "the HAProxy of Debian {suite} does not run here, or is no longer of series {series}"
    );
    let place = folder(cache, series);
    if place.exists() {
        fs::remove_dir_all(&place).with_context(|| format!("cannot remove {}", place.display()))?;
    }
    fs::rename(&tree, &place).with_context(|| format!("cannot create {}", place.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_belong_to_one_series() {
        let printed = "HAProxy version 3.0.11-1+deb13u3 2026/10/01 - a page\nStatus: long-term";
        assert_eq!(version(printed).as_deref(), Some("3.0.11-1+deb13u3"));
        assert_eq!(version("nginx version: nginx/1.22.1"), None);
    }

    #[test]
    fn an_unpacked_tree_runs_with_its_own_loader() {
        let tree = tempfile::tempdir().unwrap();
        assert_eq!(in_prefix(tree.path()), None);
        for (folder, file) in [("usr/sbin", "haproxy"), ("usr/lib/x86_64-linux-gnu", "ld-linux-x86-64.so.2")]
        {
            fs::create_dir_all(tree.path().join(folder)).unwrap();
            fs::write(tree.path().join(folder).join(file), "").unwrap();
        }
        let command = in_prefix(tree.path()).unwrap();
        assert!(command[0].ends_with("ld-linux-x86-64.so.2") && command[3].ends_with("usr/sbin/haproxy"));
    }

    #[test]
    #[ignore = "fetches packages from the network, for each release"]
    fn every_release_can_be_downloaded_and_runs() {
        let (_temporary, cache) = super::super::cache::scratch();
        for (series, suite) in RELEASES {
            fetch(&cache, series, suite).unwrap();
            let command = in_prefix(&folder(&cache, series)).unwrap();
            assert!(build(series, command).unwrap().version.starts_with(series));
        }
    }
}
