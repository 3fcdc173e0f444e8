//! What a running server holds.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use socket2::Socket;
use tokio::sync::{Notify, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    active_listener::{ActiveListener, RemovedListener, Reopened},
    settings::StartupSettings,
    worker::Worker,
};
use crate::{
    config::Guard,
    engine::{
        registry::EngineProbes,
        served_listener::ServedListener,
        usage::{InlineConnection, InlineUsage},
    },
    kubernetes::Watcher,
    listener::GlobalLimit,
    net::splice_pipe::Pipes,
    session::registry::{SessionRegistry, Snapshot},
    telemetry::{backlog::BacklogTotal, metrics::Metrics},
};

/// The worker threads, the listeners that they serve, and the tokens that stop them.
#[derive(Debug)]
pub struct Server {
    pub(super) settings: StartupSettings,
    /// The operator's limit of connections over all listeners.
    pub(super) max_connections: usize,
    /// Bans, and limits on each source.
    pub(super) guard: Option<Guard>,
    pub(super) stop_deadline: Duration,
    pub(super) probes: EngineProbes,
    pub(super) inherited: Vec<(SocketAddr, Socket)>,
    pub(super) nofile: u64,
    /// How many connections `nofile` allows.
    pub(super) capacity: usize,
    pub(super) shared: Shared,
    /// In the order of the configuration.
    pub(super) listeners: Vec<ActiveListener>,
    /// Addresses whose sockets are being closed, and until when at most.
    pub(super) closing: Vec<(SocketAddr, Instant)>,
    /// No longer configured, with sessions left.
    pub(super) removed: Vec<RemovedListener>,
    /// The names that are draining or were removed, and take no new inline connections.
    pub(super) closed_to_inline: BTreeMap<String, Reopened>,
    pub(super) workers: Vec<Worker>,
    /// Notified when a backend becomes eligible or stops being so.
    pub(super) backends_changed: Arc<Notify>,
    /// Follows Services of Kubernetes.
    pub(super) watcher: Watcher,
    /// The counts of the inline engine, if it runs.
    pub(super) inline_usage: Option<Arc<dyn InlineUsage>>,
    /// The listeners that the inline engine serves.
    pub(super) inline_listeners: watch::Sender<Vec<ServedListener>>,
    /// The addresses of all listeners.
    pub(super) listen_addresses: watch::Sender<Vec<SocketAddr>>,
    /// Ends the task that follows the virtual ones.
    pub(super) stop_following_addresses: CancellationToken,
}

/// What all listeners share.
#[derive(Debug)]
pub(super) struct Shared {
    /// No acceptor accepts any more.
    pub(super) stop_accepting: CancellationToken,
    /// All sessions are aborted.
    pub(super) abort_sessions: CancellationToken,
    /// The worker threads exit.
    pub(super) stop_workers: CancellationToken,
    pub(super) acceptors: TaskTracker,
    pub(super) sessions: TaskTracker,
    pub(super) limits: GlobalLimit,
    pub(super) pipes: Pipes,
    pub(super) backlog_total: BacklogTotal,
    pub(super) metrics: Metrics,
    pub(super) run_id: u64,
}

/// Numbers of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connections {
    /// Sessions of splice and relay.
    pub sessions: usize,
    /// Connections that the inline engine carries.
    pub inline: usize,
    /// The limit of both together.
    pub max: usize,
}

impl Server {
    /// The listeners, in the order of the configuration.
    #[must_use]
    pub fn listeners(&self) -> &[ActiveListener] {
        &self.listeners
    }

    /// The removed listeners that still have connections, with their number.
    pub fn removed_listeners(&mut self) -> Vec<(&RemovedListener, u64)> {
        self.removed.retain(|removed| removed.connections() > 0);
        self.removed.iter().map(|removed| (removed, removed.connections())).collect()
    }

    /// Brings the metrics of inline connections up to date, which are also in `injector status`.
    pub fn refresh_metrics(&self) {
        self.shared.metrics.refresh_connections();
    }

    /// All connections that the inline engine carries.
    #[must_use]
    pub fn inline_connections(&self) -> Vec<InlineConnection> {
        self.inline_usage.as_ref().map(|usage| usage.connections()).unwrap_or_default()
    }

    /// The addresses of all backends, as last resolved.
    #[must_use]
    pub fn backend_addresses(&self) -> BTreeSet<IpAddr> {
        let backends = self.listeners.iter().flat_map(|active| active.backends.all());
        backends.flat_map(|backend| backend.addresses()).map(|address| address.ip().to_canonical()).collect()
    }

    /// What follows Services of Kubernetes.
    #[must_use]
    pub fn watcher(&self) -> &Watcher {
        &self.watcher
    }

    /// All sessions of splice and relay.
    #[must_use]
    pub fn sessions(&self) -> Vec<Snapshot> {
        self.workers.iter().map(Worker::sessions).flat_map(SessionRegistry::snapshot).collect()
    }

    /// Ends sessions, by number, client and listener, and inline connections. Returns their number.
    pub fn end_sessions(
        &self,
        session: impl Fn(u64, SocketAddr, &str) -> bool,
        inline: impl Fn(&InlineConnection) -> bool,
    ) -> usize {
        let sessions: usize = self.workers.iter().map(|worker| worker.sessions().end(&session)).sum();
        let connections = self.inline_connections().into_iter().filter(|connection| inline(connection));
        let ids: Vec<_> = connections.map(|connection| connection.id).collect();
        let inline = ids.len();
        if let (Some(usage), 1..) = (&self.inline_usage, inline) {
            usage.end(ids);
        }
        sessions + inline
    }

    /// How long sessions may continue after a shutdown began.
    #[must_use]
    pub fn stop_deadline(&self) -> Duration {
        self.stop_deadline
    }

    /// The results of the engines' self-tests.
    #[must_use]
    pub fn probes(&self) -> &EngineProbes {
        &self.probes
    }

    /// The numbers of connections.
    #[must_use]
    pub fn connections(&self) -> Connections {
        Connections {
            sessions: self.shared.limits.sessions(),
            inline: self.shared.limits.inline_connections(),
            // Inline connections need no file descriptors.
            max: match &self.inline_usage {
                Some(_) => self.max_connections,
                None => self.max_connections.min(self.capacity),
            },
        }
    }

    /// Bytes that the kernel holds for receivers that do not keep up.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.shared.backlog_total.bytes()
    }

    /// Whether every listener is drained.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.listeners.iter().all(|active| active.drain.is_some())
    }

    /// Resolves to `true` when every worker thread has responded, to `false` if one has exited.
    pub fn check_liveness(&self) -> impl Future<Output = bool> + use<> {
        let replies: Vec<_> = self.workers.iter().map(Worker::check_liveness).collect();
        async move {
            for reply in replies {
                if reply.await.is_err() {
                    return false;
                }
            }
            true
        }
    }

    /// Exports the limit of connections as a metric.
    pub(super) fn publish_limits(&self) {
        self.shared.metrics.set_max_connections(self.connections().max);
    }
}
