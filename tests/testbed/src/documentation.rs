//! Examples in the documentation, which the tests run.

use std::fs;
use std::path::Path;

use anyhow::Context;

/// The `number`th block of code (from 0) below a heading of a page, `docs/receivers.md` for example.
///
/// # Errors
/// When there is no such page, heading or block.
pub fn example(page: &str, heading: &str, number: usize) -> anyhow::Result<String> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = here.ancestors().nth(2).unwrap_or(here).join(page);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    block(&text, heading, number).with_context(|| format!("{page} has no example {number} below {heading:?}"))
}

/// Headings inside a block are comments of its language.
fn block(text: &str, heading: &str, number: usize) -> Option<String> {
    let (mut below, mut inside, mut seen) = (false, false, 0);
    let mut found = String::new();
    for line in text.lines() {
        if line.starts_with("```") {
            if inside && below {
                if seen == number {
                    return Some(found);
                }
                seen += 1;
            }
            inside = !inside;
        } else if inside {
            if below && seen == number {
                found.push_str(line);
                found.push('\n');
            }
        } else if line.starts_with('#') {
            below = line.trim_start_matches('#').trim() == heading;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# A\n```\none\n```\n## B\ntext\n```toml\n# B\ntwo\n```\n```\nthree\n```\n# C\n";

    #[test]
    fn a_block_belongs_to_the_heading_above_it() {
        assert_eq!(block(PAGE, "A", 0).as_deref(), Some("one\n"));
        assert_eq!(block(PAGE, "B", 0).as_deref(), Some("# B\ntwo\n"));
        assert_eq!(block(PAGE, "B", 1).as_deref(), Some("three\n"));
        assert_eq!((block(PAGE, "A", 1), block(PAGE, "C", 0), block(PAGE, "D", 0)), (None, None, None));
    }

    /// The tests run the complete settings of `docs/receivers.md`.
    #[test]
    fn the_settings_in_the_readme_are_part_of_the_complete_ones() {
        for (number, heading) in [(0, "Postfix"), (1, "Dovecot 2.3")] {
            let short = example("README.md", "Configure the mail server", number).unwrap();
            let complete = example("docs/receivers.md", heading, 0).unwrap();
            for line in short.lines() {
                assert!(complete.lines().any(|other| other == line), "{heading}: {line:?} in\n{complete}");
            }
        }
    }
}
