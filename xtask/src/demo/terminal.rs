//! The demo's layout: at most 100 columns, with colours if the terminal supports them.

use std::io::IsTerminal as _;

/// The widest line, in columns.
pub(super) const WIDTH: usize = 100;

/// A style with a meaning.
#[derive(Clone, Copy)]
pub(super) enum Style {
    /// Headings.
    Bold,
    /// An assertion that holds.
    Green,
    /// An assertion that does not hold.
    Red,
    /// Less important text.
    Dim,
    /// The value that matters.
    Cyan,
}

/// The text in a style, or unchanged where colours are not wanted (<https://no-color.org>).
pub(super) fn styled(styled: Style, text: &str) -> String {
    let wanted =
        std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if !wanted {
        return text.to_owned();
    }
    let code = match styled {
        Style::Bold => "1",
        Style::Green => "32",
        Style::Red => "31",
        Style::Dim => "2",
        Style::Cyan => "36",
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// Prints the heading of a part.
pub(super) fn heading(text: &str) {
    println!("\n{}", styled(Style::Bold, text));
}

/// Prints a name and its value, the values in one column.
pub(super) fn row(name: &str, value: &str) {
    println!("  {name:<44}{value}");
}

/// The mark in front of an assertion.
pub(super) fn mark(holds: bool) -> String {
    if holds { styled(Style::Green, "✓") } else { styled(Style::Red, "✗") }
}

/// A number with thousands separators: `1,234,567`.
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in hexadecimal, separated by spaces.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

/// Puts words into lines of at most [`WIDTH`] columns, every line after the first indented further.
pub(super) fn wrapped(words: &[String]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= WIDTH => {
                line.push(' ');
                line.push_str(word);
            }
            None => lines.push(format!("  {word}")),
            Some(_) => lines.push(format!("      {word}")),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_separated() {
        for (number, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(count(number), text);
        }
    }

    #[test]
    fn lines_keep_within_the_width() {
        let words: Vec<String> = (0..60).map(|number| format!("field{number}=value")).collect();
        let lines = wrapped(&words);
        assert!(lines.iter().all(|line| line.chars().count() <= WIDTH), "{lines:?}");
        assert_eq!(lines.join(" ").split_whitespace().collect::<Vec<_>>(), words);
        assert!(lines[0].starts_with("  field0") && lines[1].starts_with("      field"));
    }
}
