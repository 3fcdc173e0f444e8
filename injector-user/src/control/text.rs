//! Parts of answers as text.

use std::{
    fmt::{self, Write as _},
    time::Duration,
};

/// Writes rows below their titles, in columns.
pub(super) fn write_table<const N: usize>(
    out: &mut String,
    titles: [&str; N],
    rows: &[[String; N]],
) -> fmt::Result {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(String::len);
        cells.chain(titles.get(column).map(|title| title.len())).max().unwrap_or_default()
    };
    let widths: [usize; N] = std::array::from_fn(width);
    for row in std::iter::once(&titles.map(str::to_owned)).chain(rows) {
        let line: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        writeln!(out, "{}", line.join("  ").trim_end())?;
    }
    Ok(())
}

/// Writes how many rows are left out.
pub(super) fn write_more(out: &mut String, count: u64, shown: usize) -> fmt::Result {
    let more = count.saturating_sub(shown as u64);
    if more > 0 {
        writeln!(out, "and {more} more")?;
    }
    Ok(())
}

/// A duration in its two largest units.
#[must_use]
pub(super) fn age(millis: u64) -> String {
    let seconds = millis / 1000;
    if seconds == 0 {
        return format!("{millis}ms");
    }
    let text = humantime::format_duration(Duration::from_secs(seconds)).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// A number of bytes with its unit.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut scaled = bytes as f64;
    let mut unit = "";
    for next in UNITS {
        if scaled < 1024.0 {
            break;
        }
        scaled /= 1024.0;
        unit = next;
    }
    format!("{scaled:.1} {unit}")
}
