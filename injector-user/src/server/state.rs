//! What a running server holds.

use std::{net::SocketAddr, sync::Arc};

use socket2::Socket;
use tokio::sync::{Notify, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    active_listener::{ActiveListener, RemovedListener},
    listen_sockets::connection_capacity,
    worker::Worker,
};
use crate::{
    config::Config,
    engine::{registry::EngineProbes, served_listener::ServedListener},
    listener::GlobalLimit,
    net::splice_pipe::Pipes,
    session::registry::{SessionRegistry, Snapshot},
    telemetry::{backlog::BacklogTotal, metrics::Metrics},
};

/// The threads that serve connections, what they serve, and how they are told to stop.
#[derive(Debug)]
pub struct Server {
    pub(super) config: Config,
    pub(super) probes: EngineProbes,
    pub(super) inherited: Vec<(SocketAddr, Socket)>,
    pub(super) nofile: u64,
    pub(super) shared: Shared,
    /// In the order of the configuration.
    pub(super) listeners: Vec<ActiveListener>,
    /// No longer configured, and not yet without sessions.
    pub(super) removed: Vec<RemovedListener>,
    pub(super) workers: Vec<Worker>,
    /// Rings when the backends whose turn it is have changed.
    pub(super) backends_changed: Arc<Notify>,
    /// What engine inline is to serve.
    pub(super) inline_listeners: watch::Sender<Vec<ServedListener>>,
}

/// What all listeners share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Nobody more is let in.
    pub(super) stop_accepting: CancellationToken,
    /// Who is still there is cut.
    pub(super) abort_sessions: CancellationToken,
    /// The threads end.
    pub(super) stop_workers: CancellationToken,
    pub(super) acceptors: TaskTracker,
    pub(super) sessions: TaskTracker,
    pub(super) limits: GlobalLimit,
    pub(super) pipes: Pipes,
    pub(super) backlog_total: BacklogTotal,
    pub(super) metrics: Metrics,
    pub(super) run_id: u64,
}

impl Server {
    /// The listeners, in the order of the configuration.
    #[must_use]
    pub fn listeners(&self) -> &[ActiveListener] {
        &self.listeners
    }

    /// Those that are no longer configured and still have sessions, with how many.
    pub fn removed_listeners(&mut self) -> Vec<(&RemovedListener, u64)> {
        self.removed.retain(|removed| removed.metrics.snapshot().active > 0);
        self.removed.iter().map(|removed| (removed, removed.metrics.snapshot().active)).collect()
    }

    /// All sessions of the engines that end TCP.
    #[must_use]
    pub fn sessions(&self) -> Vec<Snapshot> {
        self.workers.iter().map(Worker::sessions).flat_map(SessionRegistry::snapshot).collect()
    }

    /// As it runs.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What was found out about the engines.
    #[must_use]
    pub fn probes(&self) -> &EngineProbes {
        &self.probes
    }

    /// Sessions, and how many there may be.
    #[must_use]
    pub fn connections(&self) -> (usize, usize) {
        let max = self.config.limits.max_connections.min(connection_capacity(&self.config, self.nofile));
        (self.shared.limits.in_use(), max)
    }

    /// Bytes that wait in the kernel.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.shared.backlog_total.bytes()
    }

    /// Whether every listener is drained.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.listeners.iter().all(|active| active.drain.is_some())
    }

    /// Whether every thread that serves connections does its work.
    pub fn check_liveness(&self) -> impl Future<Output = bool> + use<> {
        let beats: Vec<_> = self.workers.iter().map(Worker::check_liveness).collect();
        async move {
            for beat in beats {
                if beat.await.is_err() {
                    return false;
                }
            }
            true
        }
    }

    pub(super) fn publish_limits(&self) {
        self.shared.metrics.set_max_connections(self.connections().1);
    }
}
