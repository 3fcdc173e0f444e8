//! The results of a test program, taken from what it prints.

use std::time::Duration;

/// How many lines of a failed test's report are kept.
const KEPT: usize = 12;

/// The results of one test program, taken from its own output; libtest and libtest-mimic print the
/// same.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    /// Ignored tests, which reported that they can't run here.
    pub(crate) skipped: usize,
    pub(crate) took: Duration,
    /// The names of failed tests, and below each the first lines of its report.
    failures: Vec<String>,
    /// The lines of the report that is being read: `None` outside of one.
    report: Option<usize>,
    /// A fault of the program itself; counts as one failure.
    fault: Option<String>,
    /// The number of `test result:` lines; documentation tests print one for each package.
    results: usize,
}

impl Output {
    /// The results of a program that was not run.
    pub(crate) fn skipped(count: usize) -> Self {
        Self { skipped: count, results: 1, ..Self::default() }
    }

    /// The results of a check without a test program: how many values were right, and a message for
    /// each that was not.
    pub(crate) fn checked(passed: usize, failures: Vec<String>, took: Duration) -> Self {
        Self { passed, failed: failures.len(), failures, took, results: 1, ..Self::default() }
    }

    /// Takes one line of the program's output.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result:") {
            self.results += 1;
            self.passed += count(result, "passed");
            self.failed += count(result, "failed");
            self.skipped += count(result, "ignored");
        } else if let Some(name) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix("FAILED")) {
            self.failures.push(name.trim_end_matches([' ', '.']).to_owned());
        } else if let Some(name) = report_of(line) {
            self.report = self.failures.iter().position(|failure| failure == name);
        } else if line == "failures:" {
            self.report = None;
        } else if let Some(failure) = self.report.and_then(|index| self.failures.get_mut(index))
            && !line.trim().is_empty()
            && failure.lines().count() <= KEPT
        {
            failure.push_str("\n  | ");
            failure.push_str(line);
        }
    }

    /// Records a fault other than a failed test.
    pub(crate) fn set_fault(&mut self, what: String) {
        self.fault = Some(what);
    }

    pub(crate) fn has_failures(&self) -> bool {
        self.failed > 0 || self.fault.is_some()
    }

    /// The names of failed tests, and the program's own fault.
    pub(crate) fn failures(&self) -> impl Iterator<Item = &String> {
        self.failures.iter().chain(&self.fault)
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.results > 0
    }

    /// Failed tests, and the fault.
    pub(crate) fn failed_in_all(&self) -> usize {
        self.failed + usize::from(self.fault.is_some())
    }
}

/// The test whose report begins here: `---- NAME ----` (libtest-mimic), `---- NAME stdout ----` (libtest).
fn report_of(line: &str) -> Option<&str> {
    let name = line.strip_prefix("---- ")?.strip_suffix(" ----")?;
    Some(name.strip_suffix(" stdout").unwrap_or(name))
}

/// The number before a word: `ok. 5 passed; 0 failed; …`.
fn count(result: &str, what: &str) -> usize {
    let words: Vec<&str> = result.split([' ', ';']).filter(|word| !word.is_empty()).collect();
    let pair = words.windows(2).find(|pair| pair[1] == what);
    pair.and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(lines: &[&str]) -> Output {
        let mut output = Output::default();
        lines.iter().for_each(|line| output.line(line));
        output
    }

    const GOOD: &str =
        "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s";
    const BAD: &str =
        "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s";

    #[test]
    fn several_results_add_up() {
        let both = output(&["running 6 tests", GOOD, "test smtp::ipv4 ... FAILED", BAD, "5 passed"]);
        assert_eq!((both.passed, both.failed, both.skipped), (8, 2, 1));
        assert_eq!(both.failures, ["smtp::ipv4"]);
        assert!(both.is_complete() && both.has_failures());
        assert!(!output(&["running 0 tests"]).is_complete());
    }

    #[test]
    fn a_failure_has_the_start_of_its_report() {
        let reports =
            ["failures:", "", "---- a ----", "still 3", "", "---- b stdout ----", "panicked", "at b.rs"];
        let names = ["", "failures:", "    a", "    b", "", BAD];
        let failed = ["test a ... FAILED", "test b ... FAILED"];
        let lines: Vec<_> = failed.into_iter().chain(reports).chain(names).collect();
        assert_eq!(output(&lines).failures, ["a\n  | still 3", "b\n  | panicked\n  | at b.rs"]);
        let long: Vec<_> = ["test a ... FAILED", "---- a ----"].into_iter().chain([".."; 99]).collect();
        assert_eq!(output(&long).failures[0].lines().count(), 1 + KEPT);
    }
}
