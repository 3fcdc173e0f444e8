//! What the schemas of Kubernetes' versions think of the objects.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use serde_json::json;

/// The oldest that the chart takes, and what is in use. Each must be one that `kubernetes-validate`
/// has.
pub(super) const VERSIONS: [&str; 5] = ["1.29", "1.33", "1.35", "1.36", "1.37"];

/// No registry that `setup` uses has schemas of these: they are counted, and not called valid.
pub(super) const WITHOUT_SCHEMA: [&str; 2] =
    ["metallb.io/v1beta1 IPAddressPool", "metallb.io/v1beta1 L2Advertisement"];

/// One object's outcome under one version.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Answer {
    pub(super) file: PathBuf,
    pub(super) version: String,
    api: String,
    kind: String,
    name: String,
    outcome: Outcome,
    message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Valid,
    Invalid,
    NoSchema,
}

/// Asks about all objects of all files, under all versions.
///
/// # Errors
/// When the validator does not run, or has nothing to say.
pub(super) fn ask(python: &Path, files: &[PathBuf]) -> Result<Vec<Answer>> {
    let question = json!({ "versions": VERSIONS, "files": files });
    let mut child = Command::new(python)
        .args(["-c", include_str!("validate.py")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the validator")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(question.to_string().as_bytes()).context("asking the validator")?;
    }
    let output = child.wait_with_output().context("waiting for the validator")?;
    if !output.status.success() {
        bail!("the validator failed ({}), as it says above", output.status);
    }
    let answers: Vec<Answer> = serde_json::from_slice(&output.stdout).context("the validator's answers")?;
    match answers.is_empty() {
        true => bail!("the validator was given no object"),
        false => Ok(answers),
    }
}

/// How one file's objects fare under one version.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) valid: usize,
    /// Of a kind that is known to have no schema here.
    pub(super) without: usize,
    pub(super) invalid: usize,
}

impl Count {
    pub(super) fn of<'a>(answers: impl Iterator<Item = &'a Answer>) -> Self {
        let mut count = Self::default();
        for answer in answers {
            match (answer.outcome, answer.fault()) {
                (_, Some(_)) => count.invalid += 1,
                (Outcome::Valid, None) => count.valid += 1,
                (_, None) => count.without += 1,
            }
        }
        count
    }
}

impl std::fmt::Display for Count {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { valid, without, invalid } = *self;
        let star = if without > 0 { "*" } else { "" };
        let wrong = if invalid > 0 { format!(" {invalid} INVALID") } else { String::new() };
        f.pad(&format!("{valid}/{}{star}{wrong}", valid + without + invalid))
    }
}

impl Answer {
    /// What is wrong, if anything is.
    pub(super) fn fault(&self) -> Option<String> {
        let Self { version, api, kind, name, message, .. } = self;
        match self.outcome {
            Outcome::Valid => None,
            Outcome::NoSchema if WITHOUT_SCHEMA.contains(&format!("{api} {kind}").as_str()) => None,
            Outcome::NoSchema => Some(format!("{kind} {name}: Kubernetes {version} has no {api} {message}")),
            Outcome::Invalid => Some(format!("{kind} {name}, Kubernetes {version}: {message}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(outcome: &str, api: &str, kind: &str) -> Vec<Answer> {
        let one = json!({ "file": "a.yaml", "version": "1.33", "api": api, "kind": kind, "name": "injector/injector",
            "outcome": outcome, "message": "spec: unexpected" });
        serde_json::from_value(json!([one])).unwrap()
    }

    #[test]
    fn a_missing_schema_is_excused_for_kinds_that_are_named_alone() {
        let pool = answers("no_schema", "metallb.io/v1beta1", "IPAddressPool");
        assert_eq!(Count::of(pool.iter()), Count { without: 1, ..Count::default() });
        assert_eq!(Count::of(pool.iter()).to_string(), "0/1*");
        let old = answers("no_schema", "policy/v1beta1", "PodSecurityPolicy");
        assert_eq!(Count::of(old.iter()), Count { invalid: 1, ..Count::default() });
        assert!(old[0].fault().unwrap().contains("has no policy/v1beta1"));
    }

    #[test]
    fn what_is_invalid_is_told_even_where_a_missing_schema_is_excused() {
        for (api, kind) in [("apps/v1", "DaemonSet"), ("metallb.io/v1beta1", "IPAddressPool")] {
            let wrong = answers("invalid", api, kind);
            assert!(wrong[0].fault().unwrap().contains("1.33: spec: unexpected"));
            assert_eq!(Count::of(wrong.iter()).to_string(), "0/1 1 INVALID");
        }
        let right = answers("valid", "apps/v1", "DaemonSet");
        assert_eq!((right[0].fault(), Count::of(right.iter()).to_string()), (None, "1/1".into()));
    }

    #[test]
    fn an_answer_that_is_none_is_refused() {
        assert!(serde_json::from_str::<Vec<Answer>>(r#"[{"file": "a", "outcome": "perhaps"}]"#).is_err());
    }
}
