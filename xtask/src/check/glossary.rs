//! Keeps the words out of code, messages and documentation that docs/glossary.md replaces.

use std::{collections::BTreeMap, fs};

use crate::cargo;

/// The table of words in the glossary.
const HEADING: &str = "## Words we do not use";

/// Files that name the words on purpose.
const EXEMPT: [&str; 3] = ["docs/glossary.md", "CHANGELOG.md", "xtask/src/check/glossary.rs"];

/// Each word, in lower case, with what to use instead.
fn replaced() -> BTreeMap<String, String> {
    let glossary = fs::read_to_string(cargo::workspace().join("docs/glossary.md")).unwrap();
    let table = glossary.split_once(HEADING).unwrap_or_else(|| panic!("no {HEADING:?}")).1;
    let rows = table
        .lines()
        .skip_while(|line| !line.starts_with("|---"))
        .skip(1)
        .take_while(|line| line.starts_with('|'));
    rows.filter_map(|row| {
        let mut cells = row.trim_matches('|').split('|').map(str::trim);
        Some((cells.next()?.to_lowercase(), cells.next()?.to_owned()))
    })
    .collect()
}

/// Whether `line`, in lower case, has `word` with nothing of a word on either side. `_` separates words, unless `word` is a
/// phrase: `let in_time` is code.
fn has(line: &str, word: &str) -> bool {
    let of_a_word = |c: char| c.is_alphanumeric() || (c == '_' && word.contains(' '));
    line.match_indices(word).any(|(at, _)| {
        let before = line.get(..at).and_then(|text| text.chars().next_back());
        let after = line.get(at + word.len()..).and_then(|text| text.chars().next());
        !before.is_some_and(of_a_word) && !after.is_some_and(of_a_word)
    })
}

#[test]
fn words_are_found_whole() {
    assert!(has("who is told of it", "told") && has("was_told", "told") && has("told", "told"));
    assert!(!has("untold", "told") && !has("a bookstore", "books") && !has("indoors", "doors"));
    assert!(has("it was let in", "let in") && !has("let in_time = 1;", "let in"));
}

#[test]
fn replaced_words_are_not_used() {
    let replaced = replaced();
    assert!(replaced.len() > 20, "the table was not read: {replaced:?}");
    let mut found = Vec::new();
    for file in super::tracked_files() {
        let text_file = [".rs", ".md", ".toml", ".yml", ".yaml", ".sh", ".service"];
        let name = file.to_str().unwrap();
        if EXEMPT.contains(&name) || !text_file.iter().any(|ending| name.ends_with(ending)) {
            continue;
        }
        let text = fs::read_to_string(cargo::workspace().join(&file)).unwrap();
        for (number, line) in text.lines().enumerate() {
            let lower = line.to_lowercase();
            for (word, instead) in replaced.iter().filter(|(word, _)| has(&lower, word)) {
                found.push(format!("{name}:{}: {word:?} (use: {instead}): {}", number + 1, line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "{} uses of replaced words:\n{}", found.len(), found.join("\n"));
}
