//! The folder of the tools that `cargo xtask setup` installs: outside `target/`, so that all clones
//! share it.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// `$INJECTOR_TOOLS`, else `$XDG_CACHE_HOME/injector/tools`, else `~/.cache/injector/tools`. Creates
/// nothing.
///
/// # Errors
/// When none of the three variables is set, or the first is not an absolute path.
pub fn folder() -> anyhow::Result<PathBuf> {
    choose(env::var_os("INJECTOR_TOOLS"), env::var_os("XDG_CACHE_HOME"), env::var_os("HOME"))
}

/// The name of the folder, in the tool cache, of a receiver's unpacked packages.
#[must_use]
pub fn receiver(package: &str) -> String {
    format!("receiver-{package}")
}

/// By the same rule as in `injector-user/build.rs`. A build script runs in another folder than
/// xtask, so the path must be absolute. The XDG specification ignores relative paths.
fn choose(
    tools: Option<OsString>,
    xdg_cache: Option<OsString>,
    home: Option<OsString>,
) -> anyhow::Result<PathBuf> {
    if let Some(tools) = tools.filter(|path| !path.is_empty()).map(PathBuf::from) {
        if !tools.is_absolute() {
            bail!("INJECTOR_TOOLS={} must be an absolute path", tools.display());
        }
        return Ok(tools);
    }
    let absolute = |path: Option<OsString>| path.map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(xdg_cache)
        .or_else(|| absolute(home).map(|home| home.join(".cache")))
        .map(|cache| cache.join(Path::new("injector/tools")))
        .context("no folder for tools: set INJECTOR_TOOLS, XDG_CACHE_HOME or HOME")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(tools: &str, xdg: &str, home: &str) -> anyhow::Result<PathBuf> {
        let set = |value: &str| (value != "unset").then(|| OsString::from(value));
        choose(set(tools), set(xdg), set(home))
    }

    #[test]
    fn the_most_specific_variable_decides() {
        for (tools, xdg, home, expected) in [
            ("/t", "/x", "/h", "/t"),
            ("unset", "/x", "/h", "/x/injector/tools"),
            ("", "/x", "/h", "/x/injector/tools"),
            ("unset", "relative", "/h", "/h/.cache/injector/tools"),
            ("unset", "unset", "/h", "/h/.cache/injector/tools"),
        ] {
            assert_eq!(chosen(tools, xdg, home).unwrap(), Path::new(expected), "{tools} {xdg} {home}");
        }
    }

    #[test]
    fn missing_and_relative_folders_are_rejected() {
        assert!(chosen("here", "/x", "/h").unwrap_err().to_string().contains("INJECTOR_TOOLS=here"));
        assert!(chosen("unset", "unset", "unset").is_err());
    }
}
