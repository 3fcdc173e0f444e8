//! Debian's kernels, in which `cargo xtask kernels` boots this machine's system.
//!
//! Their packages are unpacked into the tool cache and not installed. A kernel is fetched once; the
//! newest of that moment then stays until it is fetched again.

use std::{
    cmp::Reverse,
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    cache::{self, Cache},
    job,
    private_apt::{self, PrivateApt},
};

/// The kernels for virtual machines: the code of Debian's other kernels, with fewer drivers and a
/// third of their size.
const FLAVOUR: &str = "-cloud-amd64";

/// Debian releases that have kernels, a stable release before its backports.
const SUITES: [&str; 7] =
    ["bookworm", "trixie", "bookworm-backports", "trixie-backports", "forky", "sid", "experimental"];

/// Where the newest kernel is found.
const SUITES_OF_NEWEST: [&str; 3] = ["trixie-backports", "sid", "experimental"];

/// The packages of one kernel, if a release splits it.
const PARTS: [&str; 4] = ["linux-image-", "linux-base-", "linux-binary-", "linux-modules-"];

/// The file with the kernel's release, as `uname -r` prints it.
const RELEASE_FILE: &str = "release";

/// Which kernel is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The newest of a series: 6.1, for example.
    Series(u32, u32),
    /// The newest that Debian has.
    Newest,
    /// One release: 6.1.0-50-amd64, for example.
    Release(String),
}

/// What the tests run in: the oldest supported kernel, the one of Debian stable, and the newest.
pub(crate) const DEFAULT: [Wanted; 3] = [Wanted::Series(6, 1), Wanted::Series(6, 12), Wanted::Newest];

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "newest" {
            return Ok(Self::Newest);
        }
        if text.ends_with("-amd64") && text.starts_with(|c: char| c.is_ascii_digit()) && !text.contains('/') {
            return Ok(Self::Release(text.to_owned()));
        }
        let series = text
            .split_once('.')
            .and_then(|(major, minor)| Some(Self::Series(major.parse().ok()?, minor.parse().ok()?)));
        series.ok_or_else(|| {
            format!("`{text}` is neither a series (6.12), a release (6.1.0-50-amd64) nor `newest`")
        })
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Series(major, minor) => write!(f, "{major}.{minor}"),
            Self::Newest => f.write_str("newest"),
            Self::Release(release) => f.write_str(release),
        }
    }
}

impl Wanted {
    fn suites(&self) -> &'static [&'static str] {
        match self {
            Self::Newest => &SUITES_OF_NEWEST,
            Self::Series(..) | Self::Release(_) => &SUITES,
        }
    }

    /// The release to take among a suite's packages.
    fn choose(&self, packages: &[&str]) -> Option<String> {
        let releases = packages.iter().filter_map(|package| package.strip_prefix("linux-image-"));
        if let Self::Release(release) = self {
            return releases.into_iter().find(|it| it == release).map(ToOwned::to_owned);
        }
        let of_series = |numbers: &[u32]| match self {
            Self::Series(major, minor) => numbers.starts_with(&[*major, *minor]),
            Self::Newest | Self::Release(_) => true,
        };
        releases
            .filter_map(|release| Some((numbers(release)?, release)))
            .filter(|(numbers, _)| of_series(numbers))
            .max()
            .map(|(_, release)| release.to_owned())
    }
}

/// The numbers of a release of our flavour, in the order in which they compare; `None` for others and
/// for release candidates.
fn numbers(release: &str) -> Option<Vec<u32>> {
    let version = release.strip_suffix(FLAVOUR)?;
    if !version.starts_with(|c: char| c.is_ascii_digit()) || version.contains("rc") {
        return None;
    }
    let numbers = version.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    numbers.map(|digits| digits.parse().ok()).collect()
}

/// A kernel in the tool cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// As `uname -r` prints it.
    pub(crate) release: String,
    /// What its packages contain.
    pub(crate) tree: PathBuf,
}

impl Kernel {
    /// The first two numbers of its release.
    pub(crate) fn series(&self) -> Option<(u32, u32)> {
        let (major, rest) = self.release.split_once('.')?;
        let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    }

    /// The compressed kernel that a boot loader starts.
    pub(crate) fn image(&self) -> PathBuf {
        let old = self.tree.join("boot").join(format!("vmlinuz-{}", self.release));
        if old.is_file() { old } else { self.modules().join("vmlinuz") }
    }

    /// The folder of its modules.
    pub(crate) fn modules(&self) -> PathBuf {
        self.tree.join("lib/modules").join(&self.release)
    }
}

fn folder(cache: &Cache, wanted: &Wanted) -> PathBuf {
    cache.tool(&format!("linux-{wanted}"))
}

/// The kernel, if it was fetched.
pub(super) fn find(cache: &Cache, wanted: &Wanted) -> Option<Kernel> {
    let folder = folder(cache, wanted);
    let release = fs::read_to_string(folder.join(RELEASE_FILE)).ok()?;
    let kernel = Kernel { release: release.trim().to_owned(), tree: folder.join("tree") };
    kernel.image().is_file().then_some(kernel)
}

