//! When dialogues start, and how long they are measured.

use std::time::Duration;

/// When the next dialogue starts.
#[derive(Clone, Copy, Debug)]
pub(in crate::client) enum Pace {
    /// When an earlier one has ended (closed loop); this many at a time.
    Closed { connections: usize },
    /// At a fixed rate per second (open loop).
    Open { rate: f64 },
}

/// Phases of a run, in this order.
pub(super) const WARMING: u8 = 0;
pub(super) const MEASURING: u8 = 1;
pub(super) const ENDING: u8 = 2;

/// How long the last dialogues of an open loop may still run.
pub(super) const DRAIN: Duration = Duration::from_secs(2);

/// Limit of simultaneous dialogues of an open loop, per thread: a system that is this far behind does not keep up.
pub(super) const MAX_OPEN: usize = 4096;

/// How long a thread waits before it reads the phase again.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// Bytes per read; larger than any response.
pub(super) const READ_BUFFER: usize = 64 << 10;

impl Pace {
    /// The share of one thread.
    pub(super) fn share(self, thread: usize, threads: usize) -> Self {
        match self {
            Self::Closed { connections } => {
                let rest = usize::from(thread < connections % threads);
                Self::Closed { connections: connections / threads + rest }
            }
            #[expect(clippy::cast_precision_loss, reason = "a handful of threads")]
            Self::Open { rate } => Self::Open { rate: rate / threads as f64 },
        }
    }
}
