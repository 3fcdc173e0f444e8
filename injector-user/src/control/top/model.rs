//! What `injector top` shows: two samples of the daemon, and the rates between them.

use std::time::Instant;

use crate::control::wire::{ListenerStatus, Sessions, Status};

/// The daemon's answers at one moment.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// When it was taken.
    pub at: Instant,
    /// The answer to `status`.
    pub status: Status,
    /// The answer to `sessions`.
    pub sessions: Sessions,
}

/// What is on the screen.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) now: Sample,
    pub(super) before: Option<Sample>,
    /// New connections a second, the newest last.
    pub(super) history: Vec<u64>,
    /// The listener whose sessions are listed; `None`: all listeners.
    pub(super) selected: Option<usize>,
    /// Why there is no newer sample.
    pub(super) error: Option<String>,
}

impl View {
    /// A view of the first sample, without rates.
    #[must_use]
    pub(super) fn new(first: Sample) -> Self {
        Self { now: first, before: None, history: Vec::new(), selected: None, error: None }
    }

    /// Adds the next sample.
    pub(super) fn update(&mut self, next: Sample) {
        self.error = None;
        self.before = Some(std::mem::replace(&mut self.now, next));
        let rate: f64 = self
            .now
            .status
            .listeners
            .iter()
            .filter_map(|it| self.rates(it))
            .map(|rates| rates.accepted)
            .sum();
        self.history.push(whole(rate));
        let over = self.history.len().saturating_sub(usize::from(u16::MAX));
        self.history.drain(..over);
    }

    /// Selects the listener `step` rows down.
    pub(super) fn select(&mut self, step: isize) {
        // The first choice is all listeners.
        let choices = self.now.status.listeners.len() + 1;
        let at = self.selected.map_or(0, |index| index + 1);
        let next = at.checked_add_signed(step).unwrap_or(choices - 1) % choices;
        self.selected = next.checked_sub(1);
    }

    /// The rates of a listener between the two samples.
    pub(super) fn rates(&self, listener: &ListenerStatus) -> Option<Rates> {
        let before = self.before.as_ref()?;
        let seconds = self.now.at.duration_since(before.at).as_secs_f64();
        let was = before.status.listeners.iter().find(|was| was.name == listener.name)?;
        if seconds <= 0.0 {
            return None;
        }
        let rate = |now: u64, before: u64| per_second(now.saturating_sub(before), seconds);
        Some(Rates {
            accepted: rate(listener.accepted, was.accepted),
            rejected: rate(listener.rejected, was.rejected),
            to_backend: rate(listener.bytes_to_backend, was.bytes_to_backend),
            to_client: rate(listener.bytes_to_client, was.bytes_to_client),
        })
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Rates {
    pub(super) accepted: f64,
    pub(super) rejected: f64,
    pub(super) to_backend: f64,
    pub(super) to_client: f64,
}

#[expect(clippy::cast_precision_loss, reason = "shown in whole numbers")]
fn per_second(count: u64, seconds: f64) -> f64 {
    count as f64 / seconds
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate is positive and far below 2^64"
)]
pub(super) fn whole(rate: f64) -> u64 {
    rate.round() as u64
}
