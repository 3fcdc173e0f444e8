//! Servers of the tests whose packages are not installed but unpacked into the tool cache. Mail servers,
//! because Debian does not let one install them beside Postfix; the tests lay them over `/usr` for the
//! server alone. CrowdSec and fail2ban, because their packages would start them and register this
//! machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use injector_testbed::tools;

use super::{
    apt,
    cache::{self, Cache},
    job, private_apt,
};

/// Debian's packages, with the names of the servers.
pub(super) const PACKAGES: [(&str, &str); 4] = [
    ("exim4-daemon-heavy", "Exim"),
    ("opensmtpd", "OpenSMTPD"),
    ("crowdsec", "CrowdSec"),
    ("fail2ban", "fail2ban"),
];

fn folder(cache: &Cache, package: &str) -> PathBuf {
    cache.tool(&tools::receiver(package))
}

/// Whether the package was unpacked.
pub(super) fn is_present(cache: &Cache, package: &str) -> bool {
    has_programs(&folder(cache, package))
}

fn has_programs(tree: &Path) -> bool {
    ["usr/sbin", "usr/bin"].iter().any(|programs| tree.join(programs).is_dir())
}

/// Downloads and unpacks a package and what this system lacks for it. Changes nothing outside the
/// cache.
///
/// # Errors
/// When apt does not know the package, or cannot fetch it.
pub(super) fn fetch(cache: &Cache, package: &str) -> Result<()> {
    eprintln!("setup: Debian's {package}, into the tool cache …");
    ensure!(apt::is_here(), "{package} can be fetched only on Debian");
    let log = job::fresh(cache.log(package)?)?;
    let partial = cache.partial()?;
    let archives = partial.path().join("archives");
    fs::create_dir_all(archives.join("partial"))?;
    let download = || {
        let mut command = Command::new("apt-get");
        // apt plans to remove Postfix, and stops after the download.
        command.args(["-q", "install", "-y", "--no-install-recommends", "--download-only", package]);
        command.args(["-o", &format!("Dir::Cache::archives={}", archives.display())]);
        // Nothing is installed, so nothing has to be locked, and root is not needed.
        command.args(["-o", "Debug::NoLocking=true", "-o", "APT::Sandbox::User=root"]);
        job::run(command.env("DEBIAN_FRONTEND", "noninteractive"), &log)
    };
    if let Err(error) = download() {
        // Old lists may name versions that the archive no longer has.
        ensure!(apt::may_install(), "{error:#}");
        apt::update(cache)?;
        download().with_context(|| format!("cannot fetch {package}"))?;
    }
    let tree = partial.path().join("tree");
    private_apt::unpack(&archives, &tree, &log)?;
    ensure!(has_programs(&tree), "{package} contains no server");
    cache::replace(&tree, &folder(cache, package))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receiver_is_found_where_the_tests_look_for_it() {
        let (_temporary, cache) = super::super::cache::scratch();
        assert!(!is_present(&cache, "opensmtpd"));
        fs::create_dir_all(cache.tool("receiver-opensmtpd/usr/sbin")).unwrap();
        assert!(is_present(&cache, "opensmtpd"));
    }

    #[test]
    #[ignore = "fetches packages from the network"]
    fn every_receiver_can_be_fetched() {
        let (_temporary, cache) = super::super::cache::scratch();
        for (package, _) in PACKAGES {
            fetch(&cache, package).unwrap();
            assert!(is_present(&cache, package), "{package}");
        }
    }
}
