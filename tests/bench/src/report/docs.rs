//! The results in `docs/benchmarks.md`: written between two marks; the rest of the page stays.

use std::fmt::Write as _;

use anyhow::Context as _;

use super::charts::Chart;
use super::table;
use crate::record::Record;

/// A part of the page that the benchmark writes.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Its name in the marks.
    name: &'static str,
    /// The command that writes it.
    command: &'static str,
}

/// The comparison of systems.
pub const RESULTS: Part = Part { name: "results", command: "cargo xtask bench --write-docs" };
/// What the guard costs clean traffic.
pub const GUARD: Part = Part { name: "guard", command: "cargo xtask bench --guard --write-docs" };
/// Good sessions during a flood.
pub const FLOOD: Part = Part { name: "flood", command: "cargo xtask bench --flood --write-docs" };
/// What bans cost.
pub const BANS: Part = Part { name: "bans", command: "cargo xtask bench --bans --write-docs" };

impl Part {
    /// Replaces this part of a page.
    ///
    /// # Errors
    /// When the page lacks its marks.
    pub fn insert(self, page: &str, text: &str) -> anyhow::Result<String> {
        let begin = format!("<!-- {}: written by `{}`, do not edit -->", self.name, self.command);
        let end = format!("<!-- end of {} -->", self.name);
        let (before, rest) =
            page.split_once(&begin).with_context(|| format!("the page has no line {begin}"))?;
        let (_, after) = rest.split_once(&end).with_context(|| format!("the page has no line {end}"))?;
        Ok(format!("{before}{begin}\n\n{text}\n{end}{after}"))
    }
}

/// The text of [`RESULTS`]; `folder` is the folder of its charts, relative to the page.
#[must_use]
pub fn results(record: &Record, charts: &[Chart], folder: &str) -> String {
    let mut text = properties(record);
    text.push_str("\n## Systems\n\n");
    text.push_str(&systems(record));
    text.push_str("\n## Figures\n\n");
    for chart in charts {
        let _ = writeln!(text, "![{workload}]({folder}/{workload}.svg)", workload = chart.workload);
    }
    text.push('\n');
    text.push_str(&table::full(record));
    text.push_str("\n## Configurations\n\n");
    for system in record.systems.iter().filter(|system| !system.config.is_empty()) {
        let _ = writeln!(
            text,
            "<details><summary>{}</summary>\n\n```\n{}\n```\n\n</details>\n",
            system.name,
            system.config.trim_end()
        );
    }
    text
}

/// The text of [`GUARD`] or [`FLOOD`].
#[must_use]
pub fn tables(record: &Record) -> String {
    let tables = table::full(record);
    format!("{}\n{}\n{}\n", properties(record), systems(record), tables.trim_end_matches('\n'))
}

/// A line for each system.
fn systems(record: &Record) -> String {
    let mut text = String::new();
    for system in &record.systems {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "- **{}**: {}", system.name, system.about);
    }
    text
}

/// When and where a run took place.
fn properties(record: &Record) -> String {
    let (machine, settings) = (&record.machine, &record.settings);
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| {name} | {value} |");
    };
    row("property", "value".to_owned());
    row("---", "---".to_owned());
    row("started", format!("{} s after 1970-01-01 UTC", record.started));
    row("processors", format!("{} × {}", machine.processors, machine.processor));
    row("memory", format!("{} MiB", machine.memory_kib / 1024));
    row("system", format!("{}, Linux {}", machine.system, machine.kernel));
    row("injector", format!("{}, built by {}", machine.injector, machine.rustc));
    row("repeats", format!("{} of {} s each, interleaved", settings.repeats, settings.seconds));
    row("spinners", if settings.spinners { "on every processor".into() } else { "none".into() });
    let noise = if settings.was_busy() {
        "; **a busy machine was accepted: the figures are worth little**"
    } else {
        ""
    };
    row(
        "other processes",
        format!(
            "{:.1} % of the processors before the run ({:.1} % stolen), {:.1} % after it{noise}",
            settings.background * 100.0,
            settings.background_steal * 100.0,
            settings.background_after * 100.0
        ),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::SystemInfo;

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let marks = |part: Part, inside: &str| {
            format!(
                "<!-- {}: written by `{}`, do not edit -->\n{inside}\n<!-- end of {} -->\n",
                part.name, part.command, part.name
            )
        };
        let page = format!("# Head\n\n{}\n{}\ntail\n", marks(RESULTS, "old"), marks(GUARD, "kept"));
        let system =
            SystemInfo { name: "splice".into(), about: "an engine".into(), config: "x = 1\n".into() };
        let record = Record { systems: vec![system], ..Record::default() };
        let charts = [Chart { workload: "bulk".into(), svg: String::new() }];
        let text = results(&record, &charts, "benchmarks");
        let new = RESULTS.insert(&page, &text).unwrap();
        assert!(new.starts_with("# Head\n\n") && new.ends_with("\ntail\n") && new.contains("kept"));
        assert!(!new.contains("old") && new.contains("**splice**") && new.contains("(benchmarks/bulk.svg)"));
        assert_eq!(RESULTS.insert(&new, &text).unwrap(), new, "again is the same");
        let tables = tables(&record);
        assert!(tables.contains("- **splice**: an engine") && tables.ends_with('\n'), "{tables}");
        assert!(FLOOD.insert(&page, &text).unwrap_err().to_string().contains("--flood"));
    }

    #[test]
    fn the_page_has_all_parts() {
        let page = include_str!("../../../../docs/benchmarks.md");
        for part in [RESULTS, GUARD, FLOOD, BANS] {
            assert!(part.insert(page, "").is_ok(), "{}", part.name);
        }
    }
}
