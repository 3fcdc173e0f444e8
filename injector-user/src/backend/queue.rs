//! Clients that wait because every backend has as many sessions as it may (`max_connections`).

use std::{
    fmt,
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use crate::config::Listener;

/// The clients of one listener that wait for a backend. They are notified in the order in which they
/// began to wait, but one that comes just as a session ends may be quicker.
#[derive(Debug)]
pub(super) struct Queue {
    /// Notified when a session of a backend ends.
    pub(super) released: Arc<Notify>,
    waiting: AtomicUsize,
    max: usize,
    timeout: Duration,
}

/// Why a client does not wait any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPlace {
    /// As many as may wait do.
    QueueFull,
    /// `timeouts.queue` is over.
    TimedOut,
}

/// A place in the queue, until it is dropped.
struct Place<'a>(&'a AtomicUsize);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Display for NoPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::QueueFull => "max_queue clients wait already",
            Self::TimedOut => "no session ended within timeouts.queue",
        })
    }
}

impl Queue {
    /// The queue of a listener. Backends keep their sessions across a reload, and notify the same one.
    pub(super) fn new(listener: &Listener, before: Option<&Self>) -> Self {
        Self {
            released: before.map(|before| Arc::clone(&before.released)).unwrap_or_default(),
            waiting: AtomicUsize::new(0),
            max: listener.max_queue,
            timeout: listener.timeouts.queue,
        }
    }

    /// How many clients wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Tries until something other than `None` comes of it: again whenever a session has ended.
    ///
    /// # Errors
    /// [`NoPlace`].
    pub(super) async fn wait<T, F: Future<Output = Option<T>>>(
        &self,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, NoPlace> {
        let deadline = Instant::now() + self.timeout;
        let mut place = None;
        loop {
            let mut released = pin!(self.released.notified());
            // Before the attempt: a session that ends meanwhile must not be missed.
            released.as_mut().enable();
            if let Some(outcome) = attempt().await {
                return Ok(outcome);
            }
            if place.is_none() {
                place = Some(self.place().ok_or(NoPlace::QueueFull)?);
            }
            timeout_at(deadline, released).await.map_err(|_| NoPlace::TimedOut)?;
        }
    }

    fn place(&self) -> Option<Place<'_>> {
        let more = |waiting: usize| (waiting < self.max).then_some(waiting + 1);
        self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Place(&self.waiting))
    }
}
