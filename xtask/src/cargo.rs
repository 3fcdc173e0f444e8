//! Running cargo from within cargo.

use std::{
    env,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// Every package that the host's compiler can build. All verbs use the same selection: other
/// packages would mean other features, and a second build of the dependencies. Tests add features
/// of their own.
pub(crate) const HOST_PACKAGES: [&str; 3] = ["--workspace", "--exclude", "injector-ebpf"];

/// The folder of the workspace's `Cargo.toml`.
pub(crate) fn workspace() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// The cargo that runs this program, in the workspace's folder.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    forget_this_package(&mut command);
    command
}

/// Removes the variables that `cargo run` set for this package. Build scripts that watch one
/// (ring's does) would otherwise run again whenever a build is started from a shell instead.
pub(crate) fn forget_this_package(command: &mut Command) {
    let is_of_package = |name: &str| {
        name.starts_with("CARGO_PKG_")
            || matches!(name, "CARGO_MANIFEST_DIR" | "CARGO_MANIFEST_PATH" | "CARGO_BIN_NAME")
    };
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_of_package) {
            command.env_remove(name);
        }
    }
}

/// Runs a command whose output the operator sees.
///
/// # Errors
/// When it can't be started or fails; the message is the command line.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    announce(command);
    let status = command.status().with_context(|| format!("cannot start `{}`", line(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", line(command));
    }
    Ok(())
}

fn announce(command: &Command) {
    eprintln!("$ {}", line(command));
}

/// The command line as an operator would type it; the program without its folder.
pub(crate) fn line(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// One executable that a build made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Executable {
    /// The package's name.
    pub(crate) package: String,
    /// The package's folder, in which cargo would run its tests.
    pub(crate) folder: PathBuf,
    /// The target's name: of the library, program or test file.
    pub(crate) target: String,
    /// The target's kind: `lib`, `bin` or `test`.
    pub(crate) kind: String,
    /// Whether it is a test harness, not the program itself.
    pub(crate) harness: bool,
    /// The file.
    pub(crate) path: PathBuf,
}

/// Runs a cargo command that builds, and returns the executables that it made.
///
/// # Errors
/// When the build fails; the compiler's messages have been shown.
pub(crate) fn executables(command: &mut Command) -> Result<Vec<Executable>> {
    announce(command);
    let mut child = command
        .arg("--message-format=json-render-diagnostics")
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", line(command)))?;
    let mut found = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        for text in BufReader::new(stdout).lines() {
            found.extend(executable(&text.context("reading cargo's messages")?));
        }
    }
    let status = child.wait().context("waiting for cargo")?;
    if !status.success() {
        bail!("`{}` failed ({status})", line(command));
    }
    Ok(found)
}

/// The executable that one of cargo's JSON messages reports, if it reports one.
fn executable(message: &str) -> Option<Executable> {
    let message: Value = serde_json::from_str(message).ok()?;
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    let folder = Path::new(message["manifest_path"].as_str()?).parent()?.to_path_buf();
    let target = &message["target"];
    Some(Executable {
        package: package_name(message["package_id"].as_str()?, &folder),
        target: target["name"].as_str()?.to_owned(),
        kind: target["kind"][0].as_str()?.to_owned(),
        harness: message["profile"]["test"].as_bool()?,
        path: message["executable"].as_str()?.into(),
        folder,
    })
}

/// `path+file:///w/tests/suite#injector-suite@0.1.0`, or `path+file:///w/xtask#0.1.0` where folder
/// and package have one name.
fn package_name(id: &str, folder: &Path) -> String {
    let fragment = id.rsplit_once('#').map_or(id, |(_, fragment)| fragment);
    match fragment.split_once('@') {
        Some((name, _version)) => name.to_owned(),
        None => folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGE: &str = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/tests/suite#injector-suite@0.1.0",
        "manifest_path":"/w/tests/suite/Cargo.toml","target":{"kind":["test"],"name":"splice"},
        "profile":{"test":true},"executable":"/w/target/debug/deps/splice-1"}"#;

    #[test]
    fn an_artifact_with_an_executable_is_reported() {
        let found = executable(MESSAGE).unwrap();
        assert_eq!(found.package, "injector-suite");
        assert_eq!(found.folder, Path::new("/w/tests/suite"));
        assert_eq!((found.target.as_str(), found.kind.as_str(), found.harness), ("splice", "test", true));
        assert_eq!(found.path, Path::new("/w/target/debug/deps/splice-1"));
    }

    #[test]
    fn libraries_and_other_messages_are_not() {
        assert_eq!(executable(&MESSAGE.replace(r#""/w/target/debug/deps/splice-1""#, "null")), None);
        assert_eq!(executable(r#"{"reason":"build-finished","success":true}"#), None);
        assert_eq!(executable("not JSON"), None);
    }

    #[test]
    fn a_package_named_like_its_folder_has_no_name_in_its_id() {
        assert_eq!(package_name("path+file:///w/xtask#0.1.0", Path::new("/w/xtask")), "xtask");
    }
}
