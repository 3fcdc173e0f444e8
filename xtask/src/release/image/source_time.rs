//! The time of the image's files.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};

use crate::cargo::workspace;

/// The time of all files in the image, in seconds since 1970: the same source makes the same image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Time(pub(super) u64);

impl Time {
    /// `SOURCE_DATE_EPOCH`, or the last commit.
    pub(super) fn of_source() -> Result<Self> {
        if let Ok(text) = std::env::var("SOURCE_DATE_EPOCH") {
            return Ok(Self(text.parse().context("SOURCE_DATE_EPOCH is not a number")?));
        }
        let mut git = std::process::Command::new("git");
        git.current_dir(workspace()).args(["log", "-1", "--format=%ct"]);
        let commit = git.output().ok().and_then(|it| String::from_utf8_lossy(&it.stdout).trim().parse().ok());
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Ok(Self(commit.unwrap_or_else(now)))
    }

    pub(super) fn system(self) -> SystemTime {
        UNIX_EPOCH + std::time::Duration::from_secs(self.0)
    }

    /// In the form of `--created` (RFC 3339).
    pub(super) fn rfc3339(self) -> Result<String> {
        let output = std::process::Command::new("date")
            .args(["--utc", "--date", &format!("@{}", self.0), "+%Y-%m-%dT%H:%M:%SZ"])
            .output()
            .context("cannot run date")?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}
