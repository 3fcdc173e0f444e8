//! `[stop]`

use std::time::Duration;

use super::parse::section::{Section, Zero};

/// `[stop]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    /// How long sessions may continue after SIGTERM. Zero aborts them at once.
    pub deadline: Duration,
}

impl Default for Stop {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(30) }
    }
}

pub(super) fn read(section: Section<'_>) -> Stop {
    let mut stop = Stop::default();
    stop.deadline =
        section.duration("deadline", Zero::Allowed).map_or(stop.deadline, |(_, deadline)| deadline);
    section.finish();
    stop
}
