//! The results, as text and in `docs/kernels.md`: there between two marks, the rest of the page stays.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use anyhow::{Context as _, Result};

use super::selftest::Engine;
use crate::test_output::Output;

const BEGIN: &str = "<!-- results: written by `cargo xtask kernels --write-docs`, do not edit -->";
const END: &str = "<!-- end of results -->";

/// What was run in one kernel.
#[derive(Debug, Clone, Default)]
pub(super) struct KernelRun {
    pub(super) release: String,
    pub(super) accelerated: bool,
    /// The self-tests with all capabilities.
    pub(super) engines: Vec<Engine>,
    pub(super) without_perfmon: Vec<Engine>,
    /// Whether failures without CAP_PERFMON are expected.
    pub(super) needs_perfmon: bool,
    pub(super) trials: Vec<TrialRun>,
}

/// The results of one test program.
#[derive(Debug, Clone)]
pub(super) struct TrialRun {
    pub(super) name: String,
    pub(super) output: Output,
}

impl KernelRun {
    pub(super) fn passed(&self) -> bool {
        let demanded = if self.needs_perfmon { &[] } else { &self.without_perfmon[..] };
        self.engines.iter().chain(demanded).all(|engine| engine.failures.is_empty())
            && !self.trials.iter().any(|trials| trials.output.has_failures())
    }
}

/// The results for a terminal.
pub(super) fn summary(runs: &[KernelRun]) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail, here and below.
    for run in runs {
        let _ = writeln!(text, "{}: {}", run.release, if run.passed() { "passed" } else { "FAILED" });
        for engine in &run.engines {
            let _ = writeln!(text, "  self-test {}: {}", engine.name, verdict(engine));
        }
        for engine in &run.without_perfmon {
            let _ = writeln!(text, "  self-test {}, without CAP_PERFMON: {}", engine.name, verdict(engine));
        }
        for trials in &run.trials {
            let seconds = trials.output.took.as_secs_f32();
            let _ = writeln!(text, "  {}: {} ({seconds:.0} s)", trials.name, counts(&trials.output));
        }
    }
    text
}

