//! A listener: before it starts, while it serves, and after it was removed.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, OnceLock},
    time::Instant,
};

use socket2::Socket;
use tokio_util::sync::CancellationToken;

use crate::{
    backend::Backends,
    config::Listener,
    engine::{select::EngineSelection, usage::UsageCounts},
    kubernetes::Followed,
    listener::{AdmissionPolicy, ConnectionLimit, SocketOwner, SourceLimit},
    telemetry::metrics::{ListenerMetrics, ListenerSnapshot},
};

/// Bound sockets by their configured address: one socket for each worker.
pub type BoundSockets = Vec<(SocketAddr, Vec<Socket>)>;

/// A listener that is ready to start: nothing can fail any more.
#[derive(Debug)]
pub struct ListenerSetup {
    /// The settings in effect.
    pub settings: Listener,
    /// Its engines.
    pub selection: EngineSelection,
    /// Sockets of the addresses that the server does not listen on yet.
    pub sockets: BoundSockets,
}

/// A listener that is served.
#[derive(Debug)]
pub struct ActiveListener {
    /// The settings in effect.
    pub settings: Listener,
    /// Its virtual addresses.
    pub virtual_addresses: Followed<IpAddr>,
    /// Its engines.
    pub selection: EngineSelection,
    /// Its backends with their health.
    pub backends: Arc<Backends>,
    /// Its counters, for the engine of its sockets.
    pub metrics: ListenerMetrics,
    /// `Some` while it is draining.
    pub drain: Option<DrainState>,
    /// Stops health checks and name resolution.
    pub(super) stop_health_tasks: CancellationToken,
    /// One for each worker.
    pub(super) policies: Vec<Arc<AdmissionPolicy>>,
    pub(super) connection_limit: Arc<ConnectionLimit>,
    pub(super) source_limit: Arc<SourceLimit>,
    /// The counts of its inline connections, if the inline engine runs.
    pub(super) inline_counts: Option<Arc<dyn UsageCounts>>,
    /// Its counters for inline, if it has used it.
    pub(super) inline_metrics: Option<ListenerMetrics>,
    /// Aborts all sessions.
    pub(super) abort: CancellationToken,
    /// Aborts the sessions that start from now on.
    pub(super) abort_new: CancellationToken,
    /// Abort the sessions from before each drain.
    pub(super) abort_drained: Vec<CancellationToken>,
    /// By their configured address.
    pub(super) sockets: BTreeMap<SocketAddr, ListenSockets>,
}

/// The listening sockets of one address.
#[derive(Debug)]
pub(super) struct ListenSockets {
    /// Closes them.
    pub(super) stop_accepting: CancellationToken,
    /// One for each worker.
    pub(super) owners: Vec<Arc<SocketOwner>>,
}

/// A drain in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainState {
    /// When the remaining sessions are aborted.
    pub deadline: Instant,
}

/// When a name takes inline connections again, after a drain or the listener's removal.
#[derive(Clone, Debug, Default)]
pub(super) struct Reopened(Arc<OnceLock<Instant>>);

impl Reopened {
    /// It does from now on. The first time counts.
    pub(super) fn set(&self) {
        let _ = self.0.set(Instant::now());
    }

    /// Connections that were opened before this time are from before the drain or the removal:
    /// until it is open again, all are. The engine follows a drain a moment later, and takes
    /// connections until then.
    pub(super) fn opened_before(&self) -> Instant {
        self.0.get().copied().unwrap_or_else(Instant::now)
    }
}

/// A listener that is no longer configured and may still have sessions.
#[derive(Debug)]
pub struct RemovedListener {
    /// Its name.
    pub name: String,
    /// When the remaining sessions are aborted.
    pub deadline: Instant,
    pub(super) metrics: ListenerMetrics,
    pub(super) inline_counts: Option<Arc<dyn UsageCounts>>,
}

impl ActiveListener {
    /// The connections that the inline engine carries, also after the listener was changed to
    /// another engine.
    #[must_use]
    pub fn inline_connections(&self) -> u64 {
        established(self.inline_counts.as_ref())
    }

    /// Its counters, over all engines.
    #[must_use]
    pub fn counters(&self) -> ListenerSnapshot {
        let mut counters = self.metrics.snapshot();
        counters.active += self.inline_connections();
        if let Some(inline) = &self.inline_metrics {
            counters.headers_sent += inline.snapshot().headers_sent;
        }
        counters
    }
}

impl RemovedListener {
    /// The sessions and inline connections that are left.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.metrics.snapshot().active + established(self.inline_counts.as_ref())
    }
}

fn established(counts: Option<&Arc<dyn UsageCounts>>) -> u64 {
    counts.map_or(0, |counts| counts.established().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_connections_are_older_until_the_listener_is_open_again() {
        let (reopened, start) = (Reopened::default(), Instant::now());
        let task = reopened.clone();
        let first = task.opened_before();
        assert!(first >= start && task.opened_before() >= first);
        reopened.set();
        let at = task.opened_before();
        std::thread::sleep(std::time::Duration::from_millis(2));
        reopened.set();
        assert_eq!(task.opened_before(), at);
    }
}
