//! The files of an installation: the program, its manual pages and completions, and those of
//! `deploy/`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::{
    layout::{CONFIG, Layout},
    plan::Product,
};
use crate::cargo;

/// The program's path in the units of `deploy/systemd`, which is the Debian package's.
const PROGRAM_IN_UNITS: &str = "/usr/bin/injector";

/// All files to install, the program first.
///
/// # Errors
/// When the program does not run, or a file of `deploy/` cannot be read.
pub(super) fn all(layout: &Layout, binary: &Path) -> Result<Vec<Product>> {
    let scratch = tempfile::tempdir().context("no temporary folder")?;
    let program = fs::read(binary).with_context(|| format!("cannot read {}", binary.display()))?;
    let mut products = vec![Product { mode: 0o755, ..file(layout.program(), program) }];
    for unit in ["injector.service", "injector.socket"] {
        let text = String::from_utf8(deploy(&format!("systemd/{unit}"))?).context("a unit is text")?;
        let text = text.replace(PROGRAM_IN_UNITS, &layout.program().to_string_lossy());
        products.push(file(layout.units().join(unit), text.into_bytes()));
    }
    products.push(file(layout.sysusers(), deploy("systemd/injector.sysusers")?));
    products.push(file(layout.tmpfiles(), deploy("systemd/injector.tmpfile")?));
    let sample = deploy("injector.toml")?;
    products.push(file(layout.share("doc/injector/injector.toml"), sample.clone()));
    products.push(Product { config: true, ..file(CONFIG.into(), sample) });
    for (name, page) in man(binary, scratch.path())? {
        products.push(file(layout.share("man/man1").join(name), page));
    }
    for (shell, place) in SHELLS {
        products.push(file(layout.share(place), completions(binary, shell)?));
    }
    Ok(products)
}

/// shell, its file below `share`
const SHELLS: [(&str, &str); 3] = [
    ("bash", "bash-completion/completions/injector"),
    ("zsh", "zsh/site-functions/_injector"),
    ("fish", "fish/vendor_completions.d/injector.fish"),
];

fn file(path: PathBuf, content: Vec<u8>) -> Product {
    Product { path, mode: 0o644, content, config: false }
}

fn deploy(path: &str) -> Result<Vec<u8>> {
    let path = cargo::workspace().join("deploy").join(path);
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// The manual pages, sorted by name.
pub(crate) fn man(binary: &Path, scratch: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    ask(binary, &["man", "--out", &scratch.to_string_lossy()])?;
    let mut pages = Vec::new();
    for entry in fs::read_dir(scratch)? {
        let entry = entry?;
        pages.push((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?));
    }
    ensure!(!pages.is_empty(), "{} wrote no manual page", binary.display());
    pages.sort();
    Ok(pages)
}

/// The shell's completions for commands and options.
pub(crate) fn completions(binary: &Path, shell: &str) -> Result<Vec<u8>> {
    ask(binary, &["completions", shell])
}

fn ask(binary: &Path, arguments: &[&str]) -> Result<Vec<u8>> {
    let output = Command::new(binary).args(arguments).output();
    let output = output.with_context(|| format!("cannot run {}", binary.display()))?;
    let printed = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} {}: {}", binary.display(), arguments.join(" "), printed.trim());
    Ok(output.stdout)
}
