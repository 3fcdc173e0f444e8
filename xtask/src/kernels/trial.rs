//! Trials of the suite in a machine: which, and the command that runs them.

use std::{fmt, path::Path, str::FromStr, time::Duration};

use super::shell;
use crate::cargo::Executable;

/// A test program of the suite, or those of its trials whose name contains a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trials {
    pub(super) program: String,
    filter: Option<String>,
}

/// What a run without `--trials` includes.
pub(super) const DEFAULT: &[&str] =
    &["splice", "faults:splice/transfer/", "faults:splice/close/both", "inline:survives/", "mail:splice"];

impl FromStr for Trials {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (program, filter) = match text.split_once(':') {
            Some((program, filter)) => (program, Some(filter.to_owned())),
            None => (text, None),
        };
        if program.is_empty() || filter.as_ref().is_some_and(String::is_empty) {
            return Err(format!("`{text}` is not PROGRAM or PROGRAM:FILTER"));
        }
        Ok(Self { program: program.to_owned(), filter })
    }
}

impl fmt::Display for Trials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.program)?;
        self.filter.as_ref().map_or(Ok(()), |filter| write!(f, ":{filter}"))
    }
}

impl Trials {
    /// The command that runs them as `cargo xtask test` does, with the kernel's warnings after them.
    pub(super) fn command(&self, program: &Executable, daemon: &Path, limit: Duration) -> String {
        let folder = shell::quote(&program.folder.to_string_lossy());
        let daemon = shell::quote(&daemon.to_string_lossy());
        let filter = self.filter.as_deref().map(shell::quote).unwrap_or_default();
        format!(
            "dmesg --clear\n\
             export CARGO_MANIFEST_DIR={folder} INJECTOR_BIN={daemon}\n\
             cd {folder} && timeout -k 5 {} {} {filter} 2>&1; code=$?\n\
             dmesg --level=emerg,alert,crit,err,warn | tail -n 20 | sed 's/^/kernel: /'\n\
             exit $code\n",
            limit.as_secs(),
            shell::quote(&program.path.to_string_lossy()),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trials_are_a_program_with_or_without_a_filter() {
        for text in ["splice", "faults:close/both sides at once", "mail:a:b"] {
            assert_eq!(text.parse::<Trials>().unwrap().to_string(), text);
        }
        for text in ["", ":close", "faults:"] {
            assert!(text.parse::<Trials>().is_err(), "{text:?}");
        }
        assert!(DEFAULT.iter().all(|text| text.parse::<Trials>().is_ok()));
    }

    #[test]
    fn the_command_has_the_daemon_and_the_filter() {
        let made = |target: &str| Executable {
            package: "injector-suite".into(),
            folder: "/w/tests/suite".into(),
            target: target.into(),
            kind: "test".into(),
            harness: true,
            path: format!("/w/target/{target}").into(),
        };
        let trials: Trials = "faults:close/both sides".parse().unwrap();
        let command =
            trials.command(&made("faults"), Path::new("/w/target/injector"), Duration::from_secs(60));
        assert!(command.contains("INJECTOR_BIN='/w/target/injector'"), "{command}");
        assert!(command.contains("timeout -k 5 60 '/w/target/faults' 'close/both sides' 2>&1"), "{command}");
    }
}
