//! The tables in Markdown, which is readable in a terminal too.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::iter;

use super::digits;
use super::summary::{Cell, Row, Section, sections};
use crate::record::{Figure, Record};
use crate::stats::{Estimate, Spread};

/// All workloads with all figures.
#[must_use]
pub fn full(record: &Record) -> String {
    let mut text = String::new();
    for section in sections(record) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "### {}\n{}.\n", section.workload, section.about);
        text.push_str(&align(&whole(&section)));
        text.push('\n');
    }
    text.push_str(&all_counters(record));
    text.push_str(&failures(record));
    text
}

/// The ratios alone: one line for each workload and system.
#[must_use]
pub fn ratios(record: &Record) -> String {
    let head = ["workload", "system", "", "", "to HAProxy's best", "to kernel NAT", "to direct"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for section in sections(record) {
        let Some(figure) = section.figures.first() else { continue };
        for row in &section.rows {
            let value = row.cells.first().copied().flatten();
            rows.push(vec![
                section.workload.clone(),
                row.system.clone(),
                value.map(|cell| spread(&cell.value)).unwrap_or_else(|| "failed".to_owned()),
                figure.unit.clone(),
                row.to_haproxy.as_ref().map(ratio).unwrap_or_default(),
                row.to_nat.as_ref().map(ratio).unwrap_or_default(),
                row.to_direct.as_ref().map(ratio).unwrap_or_default(),
            ]);
        }
    }
    format!("{}{}", align(&rows), failures(record))
}

/// One workload, without the columns that no system has a value in.
fn whole(section: &Section) -> Vec<Vec<String>> {
    let mut head = vec!["system".to_owned()];
    for figure in &section.figures {
        head.push(figure.unit.clone());
        if figure.above_direct {
            head.push("above direct".to_owned());
        }
    }
    let haproxy = section.haproxy.as_deref().unwrap_or("HAProxy's best");
    let rest = ["to nat", "to direct", "CPU share", "steal"].map(str::to_owned);
    head.extend(iter::once(format!("to {haproxy}")).chain(rest));
    let mut rows = vec![head];
    rows.extend(section.rows.iter().map(|row| line(row, &section.figures)));
    without_blank_columns(&rows)
}

/// A table without the columns that are blank below the first row.
fn without_blank_columns(rows: &[Vec<String>]) -> Vec<Vec<String>> {
    let blank = |column: usize| rows.iter().skip(1).all(|row| row.get(column).is_none_or(String::is_empty));
    let keep = |row: &Vec<String>| {
        let words = row.iter().enumerate().filter(|(column, _)| !blank(*column));
        words.map(|(_, word)| word.clone()).collect()
    };
    rows.iter().map(keep).collect()
}

fn line(row: &Row, figures: &[Figure]) -> Vec<String> {
    let failed = if row.failures > 0 { format!(" ({} failed)", row.failures) } else { String::new() };
    let mut words = vec![format!("{}{failed}", row.system)];
    for (figure, cell) in figures.iter().zip(&row.cells) {
        let word = |cell: Cell| cell.estimate.as_ref().map_or_else(|| spread(&cell.value), change);
        words.push(cell.map(word).unwrap_or_default());
        if figure.above_direct {
            words.push(cell.and_then(above).unwrap_or_default());
        }
    }
    words.push(row.to_haproxy.as_ref().map(ratio).unwrap_or_default());
    words.push(row.to_nat.as_ref().map(ratio).unwrap_or_default());
    words.push(row.to_direct.as_ref().map(ratio).unwrap_or_default());
    words.push(row.cpu_share.map(|share| format!("{share:.2}")).unwrap_or_default());
    words.push(format!("{:.1} %", row.steal * 100.0));
    words
}

fn above(cell: Cell) -> Option<String> {
    cell.above_direct.map(|above| digits(above.median))
}

fn spread(value: &Spread) -> String {
    format!("{} ± {:.0} %", digits(value.median), value.half_width() * 100.0)
}

fn ratio(value: &Spread) -> String {
    format!("{:.2} ({:.2} to {:.2})", value.median, value.min, value.max)
}

/// A change in percent.
fn change(estimate: &Estimate) -> String {
    let Estimate { median, low, high, confident } = estimate;
    let what = if *confident { "95 %: " } else { "" };
    format!("{median:+.1} % ({what}{low:+.1} to {high:+.1})")
}

/// What the systems counted themselves, over all repeats: it shows which ones spliced.
fn all_counters(record: &Record) -> String {
    let mut rows =
        vec![vec!["workload".to_owned(), "system".to_owned(), "own counters, all repeats".to_owned()]];
    for workload in &record.workloads {
        for system in &record.systems {
            let ours = || {
                record
                    .measurements
                    .iter()
                    .filter(|it| it.workload == workload.name && it.system == system.name)
            };
            // A measurement may lack a counter that another has.
            let keys: BTreeSet<_> = ours().flat_map(|it| it.counters.keys()).collect();
            if keys.is_empty() {
                continue;
            }
            let sum = |key: &String| ours().filter_map(|it| it.counters.get(key)).sum::<f64>();
            let words: Vec<_> = keys.into_iter().map(|key| format!("{key} {}", digits(sum(key)))).collect();
            rows.push(vec![workload.name.clone(), system.name.clone(), words.join(", ")]);
        }
    }
    if rows.len() > 1 { format!("### How the bytes were carried\n\n{}", align(&rows)) } else { String::new() }
}

fn failures(record: &Record) -> String {
    let mut text = String::new();
    for failed in record.failures() {
        let why = failed.failed.as_deref().unwrap_or_default();
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "\nFAILED: {}, {}, repeat {}: {why}",
            failed.workload,
            failed.system,
            failed.repeat + 1
        );
    }
    text
}

/// A Markdown table with aligned columns; the first row is the header.
pub(crate) fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|word| word.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(|column| width(column).max(3)).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (word, width) in row.iter().zip(&widths) {
            // Writing to a String cannot fail.
            let _ = write!(text, "| {word:<width$} ");
        }
        text.push_str("|\n");
        if number == 0 {
            for width in &widths {
                let _ = write!(text, "|{}", "-".repeat(width + 2));
            }
            text.push_str("|\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [["a", "long"], ["four", "µ"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(align(&rows), "| a    | long |\n|------|------|\n| four | µ    |\n");
    }

    #[test]
    fn a_blank_column_is_left_out() {
        let rows =
            [["a", "b", "c"], ["1", "", ""], ["2", "", "3"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(without_blank_columns(&rows), [["a", "c"], ["1", ""], ["2", "3"]]);
    }

    #[test]
    fn a_change_reads_in_percent() {
        let few = Estimate { median: -0.42, low: -1.0, high: 0.2, confident: false };
        assert_eq!(change(&few), "-0.4 % (-1.0 to +0.2)");
        assert_eq!(change(&Estimate { confident: true, ..few }), "-0.4 % (95 %: -1.0 to +0.2)");
    }

    #[test]
    fn a_spread_reads_as_a_share() {
        let value = Spread { median: 2.0, min: 1.8, max: 2.2 };
        assert_eq!(spread(&value), "2.00 ± 10 %");
        assert_eq!(ratio(&value), "2.00 (1.80 to 2.20)");
    }
}
