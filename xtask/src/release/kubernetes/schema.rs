//! Validates the objects against the schemas of several Kubernetes versions.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use serde_json::json;

/// The oldest version that the chart supports, and current ones. `kubernetes-validate` must have
/// each.
pub(super) const VERSIONS: [&str; 5] = ["1.29", "1.33", "1.35", "1.36", "1.37"];

/// Kinds without a schema in the registries that `setup` uses: they are counted, but not as valid.
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

/// Validates all objects of all files against all versions.
///
/// # Errors
/// When the validator does not run, or returns no result.
pub(super) fn ask(python: &Path, files: &[PathBuf]) -> Result<Vec<Answer>> {
    let question = json!({ "versions": VERSIONS, "files": files });
    let mut child = Command::new(python)
        .args(["-c", include_str!("validate.py")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the validator")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(question.to_string().as_bytes()).context("writing to the validator")?;
    }
    let output = child.wait_with_output().context("waiting for the validator")?;
    if !output.status.success() {
        bail!("the validator failed ({}); the reason is printed above", output.status);
    }
    let answers: Vec<Answer> = serde_json::from_slice(&output.stdout).context("the validator's answers")?;
    match answers.is_empty() {
        true => bail!("the validator received no object"),
        false => Ok(answers),
    }
}

/// The results of one file's objects against one version.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) valid: usize,
    /// Objects of a kind that has no schema here.
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
    /// The fault, if there is one.
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
    fn a_missing_schema_is_accepted_only_for_listed_kinds() {
        let pool = answers("no_schema", "metallb.io/v1beta1", "IPAddressPool");
        assert_eq!(Count::of(pool.iter()), Count { without: 1, ..Count::default() });
        assert_eq!(Count::of(pool.iter()).to_string(), "0/1*");
        let old = answers("no_schema", "policy/v1beta1", "PodSecurityPolicy");
        assert_eq!(Count::of(old.iter()), Count { invalid: 1, ..Count::default() });
        assert!(old[0].fault().unwrap().contains("has no policy/v1beta1"));
    }

    #[test]
    fn invalid_objects_are_faults_even_where_a_missing_schema_is_accepted() {
        for (api, kind) in [("apps/v1", "DaemonSet"), ("metallb.io/v1beta1", "IPAddressPool")] {
            let wrong = answers("invalid", api, kind);
            assert!(wrong[0].fault().unwrap().contains("1.33: spec: unexpected"));
            assert_eq!(Count::of(wrong.iter()).to_string(), "0/1 1 INVALID");
        }
        let right = answers("valid", "apps/v1", "DaemonSet");
        assert_eq!((right[0].fault(), Count::of(right.iter()).to_string()), (None, "1/1".into()));
    }

    #[test]
    fn an_unknown_outcome_is_rejected() {
        assert!(serde_json::from_str::<Vec<Answer>>(r#"[{"file": "a", "outcome": "perhaps"}]"#).is_err());
    }
}
