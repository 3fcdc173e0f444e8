//! The part of `docs/benchmarks.md` that a run writes: between two marks, and nothing outside them.

use std::fmt::Write as _;

use anyhow::Context as _;

use super::charts::Chart;
use super::table;
use crate::record::Record;

const BEGIN: &str = "<!-- results: written by `cargo xtask bench --write-docs`, do not edit -->";
const END: &str = "<!-- end of results -->";

/// Puts the results of a run into the page; `folder` is where its charts lie, relative to the page.
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
    let mut say = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| {name} | {value} |");
    };
    say("of the run", "value".to_owned());
    say("---", "---".to_owned());
    say("begun", format!("{} s after 1970-01-01 UTC", record.begun));
    say("processors", format!("{} × {}", machine.processors, machine.processor));
    say("memory", format!("{} MiB", machine.memory_kib / 1024));
    say("system", format!("{}, Linux {}", machine.system, machine.kernel));
    say("injector", format!("{}, built by {}", machine.injector, machine.rustc));
    say("repeats", format!("{} of {} s each, interleaved", settings.repeats, settings.seconds));
    say("spinners", if settings.spinners { "on every processor".into() } else { "none".into() });
    let noise =
        if settings.noisy { "; **a busy machine was accepted: the figures are worth little**" } else { "" };
    say(
        "others",
        format!(
            "{:.1} % of the processors before the run ({:.1} % stolen), {:.1} % after it{noise}",
            settings.background * 100.0,
            settings.background_steal * 100.0,
            settings.background_after * 100.0
        ),
    );
    text.push_str("\n## Peers\n\n");
    for peer in &record.peers {
        let _ = writeln!(text, "- **{}**: {}", peer.name, peer.about);
    }
    text.push_str("\n## Figures\n\n");
    for chart in charts {
        let _ = writeln!(text, "![{work}]({folder}/{work}.svg)", work = chart.work);
    }
    text.push('\n');
    text.push_str(&table::full(record));
    text.push_str("\n## Configurations\n\n");
    for peer in record.peers.iter().filter(|peer| !peer.config.is_empty()) {
        let _ = writeln!(
            text,
            "<details><summary>{}</summary>\n\n```\n{}\n```\n\n</details>\n",
            peer.name,
            peer.config.trim_end()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::PeerNote;

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let page = format!("# Head\n\n{BEGIN}\nold\n{END}\n\ntail\n");
        let peer = PeerNote { name: "splice".into(), about: "an engine".into(), config: "x = 1\n".into() };
        let record = Record { peers: vec![peer], ..Record::default() };
        let charts = [Chart { work: "bulk".into(), svg: String::new() }];
        let new = insert(&page, &record, &charts, "benchmarks").unwrap();
        assert!(new.starts_with("# Head\n\n") && new.ends_with("\n\ntail\n"));
        assert!(!new.contains("old") && new.contains("**splice**") && new.contains("(benchmarks/bulk.svg)"));
        assert_eq!(insert(&new, &record, &charts, "benchmarks").unwrap(), new, "again is the same");
        assert!(insert("# Head\n", &record, &charts, "x").is_err());
    }
}