/// Downloads and unpacks the kernel, in place of one that was fetched before.
///
/// # Errors
/// When Debian has no such kernel or its archive cannot be reached. The cache is then unchanged.
pub(super) fn fetch(cache: &Cache, wanted: &Wanted) -> Result<()> {
    eprintln!("setup: Debian's kernel {wanted} …");
    let log = job::fresh(cache.log(&format!("linux-{wanted}"))?)?;
    let partial = cache.partial()?;
    let source = Source::find(wanted, partial.path(), &log)?;
    let (packages, finished) = (partial.path().join("packages"), partial.path().join("finished"));
    for folder in [&packages, &finished] {
        fs::create_dir(folder)?;
    }
    let mut download = source.apt.command("apt-get");
    job::run(download.arg("download").args(&source.packages).current_dir(&packages), &log)
        .with_context(|| format!("cannot fetch kernel {}", source.release))?;
    let tree = finished.join("tree");
    private_apt::unpack(&packages, &tree, &log)?;
    // depmod and modprobe know only /lib/modules; newer packages rely on a merged /usr.
    if !tree.join("lib/modules").exists() {
        std::os::unix::fs::symlink("usr/lib", tree.join("lib"))?;
    }
    job::run(Command::new("depmod").arg("--basedir").arg(&tree).arg(&source.release), &log)?;
    fs::write(finished.join(RELEASE_FILE), format!("{}\n", source.release))?;
    let kernel = Kernel { release: source.release, tree };
    ensure!(kernel.image().is_file(), "the packages of {} contain no kernel", kernel.release);
    cache::replace(&finished, &folder(cache, wanted))
}

/// The suite that has the kernel, and what to fetch from it.
struct Source {
    apt: PrivateApt,
    release: String,
    packages: Vec<String>,
}

impl Source {
    /// The first suite that has the series or release; for the newest, the suite that has it.
    fn find(wanted: &Wanted, folder: &Path, log: &Path) -> Result<Self> {
        let mut found = Vec::new();
        for suite in wanted.suites() {
            let apt = PrivateApt::new(&folder.join(suite), suite)?;
            job::run(apt.command("apt-get").arg("update"), log)
                .with_context(|| format!("cannot fetch the lists of Debian {suite}"))?;
            let output = apt.command("apt-cache").args(["pkgnames", "linux-"]).output()?;
            let names = String::from_utf8_lossy(&output.stdout).into_owned();
            let names: Vec<&str> = names.lines().collect();
            let Some(release) = wanted.choose(&names) else { continue };
            let packages = PARTS.map(|part| format!("{part}{release}"));
            let packages = packages.into_iter().filter(|name| names.contains(&name.as_str())).collect();
            found.push(Self { apt, release, packages });
            if *wanted != Wanted::Newest {
                break;
            }
        }
        found.sort_by_key(|source| Reverse(numbers(&source.release)));
        match found.into_iter().next() {
            Some(source) => Ok(source),
            None => bail!("none of {} has kernel {wanted}", wanted.suites().join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKAGES: [&str; 10] = [
        "linux-image-6.12.90+deb12-cloud-amd64",
        "linux-image-6.12.107+deb13-cloud-amd64",
        "linux-image-6.12.107+deb13.1-cloud-amd64",
        "linux-image-6.12.117+deb13-amd64",
        "linux-image-6.1.0-9-cloud-amd64",
        "linux-image-6.1.0-50-cloud-amd64",
        "linux-image-7.4-rc2-cloud-amd64",
        "linux-image-7.3-cloud-amd64",
        "linux-image-7.3.4+deb13-cloud-amd64",
        "linux-image-cloud-amd64",
    ];

    fn wanted(text: &str) -> Wanted {
        text.parse().unwrap()
    }

    #[test]
    fn versions_are_named_by_series_release_or_newest() {
        for text in ["6.1", "6.12", "newest", "6.1.0-50-amd64", "7.3.4+deb13-cloud-amd64"] {
            assert_eq!(wanted(text).to_string(), text);
        }
        assert_eq!(wanted("6.12"), Wanted::Series(6, 12));
        for text in ["6", "six", "6.x", "6.1.0-50-arm64", "../6.1-amd64", "6.1/../-amd64"] {
            assert!(Wanted::from_str(text).unwrap_err().contains(text), "{text}");
        }
    }

    #[test]
    fn the_highest_release_is_chosen_by_its_numbers() {
        for (text, release) in [
            ("6.12", "6.12.107+deb13.1-cloud-amd64"),
            ("6.1", "6.1.0-50-cloud-amd64"),
            ("newest", "7.3.4+deb13-cloud-amd64"),
            ("6.12.117+deb13-amd64", "6.12.117+deb13-amd64"),
        ] {
            assert_eq!(wanted(text).choose(&PACKAGES).as_deref(), Some(release), "{text}");
        }
        for text in ["5.10", "6.1.0-51-amd64"] {
            assert_eq!(wanted(text).choose(&PACKAGES), None, "{text}");
        }
    }

    #[test]
    fn a_kernel_is_found_once_its_image_is_there() {
        let (_temporary, cache) = super::super::cache::scratch();
        let newest = folder(&cache, &Wanted::Newest);
        assert_eq!(newest, cache.tool("linux-newest"));
        let modules = newest.join("tree/lib/modules/7.3-cloud-amd64");
        fs::create_dir_all(&modules).unwrap();
        fs::write(newest.join(RELEASE_FILE), "7.3-cloud-amd64\n").unwrap();
        assert_eq!(find(&cache, &Wanted::Newest), None);
        fs::write(modules.join("vmlinuz"), "").unwrap();
        let kernel = find(&cache, &Wanted::Newest).unwrap();
        assert_eq!((kernel.release.as_str(), kernel.modules()), ("7.3-cloud-amd64", modules));
        assert_eq!(kernel.series(), Some((7, 3)));
    }

    #[test]
    #[ignore = "fetches packages from the network"]
    fn every_default_kernel_can_be_fetched() {
        let (_temporary, cache) = super::super::cache::scratch();
        for wanted in DEFAULT {
            fetch(&cache, &wanted).unwrap();
            assert!(find(&cache, &wanted).is_some(), "{wanted}");
        }
    }
}
