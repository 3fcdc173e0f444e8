//! Failures of a client's connections.

use std::fmt::Display;

use crate::job::JobOutcome;

/// The number of failures, and the message of the first.
#[derive(Clone, Debug, Default)]
pub(super) struct Failures {
    count: u64,
    first: Option<String>,
}

impl Failures {
    pub(super) fn note(&mut self, what: &str, error: impl Display) {
        self.count += 1;
        self.first.get_or_insert_with(|| format!("{what}: {error}"));
    }

    pub(super) fn into(self, outcome: &mut JobOutcome) {
        outcome.failures += self.count;
        outcome.failure = outcome.failure.take().or(self.first);
    }
}
