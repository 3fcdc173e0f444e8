//! What is known of every session, filled by both ends.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::conversation::Seen;
use super::plan::Side;

/// Both ends of one session.
#[derive(Clone, Debug, Default)]
pub(crate) struct Both {
    pub(crate) client: Option<Seen>,
    pub(crate) backend: Option<Seen>,
}

/// Every session so far.
#[derive(Debug, Default)]
pub(crate) struct Ledger(Mutex<Pages>);

/// What the ledger holds.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    pub(crate) sessions: BTreeMap<u64, Both>,
    /// Connections that reached a backend and went without a byte.
    pub(crate) without_header: u64,
    /// Connections that reached a backend and were no session, or not that one.
    pub(crate) strangers: Vec<String>,
    /// Conversations that the backend has begun and not ended.
    pub(crate) at_backend: u64,
    /// Bytes that arrived, up and down.
    pub(crate) arrived: (u64, u64),
}

impl Ledger {
    pub(crate) fn open(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters what one end saw.
    pub(crate) fn enter(&self, number: u64, side: Side, seen: Seen) {
        let mut pages = self.open();
        let (entry, arrived) = match side {
            Side::Client => (&mut pages.sessions.entry(number).or_default().client, (0, seen.received)),
            Side::Backend => (&mut pages.sessions.entry(number).or_default().backend, (seen.received, 0)),
        };
        let twice = entry.replace(seen).is_some();
        pages.arrived.0 += arrived.0;
        pages.arrived.1 += arrived.1;
        if twice {
            pages.strangers.push(format!("session {number} reached the {side} twice"));
        }
    }
}
