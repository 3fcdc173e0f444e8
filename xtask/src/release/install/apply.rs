//! Examines a system, and carries out a plan.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{
    manifest::Manifest,
    plan::{Product, Step, There},
};

/// The tree to install into: `/`, or a `--destdir`.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    root: PathBuf,
}

impl Tree {
    pub(super) fn new(destdir: Option<&Path>) -> Self {
        Self { root: destdir.unwrap_or(Path::new("/")).to_path_buf() }
    }

    /// The place of the installed system's path in this tree.
    pub(super) fn place(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    pub(super) fn look(&self, path: &Path, wanted: Option<&Product>) -> There {
        let place = self.place(path);
        // A link to a folder counts as a folder (/lib is one). A link in place of a file does not
        // count as that file.
        if place.is_dir() {
            return There::Folder;
        }
        let Ok(found) = fs::symlink_metadata(&place) else { return There::Nothing };
        let same = wanted.is_some_and(|wanted| {
            found.is_file()
                && found.mode() & 0o7777 == wanted.mode
                && fs::read(&place).is_ok_and(|content| content == wanted.content)
        });
        if same { There::Same } else { There::Other }
    }

    /// The manifest of an earlier installation, if there was one.
    pub(super) fn manifest(&self, path: &Path) -> Result<Option<Manifest>> {
        let place = self.place(path);
        match fs::read_to_string(&place) {
            Ok(text) => {
                Manifest::parse(&text).with_context(|| format!("{} is damaged", place.display())).map(Some)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", place.display())),
        }
    }

    pub(super) fn carry_out(&self, steps: &[Step]) -> Result<()> {
        steps.iter().try_for_each(|step| self.step(step))
    }

    fn step(&self, step: &Step) -> Result<()> {
        match step {
            Step::Unchanged { .. } | Step::Keep(_) => Ok(()),
            Step::MakeFolder(path) => make_folder(&self.place(path)),
            Step::Write { product, .. } => write(&self.place(&product.path), product),
            Step::RemoveFile(path) => {
                let place = self.place(path);
                fs::remove_file(&place).with_context(|| format!("cannot remove {}", place.display()))
            }
            Step::RemoveFolder(path) => remove_folder(&self.place(path)),
            Step::Run { command, tolerant } => run(command, *tolerant),
        }
    }
}

fn make_folder(place: &Path) -> Result<()> {
    let failed = || format!("cannot create {}", place.display());
    match fs::create_dir(place) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error).with_context(failed),
        _ => fs::set_permissions(place, fs::Permissions::from_mode(0o755)).with_context(failed),
    }
}

/// Writes a new file and renames it into place. A running program is then replaced and not written
/// to, and no reader sees half a file.
fn write(place: &Path, product: &Product) -> Result<()> {
    let work = || -> io::Result<()> {
        let folder = place.parent().unwrap_or(Path::new("/"));
        let mode = fs::Permissions::from_mode(product.mode);
        let mut file = tempfile::Builder::new().prefix(".injector-").tempfile_in(folder)?;
        file.write_all(&product.content)?;
        file.as_file().set_permissions(mode)?;
        file.as_file().sync_all()?;
        file.persist(place)?;
        Ok(())
    };
    work().with_context(|| format!("cannot write {}", place.display()))
}

/// Removes a folder if it is empty: others may have added files since.
fn remove_folder(place: &Path) -> Result<()> {
    match fs::remove_dir(place) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound) => {
            Err(error).with_context(|| format!("cannot remove {}", place.display()))
        }
        _ => Ok(()),
    }
}

fn run(command: &[String], tolerant: bool) -> Result<()> {
    let Some((program, arguments)) = command.split_first() else { return Ok(()) };
    let line = command.join(" ");
    let failed = match Command::new(program).args(arguments).status() {
        Ok(status) if status.success() => return Ok(()),
        Ok(status) => format!("`{line}` failed ({status})"),
        Err(error) => format!("cannot run `{line}`: {error}"),
    };
    if !tolerant {
        bail!("{failed}");
    }
    eprintln!("{failed}; continuing");
    Ok(())
}
