//! What a soak runs.

use std::fmt;
use std::time::Duration;

/// What carries the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The kernel, between two sockets.
    Splice,
    /// The daemon, by read and write.
    Relay,
}

impl Engine {
    /// Both engines.
    pub const ALL: [Self; 2] = [Self::Splice, Self::Relay];

    /// Its name in the daemon's configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Splice => "splice",
            Self::Relay => "relay",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The seed of all random choices: the same seed gives the same plan to every session.
    pub seed: u64,
    /// How long new sessions are started; running ones are waited for.
    pub duration: Duration,
    /// Number of simultaneous sessions.
    pub at_once: usize,
    /// The engine under test.
    pub engine: Engine,
    /// Minimum number of sessions for the run to pass.
    pub planned: u64,
    /// Run only this session, whatever the duration.
    pub only: Option<u64>,
}
