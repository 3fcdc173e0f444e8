//! Installs Debian packages without starting their services.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::{
    cache::Cache,
    job,
    packages::{POSTFIX_ANSWER, program},
    toolchain,
};

/// Whether this machine's packages are Debian's: it has apt and dpkg.
pub(super) fn is_here() -> bool {
    program("apt-get").is_some() && program("dpkg").is_some()
}

/// Whether packages may be installed, which only root may do.
pub(super) fn may_install() -> bool {
    // SAFETY: geteuid(2) only reads this process' identity and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// The output of `apt-cache show` for the version that would be installed; empty if apt does not
/// know the package.
pub(super) fn description(package: &str) -> String {
    let output = Command::new("apt-cache").args(["show", "--no-all-versions", package]).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

/// Whether apt could install all of these with its current lists.
pub(super) fn knows<'a>(packages: impl IntoIterator<Item = &'a str>) -> bool {
    packages.into_iter().all(|package| !description(package).is_empty())
}

/// Fetches the package lists.
pub(super) fn update(cache: &Cache) -> Result<()> {
    eprintln!("setup: apt-get update …");
    job::run(Command::new("apt-get").args(["-q", "update"]), &job::fresh(cache.log("apt-update")?)?)
}

/// Whether apt has a Rust compiler for BPF that is new enough.
pub(super) fn offers_compiler() -> bool {
    let [(compiler, _), (core, _)] = super::packages::DEBIAN_COMPILER;
    let release = toolchain::release_of_package(&description(compiler));
    release.is_some_and(|release| release >= toolchain::oldest()) && knows([core])
}

/// The LLVM major of apt's Rust compiler, taken from its library's dependencies.
pub(super) fn llvm_of_compiler() -> Option<u32> {
    let (major, minor) = toolchain::release_of_package(&description(super::packages::DEBIAN_COMPILER[0].0))?;
    toolchain::llvm_of_package(&description(&format!("libstd-rust-web-{major}.{minor}")))
}

/// Installs packages. Their services are started neither now nor at the next boot.
///
/// # Errors
/// When apt fails, or would have to remove a package (another mail server, for example). The error has the end of its log.
pub(super) fn install(packages: &[String], cache: &Cache) -> Result<()> {
    let names = packages.iter().map(String::as_str);
    let mut updated = !knows(names);
    if updated {
        update(cache)?;
    }
    eprintln!("setup: apt-get install {} …", packages.join(" "));
    let log = job::fresh(cache.log("apt-install")?)?;
    let _quiet = NoServices::begin(Path::new("/usr/sbin/policy-rc.d"))?;
    if packages.iter().any(|name| name == "postfix") {
        answer_postfix(&log)?;
    }
    loop {
        let done = job::run(
            Command::new("apt-get")
                .args(["-q", "install", "-y", "--no-install-recommends", "--no-remove"])
                // Keep a configuration that the operator changed; apt cannot ask here.
                .args(["-o", "Dpkg::Options::=--force-confold"])
                .args(packages)
                .env("DEBIAN_FRONTEND", "noninteractive"),
            &log,
        );
        match done {
            Ok(()) => break,
            // Old lists may name versions that the archive no longer has.
            Err(_) if !updated => update(cache)?,
            Err(error) => return Err(error.context("apt could not install what is missing")),
        }
        updated = true;
    }
    keep_off(packages, &log);
    Ok(())
}

fn answer_postfix(log: &Path) -> Result<()> {
    let script = format!("echo '{POSTFIX_ANSWER}' | debconf-set-selections");
    job::run(Command::new("sh").args(["-c", &script]), log)
}

/// Disables the services, which packages enable for the next boot. The tests start their own
/// servers.
fn keep_off(packages: &[String], log: &Path) {
    const SERVICES: [(&str, &str); 7] = [
        ("postfix", "postfix"),
        ("dovecot-core", "dovecot"),
        ("haproxy", "haproxy"),
        ("nginx", "nginx"),
        ("prometheus", "prometheus"),
        ("prometheus-node-exporter", "prometheus-node-exporter"),
        ("prometheus-pushgateway", "prometheus-pushgateway"),
    ];
    let new = SERVICES.iter().filter(|(package, _)| packages.iter().any(|name| name == package));
    let units: Vec<_> = new.map(|(_, unit)| *unit).collect();
    if !units.is_empty()
        && program("systemctl").is_some()
        && let Err(error) = job::run(Command::new("systemctl").arg("disable").args(&units), log)
    {
        eprintln!("setup: {} may start at the next boot: {error:#}", units.join(", "));
    }
}

/// The second line of a policy that this program wrote, followed by the process id of the setup.
const MARK: &str = "# by the injector's setup, process ";

/// While it exists, package scripts cannot start services: invoke-rc.d runs `policy-rc.d`, and exit
/// code 101 forbids the action. An existing policy is kept.
struct NoServices {
    ours: Option<PathBuf>,
}

impl NoServices {
    fn begin(path: &Path) -> Result<Self> {
        let text = format!("#!/bin/sh\n{MARK}{}\nexit 101\n", process::id());
        if is_stale(path) {
            fs::remove_file(path)
                .with_context(|| format!("cannot remove a killed setup's {}", path.display()))?;
        }
        let created = fs::File::options().write(true).create_new(true).open(path);
        let mut file = match created {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Self::trust(path),
            Err(error) => return Err(error).with_context(|| format!("cannot create {}", path.display())),
        };
        let ours = Self { ours: Some(path.to_path_buf()) };
        file.write_all(text.as_bytes())
            .and_then(|()| file.set_permissions(fs::Permissions::from_mode(0o755)))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(ours)
    }

    /// Checks that the machine's own policy forbids starting services.
    fn trust(path: &Path) -> Result<Self> {
        let verdict = Command::new(path).args(["postfix", "start"]).stdout(Stdio::null()).status();
        let code = verdict.with_context(|| format!("cannot run {}", path.display()))?.code();
        if code != Some(101) {
            bail!(
                "{} lets packages start their services, and setup must not start a mail server here: \
                 install the packages by hand (`cargo xtask setup --check` names them)",
                path.display()
            );
        }
        Ok(Self { ours: None })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(path) = &self.ours
            && let Err(error) = fs::remove_file(path)
        {
            eprintln!(
                "setup: remove {} by hand, because it prevents services from starting: {error}",
                path.display()
            );
        }
    }
}

/// Whether the policy was written by a setup that no longer runs.
fn is_stale(path: &Path) -> bool {
    let Ok(text) = fs::read_to_string(path) else { return false };
    let pid = text.lines().find_map(|line| line.strip_prefix(MARK)).and_then(|pid| pid.parse::<u32>().ok());
    pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::script;

    fn policy(code: u8) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy-rc.d");
        script::write(&path, &format!("#!/bin/sh\nexit {code}\n"));
        (folder, path)
    }

    #[test]
    fn services_do_not_start_and_the_policy_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy-rc.d");
        let quiet = NoServices::begin(&path).unwrap();
        assert!(fs::read_to_string(&path).unwrap().ends_with("exit 101\n"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o755);
        assert!(!is_stale(&path), "its setup is running");
        drop(quiet);
        assert!(!path.exists());
    }

    #[test]
    fn a_machines_own_policy_is_kept() {
        let (_folder, path) = policy(101);
        let before = fs::read_to_string(&path).unwrap();
        drop(NoServices::begin(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), before);
    }

    #[test]
    fn a_policy_that_starts_services_stops_the_setup() {
        let (_folder, path) = policy(0);
        assert!(NoServices::begin(&path).is_err());
        assert!(path.exists());
    }

    #[test]
    fn the_policy_of_a_killed_setup_is_replaced() {
        let (_folder, path) = policy(0);
        // No process has this number: the kernel's limit is 2^22.
        fs::write(&path, format!("#!/bin/sh\n{MARK}4194305\nexit 101\n")).unwrap();
        drop(NoServices::begin(&path).unwrap());
        assert!(!path.exists());
    }
}
