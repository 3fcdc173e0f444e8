//! The daemon's self-test in a machine, read from `injector selftest --json`.

use std::{collections::BTreeMap, fmt, path::Path};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::shell;

/// Checks have time limits, which an emulated machine beside other work may miss.
const ATTEMPTS: u32 = 5;

/// The line between two attempts.
const SEPARATOR: &str = "-- attempt";

/// How many instructions of a program the verifier may process. It gives up after 1,000,000
/// (`BPF_COMPLEXITY_LIMIT_INSNS`, include/linux/bpf.h), and kernels differ in how often they process
/// the same instruction.
const MAX_INSTRUCTIONS: u64 = 300_000;

/// With which capabilities the self-test runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Capabilities {
    /// All of root's.
    All,
    /// Without CAP_PERFMON and CAP_SYS_ADMIN, either of which makes the verifier accept more.
    WithoutPerfmon,
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::All => "with all capabilities",
            Self::WithoutPerfmon => "without CAP_PERFMON",
        })
    }
}

/// Runs the self-test until all checks have passed, or a program was refused.
pub(super) fn command(daemon: &Path, capabilities: Capabilities) -> String {
    let daemon = shell::quote(&daemon.to_string_lossy());
    let prefix = match capabilities {
        Capabilities::All => "",
        Capabilities::WithoutPerfmon => "setpriv --bounding-set=-perfmon,-sys_admin ",
    };
    format!(
        "for attempt in $(seq {ATTEMPTS}); do\n\
         echo '{SEPARATOR}'\n\
         {prefix}{daemon} selftest --json > /tmp/selftest; code=$?\n\
         cat /tmp/selftest\n\
         [ $code = 0 ] && ! grep -q '\"passed\": false' /tmp/selftest && exit 0\n\
         grep -A2 '\"name\": \"load\"' /tmp/selftest | grep -q '\"passed\": false' && exit 0\n\
         done\n\
         exit $code\n"
    )
}

/// What the self-test found out about an engine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Engine {
    pub(super) name: String,
    pub(super) passed: usize,
    /// The checks that failed, with their messages.
    pub(super) failures: Vec<String>,
    /// Instructions that the verifier has processed, by program.
    pub(super) programs: BTreeMap<String, u64>,
}

/// The engines, by the last attempt in the output.
///
/// # Errors
/// When it contains none.
pub(super) fn parse(output: &str) -> Result<Vec<Engine>> {
    let last = output.rsplit(SEPARATOR).next().unwrap_or_default();
    let read: Value = serde_json::from_str(last)
        .with_context(|| format!("the self-test printed no JSON:\n{}", last.trim()))?;
    let engines: Vec<Engine> =
        read.as_object().into_iter().flatten().filter_map(|(name, value)| engine(name, value)).collect();
    if engines.is_empty() {
        anyhow::bail!("the self-test tested no engine:\n{}", last.trim());
    }
    Ok(engines)
}

/// The engine, if this part of the report is about one.
fn engine(name: &str, report: &Value) -> Option<Engine> {
    let checks = report.get("checks")?.as_array()?;
    let mut engine = Engine { name: name.to_owned(), ..Engine::default() };
    for check in checks {
        let text = |key: &str| check[key].as_str().unwrap_or_default();
        if check["passed"] == true {
            engine.passed += 1;
        } else {
            engine.failures.push(format!("{name}: {}: {}", text("name"), text("detail")));
        }
    }
    let failure = report["failure"].as_str();
    if engine.failures.is_empty() && (failure.is_some() || checks.is_empty()) {
        engine.failures.push(format!("{name}: {}", failure.unwrap_or("no check was made")));
    }
    for program in report["programs"].as_array().into_iter().flatten() {
        if let (Some(name), Some(count)) =
            (program["name"].as_str(), program["verified_instructions"].as_u64())
        {
            engine.programs.insert(name.to_owned(), count);
        }
    }
    let costly = engine.programs.iter().filter(|(_, count)| **count > MAX_INSTRUCTIONS);
    engine.failures.extend(costly.map(|(program, count)| {
        format!(
            "{name}: program {program}: the verifier processed {count} instructions, more than {MAX_INSTRUCTIONS}; \
             what is called from several places can be a global function, which it follows once"
        )
    }));
    Some(engine)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"{
        "auto": "splice", "reason": null,
        "inline": { "checks": [{ "name": "load", "passed": true, "detail": "verified", "seconds": 0.1 }],
            "failure": null, "programs": [{ "name": "client_in", "verified_instructions": 2357 }] },
        "splice": { "checks": [{ "name": "load", "passed": true, "detail": "", "seconds": 0.1 },
            { "name": "carry", "passed": true, "detail": "", "seconds": 0.1 }],
            "failure": null, "programs": [{ "name": "verdict", "verified_instructions": null }] }
    }"#;

    fn attempts(reports: &[&str]) -> String {
        reports.iter().map(|report| format!("{SEPARATOR}\n{report}\n")).collect()
    }

    #[test]
    fn engines_are_the_parts_with_checks() {
        let engines = parse(&attempts(&[REPORT])).unwrap();
        let counts: Vec<_> =
            engines.iter().map(|it| (it.name.as_str(), it.passed, it.failures.len())).collect();
        assert_eq!(counts, [("inline", 1, 0), ("splice", 2, 0)]);
        assert_eq!(engines[0].programs, BTreeMap::from([("client_in".to_owned(), 2357)]));
        assert!(engines[1].programs.is_empty());
    }

    #[test]
    fn the_last_attempt_counts() {
        let slow = REPORT.replace(
            r#""name": "carry", "passed": true, "detail": """#,
            r#""name": "carry", "passed": false, "detail": "took 2 s""#,
        );
        assert_eq!(parse(&attempts(&[&slow])).unwrap()[1].failures, ["splice: carry: took 2 s"]);
        assert!(parse(&attempts(&[&slow, REPORT])).unwrap()[1].failures.is_empty());
    }

    #[test]
    fn an_engine_without_checks_has_failed() {
        let refused = r#"{ "inline": { "checks": [], "failure": "no BTF", "programs": [] } }"#;
        assert_eq!(parse(&attempts(&[refused])).unwrap()[0].failures, ["inline: no BTF"]);
        let silent = r#"{ "inline": { "checks": [], "failure": null, "programs": [] } }"#;
        assert_eq!(parse(&attempts(&[silent])).unwrap()[0].failures, ["inline: no check was made"]);
    }

    #[test]
    fn a_program_that_is_costly_to_verify_has_failed() {
        let costly = REPORT.replace("2357", &(MAX_INSTRUCTIONS + 1).to_string());
        let engines = parse(&attempts(&[&costly])).unwrap();
        let [failure] = &engines[0].failures[..] else { panic!("{:?}", engines[0].failures) };
        assert!(failure.starts_with("inline: program client_in: the verifier processed 300001"), "{failure}");
        let most = REPORT.replace("2357", &MAX_INSTRUCTIONS.to_string());
        assert!(parse(&attempts(&[&most])).unwrap()[0].failures.is_empty());
    }

    #[test]
    fn other_output_is_an_error() {
        for output in ["", "injector: cannot execute", "{}"] {
            assert!(parse(&attempts(&[output])).is_err(), "{output:?}");
        }
    }
}
