//! The versions of HAProxy that the benchmark compares with, those of Debian 13 and Debian 12.
//!
//! The system's own HAProxy is used if it has that version. Another one comes from this system's
//! Debian archive: an apt with separate lists and state downloads it with all its libraries, the C
//! library included, and it is unpacked into the tool cache. The system is not changed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use injector_bench::systems::Build;

use super::{cache::Cache, job, packages::program};

/// Series of HAProxy, and the Debian release that has it; the newest first.
pub(super) const RELEASES: [(&str, &str); 2] = [("3.0", "trixie"), ("2.6", "bookworm")];

/// The keys of all Debian releases, in package debian-archive-keyring.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

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
    ensure!(
        program("apt-get").is_some() && program("dpkg-deb").is_some() && Path::new(KEYRING).exists(),
        "HAProxy {series} comes from Debian {suite}: installing it needs apt-get, dpkg-deb and {KEYRING}"
    );
    let archive = archive()?;
    let log = job::fresh(cache.log(&format!("haproxy-{series}"))?)?;
    let partial = cache.partial()?;
    let apt = partial.path().join("apt");
    let apt_get = private_apt(&apt, &archive, suite)?;
    let run = |arguments: &[&str]| job::run(apt_get().args(arguments), &log);
    run(&["update"]).with_context(|| format!("cannot fetch the lists of Debian {suite}"))?;
    // No package counts as installed, so all dependencies of HAProxy are downloaded too.
    run(&["install", "-y", "--no-install-recommends", "--download-only", "haproxy"])
        .with_context(|| format!("cannot fetch HAProxy of Debian {suite}"))?;
    let tree = partial.path().join("tree");
    unpack(&apt.join("cache/archives"), &tree, &log)?;
    let command = in_prefix(&tree).context("the packages contain no HAProxy that can run")?;
    ensure!(build(series, command).is_some(), "the downloaded HAProxy is not of series {series}");
    let place = folder(cache, series);
    if place.exists() {
        fs::remove_dir_all(&place).with_context(|| format!("cannot remove {}", place.display()))?;
    }
    fs::rename(&tree, &place).with_context(|| format!("cannot create {}", place.display()))
}

/// An apt-get with one source, which keeps everything in a folder and uses this system's network
/// settings.
fn private_apt(folder: &Path, archive: &str, suite: &str) -> Result<impl Fn() -> Command + use<>> {
    for inner in ["state/lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(folder.join(inner))
            .with_context(|| format!("cannot create {}", folder.display()))?;
    }
    fs::write(folder.join("sources.list"), format!("deb [signed-by={KEYRING}] {archive} {suite} main\n"))?;
    fs::write(folder.join("status"), "")?;
    let set = |name: &str, path: &str| format!("{name}={}", folder.join(path).display());
    let settings = [
        set("Dir::State", "state"),
        set("Dir::State::status", "status"),
        set("Dir::Cache", "cache"),
        set("Dir::Etc::sourcelist", "sources.list"),
        "Dir::Etc::sourceparts=/dev/null".to_owned(),
        "Dir::Etc::preferencesparts=/dev/null".to_owned(),
        "Acquire::Languages=none".to_owned(),
        // apt's own user may not be able to read the cache.
        "APT::Sandbox::User=root".to_owned(),
    ];
    Ok(move || {
        let mut command = Command::new("apt-get");
        command.arg("-q").args(settings.iter().flat_map(|setting| ["-o", setting]));
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    })
}

/// The address of this system's Debian archive.
pub(super) fn archive() -> Result<String> {
    let format = "$(ORIGIN) $(COMPONENT) $(CODENAME) $(REPO_URI)";
    let output = Command::new("apt-get")
        .args(["indextargets", "Created-By: Packages", "--format", format])
        .output()
        .context("cannot run apt-get")?;
    let lines = String::from_utf8_lossy(&output.stdout);
    match lines.lines().find_map(source) {
        Some(uri) => Ok(uri.to_owned()),
        None => bail!("this system's package sources contain no Debian archive"),
    }
}

/// The address in a line of [`archive`], if it belongs to a Debian release and not to its updates.
fn source(line: &str) -> Option<&str> {
    let mut words = line.split(' ');
    let (origin, component, codename) = (words.next()?, words.next()?, words.next()?);
    (origin == "Debian" && component == "main" && !codename.contains('-')).then(|| words.next())?
}

fn unpack(archives: &Path, tree: &Path, log: &Path) -> Result<()> {
    fs::create_dir(tree)?;
    for entry in fs::read_dir(archives)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            job::run(Command::new("dpkg-deb").arg("--extract").arg(&path).arg(tree), log)?;
        }
    }
    Ok(())
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
    fn only_the_releases_own_archive_counts() {
        assert_eq!(source("Debian main bookworm mirror://archive/debian/"), Some("mirror://archive/debian/"));
        for other in
            ["Debian main bookworm-updates x", "Debian contrib bookworm x", "Ubuntu main noble x", "nonsense"]
        {
            assert_eq!(source(other), None, "{other}");
        }
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
