//! The list of installed files, kept beside them. Uninstalling removes these and nothing else.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

/// Paths as the installed system sees them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// Files of the injector.
    pub(crate) files: Vec<PathBuf>,
    /// Files that belong to the operator after the installation.
    pub(crate) configs: Vec<PathBuf>,
    /// Folders that the installation created.
    pub(crate) folders: Vec<PathBuf>,
}

const HEADING: &str = "# Written by `cargo xtask install`; read by `cargo xtask uninstall`.\n";

impl Manifest {
    pub(crate) fn render(&self) -> String {
        let mut text = HEADING.to_owned();
        let kinds = [("file", &self.files), ("config", &self.configs), ("folder", &self.folders)];
        for (kind, paths) in kinds {
            for path in paths {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{kind} {}", path.display());
            }
        }
        text
    }

    /// # Errors
    /// When a line is not valid. Removing nothing is better than removing the wrong file.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let mut manifest = Self::default();
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (kind, path) = line.split_once(' ').with_context(|| format!("no path in {line:?}"))?;
            if !Path::new(path).is_absolute() || path.split('/').any(|part| part == "..") {
                bail!("not an absolute path: {line:?}");
            }
            match kind {
                "file" => manifest.files.push(path.into()),
                "config" => manifest.configs.push(path.into()),
                "folder" => manifest.folders.push(path.into()),
                _ => bail!("an unknown kind: {line:?}"),
            }
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_manifest_is_read_back() {
        let manifest = Manifest {
            files: vec!["/usr/local/bin/injector".into(), "/a b".into()],
            configs: vec!["/etc/injector/injector.toml".into()],
            folders: vec!["/etc/injector".into()],
        };
        assert_eq!(Manifest::parse(&manifest.render()).unwrap(), manifest);
    }

    #[test]
    fn a_damaged_manifest_is_rejected() {
        for line in ["file", "file relative", "file /usr/../etc/passwd", "link /usr/bin/x"] {
            assert!(Manifest::parse(line).is_err(), "{line}");
        }
    }
}
