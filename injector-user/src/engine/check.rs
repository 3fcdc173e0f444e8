//! The result of an engine's self-test.

use std::{fmt::Write as _, time::Duration};

use serde_json::json;

use crate::telemetry::log::target;

/// One check of an engine's self-test.
#[derive(Clone, Debug)]
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// What was observed, or what failed.
    pub result: Result<String, String>,
    /// Its duration.
    pub took: Duration,
}

/// A loaded program, for logs and `selftest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramReport {
    /// Its name.
    pub name: String,
    /// Instructions that the verifier processed; `None` before Linux 5.16.
    pub verified_instructions: Option<u32>,
}

/// The self-test of one engine.
#[derive(Clone, Debug)]
pub struct SelfTestReport {
    /// Its checks, in order. One failure rules the engine out.
    pub checks: Vec<Check>,
    /// The loaded programs.
    pub programs: Vec<ProgramReport>,
    /// Why no check was run.
    not_run: Option<String>,
}

impl SelfTestReport {
    /// No check was run, for this reason.
    #[must_use]
    pub fn not_run(why: &str) -> Self {
        Self { checks: Vec::new(), programs: Vec::new(), not_run: Some(why.to_owned()) }
    }

    /// These checks were run with these programs.
    #[must_use]
    pub fn new(checks: Vec<Check>, programs: Vec<ProgramReport>) -> Self {
        Self { checks, programs, not_run: None }
    }

    /// Why the engine cannot run; `None` if it can.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.not_run.clone().or_else(|| {
            self.checks.iter().find_map(|check| {
                let failure = check.result.as_ref().err()?;
                Some(format!("{}: {failure}", check.name))
            })
        })
    }

    /// Logs one line for each check.
    pub fn log(&self, engine: &str) {
        for Check { name, result, took } in &self.checks {
            let seconds = took.as_secs_f64();
            match result {
                Ok(detail) => {
                    tracing::info!(target: target::ENGINE, engine, check = name, passed = true, seconds, detail, "self-test");
                }
                Err(detail) => {
                    tracing::warn!(target: target::ENGINE, engine, check = name, passed = false, seconds, detail, "self-test");
                }
            }
        }
    }

    /// As text, under the name of the engine.
    #[must_use]
    pub fn text(&self, engine: &str) -> String {
        let mut text = format!("{engine}\n");
        if let Some(why) = &self.not_run {
            let _ = writeln!(text, "  not run: {why}");
        }
        for check in &self.checks {
            let (mark, what) = match &check.result {
                Ok(seen) => ("ok    ", seen),
                Err(failure) => ("FAILED", failure),
            };
            let took = check.took.as_secs_f64() * 1000.0;
            let _ = writeln!(text, "  {mark}  {:<22} {took:>7.1} ms  {what}", check.name);
        }
        for ProgramReport { name, verified_instructions } in &self.programs {
            let walked = verified_instructions.map_or("?".to_owned(), |count| count.to_string());
            let _ = writeln!(text, "  program {name}: {walked} instructions processed by the verifier");
        }
        text
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        let check = |check: &Check| {
            json!({
                "name": check.name,
                "passed": check.result.is_ok(),
                "detail": check.result.as_ref().unwrap_or_else(|failure| failure),
                "seconds": check.took.as_secs_f64(),
            })
        };
        let program = |program: &ProgramReport| json!({ "name": program.name, "verified_instructions": program.verified_instructions });
        json!({
            "failure": self.failure(),
            "checks": self.checks.iter().map(check).collect::<Vec<_>>(),
            "programs": self.programs.iter().map(program).collect::<Vec<_>>(),
        })
    }
}
