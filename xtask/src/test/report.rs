//! Adds up the results of the test programs.

use std::{fmt::Write as _, time::Duration};

use crate::test_output::Output;

/// Everything that ran.
#[derive(Debug, Default)]
pub(super) struct Report {
    programs: Vec<(String, Output)>,
    /// Failures of the whole run; each counts as one.
    failures: Vec<String>,
    /// Why the run does not count although nothing has failed.
    rejections: Vec<String>,
}

impl Report {
    pub(super) fn add(&mut self, title: String, output: Output) {
        self.programs.push((title, output));
    }

    pub(super) fn fail(&mut self, what: String) {
        self.failures.push(what);
    }

    pub(super) fn reject(&mut self, why: String) {
        self.rejections.push(why);
    }

    /// A run in which every privileged test was skipped has not passed.
    pub(super) fn demand_one_run(&mut self, package: &str) {
        let of_package =
            self.programs.iter().filter(|(title, _)| title.starts_with(&format!("{package} test ")));
        if of_package.map(|(_, output)| output.passed + output.failed_in_all()).sum::<usize>() == 0 {
            self.fail("no privileged test ran".into());
        }
    }

    pub(super) fn passed(&self) -> bool {
        let (passed, failed, _) = self.totals();
        failed == 0 && passed > 0 && self.rejections.is_empty()
    }

    fn totals(&self) -> (usize, usize, usize) {
        let sum =
            |of: fn(&Output) -> usize| self.programs.iter().map(|(_, output)| of(output)).sum::<usize>();
        let failed = sum(Output::failed_in_all) + self.failures.len();
        (sum(|output| output.passed), failed, sum(|output| output.skipped))
    }

    /// A table, the failures, and the totals as the last line: `N passed, N failed[, N skipped]`.
    pub(super) fn render(&self, took: Duration) -> String {
        let mut text = String::from("passed  failed  skipped  seconds  target\n");
        for (title, output) in &self.programs {
            let seconds = output.took.as_secs_f32();
            // Writing to a String cannot fail, here and below.
            let _ = writeln!(
                text,
                "{:>6}  {:>6}  {:>7}  {seconds:>7.1}  {title}",
                output.passed,
                output.failed_in_all(),
                output.skipped
            );
        }
        for line in self.troubles() {
            let _ = writeln!(text, "{line}");
        }
        let (passed, failed, skipped) = self.totals();
        if passed + failed + skipped == 0 {
            let _ = writeln!(text, "no test has a name like this");
        }
        let _ = writeln!(text, "all tests took {:.0} s", took.as_secs_f32());
        let _ = write!(text, "{passed} passed, {failed} failed");
        if skipped > 0 {
            let _ = write!(text, ", {skipped} skipped");
        }
        text
    }

    fn troubles(&self) -> impl Iterator<Item = String> {
        let of_programs = self.programs.iter().flat_map(|(title, output)| {
            output.failures().map(move |what| format!("FAILED  {title}: {what}"))
        });
        let whole = self.failures.iter().chain(&self.rejections).map(|what| format!("FAILED  {what}"));
        of_programs.chain(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(lines: &[&str]) -> Output {
        let mut output = Output::default();
        lines.iter().for_each(|line| output.line(line));
        output
    }

    fn report(lines: &[&str]) -> Report {
        let mut report = Report::default();
        report.add("injector-suite test splice".into(), output(lines));
        report
    }

    const GOOD: &str =
        "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s";
    const BAD: &str =
        "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s";

    #[test]
    fn the_last_line_has_the_totals() {
        let mut report = report(&[GOOD]);
        assert!(report.passed());
        assert_eq!(report.render(Duration::ZERO).lines().last(), Some("5 passed, 0 failed, 1 skipped"));
        report.fail("left behind: network namespace inj-1-edge".into());
        assert!(!report.passed());
        let text = report.render(Duration::ZERO);
        assert_eq!(text.lines().last(), Some("5 passed, 1 failed, 1 skipped"));
        assert!(text.contains("FAILED  left behind: network namespace inj-1-edge\n"));
    }

    #[test]
    fn a_run_without_results_has_not_passed() {
        assert!(!report(&["test result: ok. 0 passed; 0 failed; 0 ignored"]).passed());
        assert!(!report(&[BAD]).passed());
        let mut refused = report(&[GOOD]);
        refused.reject("root".into());
        assert!(!refused.passed());
    }

    #[test]
    fn skipping_every_privileged_test_fails() {
        let mut skipped = report(&["test result: ok. 0 passed; 0 failed; 7 ignored; 0 measured"]);
        skipped.add("xtask bin xtask".into(), output(&[GOOD]));
        skipped.demand_one_run("injector-suite");
        assert!(!skipped.passed());
        let mut ran = report(&[GOOD]);
        ran.demand_one_run("injector-suite");
        assert!(ran.passed());
    }
}
