//! The policy scanner, and the findings that are accepted.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

/// The scanner's report on one rendering.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Scan {
    pub(super) passed: usize,
    pub(super) findings: Vec<Finding>,
}

/// A check that failed.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Finding {
    #[serde(rename = "check_id")]
    pub(super) check: String,
    /// The scanner's name of it: `DaemonSet.injector.injector`.
    pub(super) resource: String,
    #[serde(rename = "check_name")]
    pub(super) title: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}: {}", self.check, self.resource, self.title)
    }
}

/// Scans a file of objects, without using the network.
///
/// # Errors
/// When the scanner does not run, or cannot parse the file.
pub(super) fn scan(python: &Path, file: &Path) -> Result<Scan> {
    let output = Command::new(python)
        .args(["-m", "checkov.main", "--framework", "kubernetes", "--output", "json", "--quiet", "--compact"])
        .args(["--skip-download", "--soft-fail", "--file"])
        .arg(file)
        .output()
        .context("cannot start checkov")?;
    if !output.status.success() {
        bail!("checkov failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    parse(&String::from_utf8_lossy(&output.stdout))
}

fn parse(printed: &str) -> Result<Scan> {
    #[derive(Deserialize)]
    struct Report {
        summary: Summary,
        results: Results,
    }
    #[derive(Deserialize)]
    struct Summary {
        passed: usize,
        failed: usize,
        skipped: usize,
        parsing_errors: usize,
    }
    #[derive(Deserialize)]
    struct Results {
        failed_checks: Vec<Finding>,
    }
    let Report { summary, results } = serde_json::from_str(printed).context("checkov's report")?;
    ensure!(summary.parsing_errors == 0, "checkov could not read {} files", summary.parsing_errors);
    ensure!(summary.passed > 0, "no check of checkov passed: did it find any object?");
    // Annotations can skip checks, but only accepted-findings.toml may accept findings.
    ensure!(summary.skipped == 0, "{} checks are skipped by annotations", summary.skipped);
    ensure!(summary.failed == results.failed_checks.len(), "checkov's count differs from its list");
    Ok(Scan { passed: summary.passed, findings: results.failed_checks })
}

/// `accepted-findings.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Accepted {
    #[serde(default)]
    accepted: Vec<Acceptance>,
}

/// One check that may fail, and why.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Acceptance {
    check: String,
    /// The scanner's names of the objects.
    resources: Vec<String>,
    /// The overlays in which it is accepted; all if empty.
    overlays: Option<Vec<String>>,
    reason: String,
}

impl Accepted {
    /// Reads the file's text.
    ///
    /// # Errors
    /// When the file is not valid, or a reason is missing.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let accepted: Self = toml::from_str(text)?;
        for one in &accepted.accepted {
            ensure!(one.reason.split_whitespace().count() > 2, "{}: the reason is missing", one.check);
        }
        Ok(accepted)
    }

    /// Whether a finding in an overlay is accepted.
    pub(super) fn covers(&self, overlay: &str, finding: &Finding) -> bool {
        self.accepted.iter().any(|one| one.covers(overlay, &finding.check, &finding.resource))
    }

    /// Accepted findings that no longer occur. They must be removed, or they would hide a later
    /// mistake.
    pub(super) fn idle(&self, found: &[(String, Finding)]) -> Vec<String> {
        let mut idle = Vec::new();
        for one in &self.accepted {
            for resource in &one.resources {
                let met = |(overlay, finding): &(String, Finding)| {
                    finding.resource == *resource && one.covers(overlay, &finding.check, resource)
                };
                if !found.iter().any(met) {
                    idle.push(format!("{} {resource}: accepted, but no longer found", one.check));
                }
            }
        }
        idle
    }
}

impl Acceptance {
    fn covers(&self, overlay: &str, check: &str, resource: &str) -> bool {
        self.check == check
            && self.resources.iter().any(|accepted| accepted == resource)
            && self
                .overlays
                .as_ref()
                .is_none_or(|overlays| overlays.iter().any(|accepted| accepted == overlay))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"{"check_type": "kubernetes", "results": {"failed_checks": [
        {"check_id": "CKV_K8S_19", "resource": "DaemonSet.a.b", "check_name": "No host network", "file_path": "/x"}]},
        "summary": {"passed": 80, "failed": 1, "skipped": 0, "parsing_errors": 0, "resource_count": 5}}"#;
    const ACCEPTED: &str = r#"
        [[accepted]]
        check = "CKV_K8S_19"
        resources = ["DaemonSet.a.b"]
        overlays = ["edge"]
        reason = "it has to be there"
    "#;

    #[test]
    fn a_report_is_counted_and_listed() {
        let scan = parse(REPORT).unwrap();
        assert_eq!((scan.passed, scan.findings.len()), (80, 1));
        assert_eq!(scan.findings[0].to_string(), "CKV_K8S_19 DaemonSet.a.b: No host network");
    }

    #[test]
    fn a_report_without_results_is_rejected() {
        for (from, to) in [
            (r#""passed": 80"#, r#""passed": 0"#),
            (r#""parsing_errors": 0"#, r#""parsing_errors": 1"#),
            (r#""skipped": 0"#, r#""skipped": 2"#),
            (r#""failed": 1"#, r#""failed": 2"#),
        ] {
            assert!(parse(&REPORT.replace(from, to)).is_err(), "{to}");
        }
        // Its report if it found no object.
        assert!(parse(r#"{"passed": 0, "failed": 0, "skipped": 0, "parsing_errors": 0}"#).is_err());
    }

    #[test]
    fn only_what_is_listed_is_accepted_and_only_there() {
        let accepted = Accepted::parse(ACCEPTED).unwrap();
        let finding = |check: &str, resource: &str| Finding {
            check: check.into(),
            resource: resource.into(),
            title: String::new(),
        };
        assert!(accepted.covers("edge", &finding("CKV_K8S_19", "DaemonSet.a.b")));
        assert!(!accepted.covers("other", &finding("CKV_K8S_19", "DaemonSet.a.b")));
        assert!(!accepted.covers("edge", &finding("CKV_K8S_20", "DaemonSet.a.b")));
        assert!(!accepted.covers("edge", &finding("CKV_K8S_19", "Deployment.a.b")));
        let everywhere = Accepted::parse(&ACCEPTED.replace(r#"overlays = ["edge"]"#, "")).unwrap();
        assert!(everywhere.covers("other", &finding("CKV_K8S_19", "DaemonSet.a.b")));
    }

    #[test]
    fn an_accepted_finding_needs_a_reason_and_must_occur() {
        assert!(Accepted::parse(&ACCEPTED.replace("it has to be there", "yes")).is_err());
        assert!(Accepted::parse(&ACCEPTED.replace("reason", "because")).is_err());
        let accepted = Accepted::parse(ACCEPTED).unwrap();
        let finding = parse(REPORT).unwrap().findings.remove(0);
        assert_eq!(accepted.idle(&[]).len(), 1);
        assert_eq!(accepted.idle(&[("edge".into(), finding)]), [""; 0]);
    }
}
