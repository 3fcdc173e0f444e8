//! Reading the log of a running server.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::process::POLL;

/// A position in a log, in bytes from its start; searches begin after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark(usize);

/// A log file that a server appends to.
#[derive(Clone, Debug)]
pub struct LogFile {
    path: PathBuf,
}

impl LogFile {
    /// The log at `path`, which need not exist yet.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its current end.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark(self.read().len())
    }

    /// What was logged after the mark, up to the last complete line.
    #[must_use]
    pub fn since(&self, mark: Mark) -> String {
        let text = self.read();
        let end = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        String::from_utf8_lossy(text.get(mark.0..end).unwrap_or_default()).into_owned()
    }

    /// Lines after the mark that contain every one of `parts`.
    #[must_use]
    pub fn lines_with(&self, mark: Mark, parts: &[&str]) -> Vec<String> {
        let text = self.since(mark);
        text.lines().filter(|line| parts.iter().all(|part| line.contains(part))).map(str::to_owned).collect()
    }

    /// Waits for the first line after the mark that contains every one of `parts`.
    ///
    /// # Errors
    /// When there is none within the limit; the error has the lines that were logged.
    pub fn wait_for(&self, mark: Mark, parts: &[&str], limit: Duration) -> anyhow::Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(line) = self.lines_with(mark, parts).into_iter().next() {
                return Ok(line);
            }
            if Instant::now() >= deadline {
                let name = self.path.display();
                bail!("no line with {parts:?} in {name} within {limit:?}, but:\n{}", self.since(mark));
            }
            thread::sleep(POLL);
        }
    }

    fn read(&self) -> Vec<u8> {
        // A missing file is an empty log.
        fs::read(&self.path).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_lines_behind_the_mark_count() {
        let dir = tempfile::tempdir().unwrap();
        let log = LogFile::new(dir.path().join("log"));
        assert_eq!(log.mark(), Mark(0));
        fs::write(log.path(), "connect a\n").unwrap();
        let mark = log.mark();
        fs::write(log.path(), "connect a\nconnect b\nconnect c").unwrap();
        assert_eq!(log.lines_with(mark, &["connect"]), ["connect b"]);
        let error = log.wait_for(mark, &["connect", "c\n"], Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("connect b"), "{error}");
    }
}
