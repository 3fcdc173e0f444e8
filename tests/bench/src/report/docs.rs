//! The results in `docs/benchmarks.md`: written between two marks; the rest of the page stays.

use std::fmt::Write as _;

use anyhow::Context as _;

use super::charts::Chart;
use super::table;
use crate::record::Record;

const BEGIN: &str = "<!-- results: written by `cargo xtask bench --write-docs`, do not edit -->";
const END: &str = "<!-- end of results -->";

/// Puts the results of a run into the page; `folder` is the folder of its charts, relative to the
/// page.
///
/// # Errors
/// When the page has no marks.
pub fn insert(page: &str, record: &Record, charts: &[Chart], folder: &str) -> anyhow::Result<String> {
    let (before, rest) = page.split_once(BEGIN).with_context(|| format!("the page has no line {BEGIN}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("the page has no line {END}"))?;
    let results = results(record, charts, folder);
    Ok(format!("{before}{BEGIN}\n\n{results}\n{END}{after}"))
}

fn results(record: &Record, charts: &[Chart], folder: &str) -> String {
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
    let noise =
        if settings.noisy { "; **a busy machine was accepted: the figures are worth little**" } else { "" };
    row(
        "other processes",
        format!(
            "{:.1} % of the processors before the run ({:.1} % stolen), {:.1} % after it{noise}",
            settings.background * 100.0,
            settings.background_steal * 100.0,
            settings.background_after * 100.0
        ),
    );
    text.push_str("\n## Systems\n\n");
    for system in &record.systems {
        let _ = writeln!(text, "- **{}**: {}", system.name, system.about);
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::SystemInfo;

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let page = format!("# Head\n\n{BEGIN}\nold\n{END}\n\ntail\n");
        let system =
            SystemInfo { name: "splice".into(), about: "an engine".into(), config: "x = 1\n".into() };
        let record = Record { systems: vec![system], ..Record::default() };
        let charts = [Chart { workload: "bulk".into(), svg: String::new() }];
        let new = insert(&page, &record, &charts, "benchmarks").unwrap();
        assert!(new.starts_with("# Head\n\n") && new.ends_with("\n\ntail\n"));
        assert!(!new.contains("old") && new.contains("**splice**") && new.contains("(benchmarks/bulk.svg)"));
        assert_eq!(insert(&new, &record, &charts, "benchmarks").unwrap(), new, "again is the same");
        assert!(insert("# Head\n", &record, &charts, "x").is_err());
    }
}