/// Puts the results into the page.
///
/// # Errors
/// When the page has no marks.
pub(super) fn insert(page: &str, runs: &[KernelRun]) -> Result<String> {
    let (before, rest) = page.split_once(BEGIN).with_context(|| format!("the page has no line {BEGIN}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("the page has no line {END}"))?;
    Ok(format!("{before}{BEGIN}\n\n{}\n{END}{after}", tables(runs)))
}

fn tables(runs: &[KernelRun]) -> String {
    let mut text = String::new();
    let mut table = |first: &str, rows: Vec<(String, Vec<String>)>| {
        if rows.is_empty() {
            return;
        }
        let heads: Vec<_> = runs.iter().map(|run| run.release.as_str()).collect();
        let _ = writeln!(text, "| {first} | {} |\n|---|{}", heads.join(" | "), "---|".repeat(runs.len()));
        for (name, cells) in rows {
            let _ = writeln!(text, "| {name} | {} |", cells.join(" | "));
        }
        text.push('\n');
    };
    table("kernel", vec![("processor".into(), runs.iter().map(processor).collect())]);
    table(
        "self-test",
        rows(runs, |run| {
            let all = run.engines.iter().map(|engine| (engine.name.clone(), verdict(engine)));
            let without = run.without_perfmon.iter();
            all.chain(without.map(|it| (format!("{}, without CAP_PERFMON", it.name), verdict(it)))).collect()
        }),
    );
    table(
        "verified instructions",
        rows(runs, |run| {
            let programs = run.engines.iter().flat_map(|engine| &engine.programs);
            programs.map(|(name, count)| (format!("`{name}`"), count.to_string())).collect()
        }),
    );
    table(
        "trials",
        rows(runs, |run| {
            run.trials.iter().map(|trials| (format!("`{}`", trials.name), counts(&trials.output))).collect()
        }),
    );
    let failures: Vec<_> = runs.iter().flat_map(failures).collect();
    for failure in failures {
        let _ = writeln!(text, "- {failure}");
    }
    text.trim_end().to_owned() + "\n"
}

fn processor(run: &KernelRun) -> String {
    if run.accelerated { "KVM".into() } else { "emulated".into() }
}

/// One row for each name that occurs in any run, in the order of the names.
fn rows(
    runs: &[KernelRun],
    cells: impl Fn(&KernelRun) -> BTreeMap<String, String>,
) -> Vec<(String, Vec<String>)> {
    let columns: Vec<_> = runs.iter().map(cells).collect();
    let names: BTreeSet<_> = columns.iter().flat_map(BTreeMap::keys).cloned().collect();
    let row = |name: &String| {
        columns.iter().map(|column| column.get(name).map_or("not run", String::as_str).to_owned()).collect()
    };
    names.iter().map(|name| (name.clone(), row(name))).collect()
}

fn verdict(engine: &Engine) -> String {
    if engine.failures.is_empty() {
        format!("{} checks passed", engine.passed)
    } else {
        format!("{} failed", engine.failures.len())
    }
}

fn counts(output: &Output) -> String {
    let mut text = format!("{} passed", output.passed);
    if output.has_failures() {
        let _ = write!(text, ", {} failed", output.failed.max(1));
    }
    if output.skipped > 0 {
        let _ = write!(text, ", {} skipped", output.skipped);
    }
    text
}

fn failures(run: &KernelRun) -> Vec<String> {
    let of_engines = run.engines.iter().flat_map(|engine| &engine.failures).cloned();
    let without = run.without_perfmon.iter().flat_map(|engine| &engine.failures);
    let of_engines = of_engines.chain(without.map(|failure| format!("without CAP_PERFMON: {failure}")));
    let of_trials = run.trials.iter().flat_map(|trials| {
        trials.output.failures().map(move |failure| format!("{}: {failure}", trials.name))
    });
    let first_line = |failure: String| failure.lines().next().unwrap_or_default().to_owned();
    of_engines.chain(of_trials).map(|failure| format!("{}: {}", run.release, first_line(failure))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(release: &str) -> KernelRun {
        let mut output = Output::default();
        output.line("test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured");
        KernelRun {
            release: release.into(),
            engines: vec![Engine {
                name: "splice".into(),
                passed: 7,
                programs: BTreeMap::from([("verdict".into(), 3433)]),
                ..Engine::default()
            }],
            trials: vec![TrialRun { name: "faults:close/".into(), output }],
            ..KernelRun::default()
        }
    }

    #[test]
    fn only_what_is_between_the_marks_is_replaced() {
        let page = format!("# Kernels\n{BEGIN}\nold\n{END}\nafter\n");
        let made = insert(&page, &[run("6.1.0-50-cloud-amd64")]).unwrap();
        assert!(
            made.starts_with("# Kernels\n<!-- results") && made.ends_with("<!-- end of results -->\nafter\n")
        );
        assert!(!made.contains("old"));
        assert_eq!(insert(&made, &[run("6.1.0-50-cloud-amd64")]).unwrap(), made);
        assert!(insert("# Kernels\n", &[]).is_err());
        let quick = KernelRun { trials: Vec::new(), ..run("6.1.0-50-cloud-amd64") };
        assert!(!insert(&page, &[quick]).unwrap().contains("| trials |"));
    }

    #[test]
    fn a_kernel_is_a_column() {
        let mut second = run("7.3-cloud-amd64");
        second.trials.clear();
        second.engines[0].programs.clear();
        let text = tables(&[run("6.1.0-50-cloud-amd64"), second]);
        for line in [
            "| kernel | 6.1.0-50-cloud-amd64 | 7.3-cloud-amd64 |",
            "|---|---|---|",
            "| splice | 7 checks passed | 7 checks passed |",
            "| `verdict` | 3433 | not run |",
            "| `faults:close/` | 5 passed, 1 skipped | not run |",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line} in:\n{text}");
        }
    }

    #[test]
    fn failures_are_named() {
        let mut failed = run("6.1.0-50-cloud-amd64");
        assert!(failed.passed());
        failed.engines[0].failures.push("splice: load: refused\nthe verifier's log".into());
        failed.trials[0].output.line("test splice/close/both sides at once ... FAILED");
        failed.trials[0].output.line("test result: FAILED. 0 passed; 1 failed; 0 ignored");
        assert!(!failed.passed());
        let text = tables(&[failed.clone()]);
        assert!(text.contains("- 6.1.0-50-cloud-amd64: splice: load: refused\n"), "{text}");
        assert!(
            text.contains("- 6.1.0-50-cloud-amd64: faults:close/: splice/close/both sides at once\n"),
            "{text}"
        );
        assert!(summary(&[failed]).contains("6.1.0-50-cloud-amd64: FAILED\n  self-test splice: 1 failed\n"));
    }
}
