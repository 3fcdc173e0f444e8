//! What is known of every session, recorded by both sides.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::conversation::EndpointResult;
use super::plan::Side;

/// Both sides of one session.
#[derive(Clone, Debug, Default)]
pub(crate) struct SessionRecord {
    pub(crate) client: Option<EndpointResult>,
    pub(crate) backend: Option<EndpointResult>,
}

/// All sessions so far.
#[derive(Debug, Default)]
pub(crate) struct SessionLog(Mutex<LogContents>);

/// The contents of the log.
#[derive(Debug, Default)]
pub(crate) struct LogContents {
    pub(crate) sessions: BTreeMap<u64, SessionRecord>,
    /// Connections that reached a backend and ended without a byte.
    pub(crate) without_header: u64,
    /// Errors of connections that reached a backend and match no session, or another one.
    pub(crate) unmatched: Vec<String>,
    /// Conversations that the backend has started and not ended.
    pub(crate) at_backend: u64,
    /// Bytes received, by the backend and by clients.
    pub(crate) arrived: (u64, u64),
}

impl SessionLog {
    pub(crate) fn lock(&self) -> MutexGuard<'_, LogContents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the result of one side.
    pub(crate) fn record(&self, number: u64, side: Side, seen: EndpointResult) {
        let mut log = self.lock();
        let (entry, arrived) = match side {
            Side::Client => (&mut log.sessions.entry(number).or_default().client, (0, seen.received)),
            Side::Backend => (&mut log.sessions.entry(number).or_default().backend, (seen.received, 0)),
        };
        let twice = entry.replace(seen).is_some();
        log.arrived.0 += arrived.0;
        log.arrived.1 += arrived.1;
        if twice {
            log.unmatched.push(format!("session {number} reached the {side} twice"));
        }
    }
}
