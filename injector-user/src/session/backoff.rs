//! Pauses between checks of what the kernel does not notify of.

use std::{
    future::Future as _,
    pin::{Pin, pin},
    task::{self, Poll, ready},
    time::Duration,
};

use tokio::{
    task::yield_now,
    time::{Sleep, sleep},
};

use crate::net::socket::RETRY_DELAY;

/// Between two looks at what nothing tells of.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    sleep: Option<Pin<Box<Sleep>>>,
    /// Looks in a row that found nothing.
    attempts: u32,
}

impl Backoff {
    /// Begins, for so long.
    pub(super) fn start(&mut self, length: Duration, task: &mut task::Context<'_>) {
        let sleep = self.sleep.insert(Box::pin(sleep(length)));
        if sleep.as_mut().poll(task).is_ready() {
            task.waker().wake_by_ref();
        }
    }

    /// Begins after a look that has found nothing. Each is longer than the one before, but not longer than `most`. Of the first
    /// looks, `at_once` come without a pause, after other tasks.
    pub(super) fn extend(&mut self, immediate: u32, max: Duration, task: &mut task::Context<'_>) {
        if self.attempts < immediate {
            // Polled once it is pending, and wakes this task when the others have had their turn.
            let _ = pin!(yield_now()).poll(task);
        } else {
            let length = RETRY_DELAY * (1 << (self.attempts - immediate).min(10));
            self.start(length.min(max), task);
        }
        self.attempts += 1;
    }

    pub(super) fn poll_elapsed(&mut self, task: &mut task::Context<'_>) -> Poll<()> {
        if let Some(sleep) = &mut self.sleep {
            ready!(sleep.as_mut().poll(task));
            self.sleep = None;
        }
        Poll::Ready(())
    }

    /// What was looked for is there.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }
}
