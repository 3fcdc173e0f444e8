//! An apt with one source, which keeps lists and state in a folder of its own: it fetches packages of
//! other Debian releases, and the system is not changed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{job, packages::program};

/// The keys of all Debian releases, in package debian-archive-keyring.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An apt for one Debian release. No package counts as installed.
pub(super) struct PrivateApt {
    folder: PathBuf,
    settings: Vec<String>,
}

impl PrivateApt {
    /// Prepares the folder. The packages come from this system's Debian archive, by its network
    /// settings.
    ///
    /// # Errors
    /// When this system has no apt, keys or Debian archive.
    pub(super) fn new(folder: &Path, suite: &str) -> Result<Self> {
        ensure!(
            program("apt-get").is_some() && program("dpkg-deb").is_some() && Path::new(KEYRING).exists(),
            "packages of Debian {suite} can be fetched only with apt-get, dpkg-deb and {KEYRING}"
        );
        let archive = archive()?;
        for inner in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(inner))
                .with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let of = |kind: &str| format!("{kind} [signed-by={KEYRING}] {archive} {suite} main\n");
        fs::write(folder.join("sources.list"), of("deb") + &of("deb-src"))?;
        fs::write(folder.join("status"), "")?;
        let set = |name: &str, path: &str| format!("{name}={}", folder.join(path).display());
        let settings = vec![
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
        Ok(Self { folder: folder.to_path_buf(), settings })
    }

    /// `apt-get` or `apt-cache`.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-q").args(self.settings.iter().flat_map(|setting| ["-o", setting]));
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// The folder of the packages that `apt-get install --download-only` fetched.
    pub(super) fn downloaded(&self) -> PathBuf {
        self.folder.join("cache/archives")
    }
}

/// Unpacks all packages in a folder into a new tree.
pub(super) fn unpack(packages: &Path, tree: &Path, log: &Path) -> Result<()> {
    fs::create_dir(tree)?;
    for entry in fs::read_dir(packages)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            job::run(Command::new("dpkg-deb").arg("--extract").arg(&path).arg(tree), log)?;
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_releases_own_archive_counts() {
        assert_eq!(source("Debian main bookworm mirror://archive/debian/"), Some("mirror://archive/debian/"));
        for other in
            ["Debian main bookworm-updates x", "Debian contrib bookworm x", "Ubuntu main noble x", "nonsense"]
        {
            assert_eq!(source(other), None, "{other}");
        }
    }
}
