//! Holds the Markdown pages to the repository: every link leads to a file and a heading.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path, PathBuf},
};

use crate::cargo::workspace;

/// Folders with pages; `""` is the root.
const FOLDERS: [&str; 6] = ["", "docs", "docs/decisions", "deploy", "deploy/kubernetes", "fuzz"];

fn pages() -> BTreeMap<PathBuf, String> {
    let mut pages = BTreeMap::new();
    for folder in FOLDERS {
        for entry in fs::read_dir(workspace().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let text = fs::read_to_string(&path).unwrap();
                pages.insert(path.strip_prefix(workspace()).unwrap().to_owned(), text);
            }
        }
    }
    pages
}

/// The lines outside fenced blocks, numbered from 1.
fn prose(text: &str) -> Vec<(usize, &str)> {
    let mut fenced = false;
    let numbered = text.lines().enumerate().map(|(index, line)| (index + 1, line));
    numbered
        .filter(|(_, line)| {
            let fence = line.trim_start().starts_with("```");
            fenced ^= fence;
            !fenced && !fence
        })
        .collect()
}

/// The anchor that a Markdown heading gets.
fn slug(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn anchors(text: &str) -> BTreeSet<String> {
    let lines = prose(text);
    let headings = lines.iter().filter(|(_, line)| line.starts_with('#')).map(|(_, line)| slug(line));
    let explicit = text.split("id=\"").skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.to_owned()));
    headings.chain(explicit).collect()
}

/// The path without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => assert!(normal.pop(), "{} leaves the repository", path.display()),
            Component::CurDir => {}
            other => normal.push(other),
        }
    }
    normal
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let pages = pages();
    assert!(pages.len() > 20, "{} pages", pages.len());
    let mut broken = Vec::new();
    for (page, text) in &pages {
        for (number, line) in prose(text) {
            let links = line.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0));
            for link in links.filter(|link| !link.contains(':')) {
                let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
                let parent = page.parent().unwrap();
                let target = if file.is_empty() { page.clone() } else { normal(&parent.join(file)) };
                let heading = || pages.get(&target).is_some_and(|text| anchors(text).contains(anchor));
                if !workspace().join(&target).exists() || !anchor.is_empty() && !heading() {
                    broken.push(format!("{}:{number}: {link}", page.display()));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}
