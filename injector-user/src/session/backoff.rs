//! Pauses between checks of a condition that the kernel does not notify of.

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

/// A pause before the next check.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    sleep: Option<Pin<Box<Sleep>>>,
    /// Failed checks in a row.
    attempts: u32,
}

impl Backoff {
    /// Starts a pause of `length`.
    pub(super) fn start(&mut self, length: Duration, task: &mut task::Context<'_>) {
        let sleep = self.sleep.insert(Box::pin(sleep(length)));
        if sleep.as_mut().poll(task).is_ready() {
            task.waker().wake_by_ref();
        }
    }

    /// Starts the pause after a failed check: twice as long as the last, but at most `max`. The
    /// first `immediate` times there is no pause; the next check follows after other tasks have
    /// run.
    pub(super) fn extend(&mut self, immediate: u32, max: Duration, task: &mut task::Context<'_>) {
        if self.attempts < immediate {
            // Polled once, it is pending and wakes this task after the others have run.
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

    /// Forgets the failed checks, because one has succeeded.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }
}
