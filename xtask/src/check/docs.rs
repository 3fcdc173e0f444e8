//! Holds the Markdown pages to the repository: the links, headings and paths in them exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path, PathBuf},
};

use crate::cargo::workspace;

fn pages() -> BTreeMap<PathBuf, String> {
    let pages =
        super::tracked_files().into_iter().filter(|file| file.extension().is_some_and(|it| it == "md"));
    pages.map(|page| (page.clone(), fs::read_to_string(workspace().join(page)).unwrap())).collect()
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

#[test]
fn every_path_that_a_page_names_exists() {
    let mut missing = Vec::new();
    let mut checked = 0;
    for (page, text) in pages() {
        for (number, line) in prose(&text) {
            // Every second piece is a code span.
            for span in line.split('`').skip(1).step_by(2).filter(|span| names_a_path(span)) {
                checked += 1;
                let mut roots =
                    [Path::new(""), Path::new("injector-user/src"), page.parent().unwrap()].into_iter();
                if !roots.any(|root| workspace().join(root).join(span).exists()) {
                    missing.push(format!("{}:{number}: {span}", page.display()));
                }
            }
        }
    }
    assert!(checked > 100, "only {checked} paths found");
    assert!(missing.is_empty(), "{missing:#?}");
}

/// Whether a code span is the name of a source file, or a path below one of the repository's folders.
fn names_a_path(span: &str) -> bool {
    let plain = span.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c));
    let folder = span.split_once('/').map(|(folder, _)| folder);
    let ours = |folder: &str| !folder.is_empty() && folder != "target" && workspace().join(folder).is_dir();
    plain && (span.ends_with(".rs") && !span.starts_with('.') || folder.is_some_and(ours))
}
