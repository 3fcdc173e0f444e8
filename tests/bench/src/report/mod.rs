//! Reports of a run, for readers.

pub mod charts;
pub mod docs;
pub mod summary;
pub mod table;

use crate::record::Record;

/// The options of a run in one line.
#[must_use]
pub fn heading(record: &Record) -> String {
    let settings = &record.settings;
    let noise = if settings.was_busy() { "; A BUSY MACHINE WAS ACCEPTED" } else { "" };
    format!(
        "{} repeats of {} s, {}; other processes used {:.1} % of the machine before and {:.1} % after{noise}",
        settings.repeats,
        settings.seconds,
        if settings.spinners { "with spinners" } else { "without spinners" },
        settings.background * 100.0,
        settings.background_after * 100.0
    )
}

/// A number with three significant digits, or all digits before the point.
#[must_use]
pub fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        0.0 => 0,
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    let plain = format!("{value:.decimals$}");
    let point = plain.find('.').unwrap_or(plain.len());
    let (whole, rest) = plain.split_at(point);
    format!("{}{rest}", thousands(whole))
}

/// A whole number.
pub(crate) fn whole(number: u32) -> String {
    thousands(&number.to_string())
}

/// `12345` as `12,345`.
fn thousands(whole: &str) -> String {
    let (sign, figures) = whole.split_at(usize::from(whole.starts_with('-')));
    let mut text = sign.to_owned();
    for (at, figure) in figures.chars().enumerate() {
        if at > 0 && (figures.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(figure);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_significant_digits() {
        for (value, text) in [
            (12345.6, "12,346"),
            (1_234_567.0, "1,234,567"),
            (123.0, "123"),
            (12.345, "12.3"),
            (1.234, "1.23"),
            (0.01234, "0.012"),
            (0.0, "0"),
            (-1234.0, "-1,234"),
            (-123.0, "-123"),
        ] {
            assert_eq!(digits(value), text);
        }
    }
}
