//! The timer of a session.
//!
//! One task of each worker fires the timers of all its sessions. A tokio timer for each session
//! would take more memory than anything else of an idle session, and more time than a short one
//! lasts.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, Waker},
    time::Duration,
};

use atomic_waker::AtomicWaker;

use crate::os::clock::monotonic_ns;

/// How often the timers are checked, and so how late one may fire. Sessions need whole seconds.
pub(super) const TICK: Duration = Duration::from_millis(250);

/// [`SessionTimer::due`] of a timer that was not scheduled.
const NEVER: u64 = u64::MAX;
/// [`SessionTimer::due`] of a timer that has fired, until its session notices.
const FIRED: u64 = 0;

/// When a session is woken next.
#[derive(Debug)]
pub(super) struct SessionTimer {
    /// `CLOCK_MONOTONIC` in nanoseconds, [`NEVER`] or [`FIRED`].
    due: AtomicU64,
    waker: AtomicWaker,
}

impl SessionTimer {
    pub(super) fn new() -> Self {
        Self { due: AtomicU64::new(NEVER), waker: AtomicWaker::new() }
    }

    /// Schedules the timer, in place of an earlier schedule. A timer that has fired stays so.
    pub(super) fn schedule(&self, delay: Duration) {
        let delay = u64::try_from(delay.as_nanos()).unwrap_or(NEVER);
        let due = monotonic_ns().saturating_add(delay);
        let unless_fired = |before| (before != FIRED).then_some(due);
        // An error means that the timer has fired.
        let _ = self.due.fetch_update(Ordering::Relaxed, Ordering::Relaxed, unless_fired);
    }

    /// Ready once after the timer has fired.
    pub(super) fn poll_timer(&self, task: &mut Context<'_>) -> Poll<()> {
        // Registered before the check, so that no wake-up between the two is missed.
        self.waker.register(task.waker());
        match self.due.compare_exchange(FIRED, NEVER, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => Poll::Ready(()),
            Err(_) => Poll::Pending,
        }
    }

    /// Whether the timer is due at `now`, in nanoseconds of `CLOCK_MONOTONIC`.
    pub(super) fn is_due(&self, now: u64) -> bool {
        self.due.load(Ordering::Relaxed) <= now
    }

    /// Fires the timer; returns the waker of the session if it waits.
    pub(super) fn fire(&self) -> Option<Waker> {
        self.due.store(FIRED, Ordering::Release);
        self.waker.take()
    }
}
