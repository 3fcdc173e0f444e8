//! Starts the worker threads and the configured listeners.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, RandomState},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use socket2::Socket;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    active_listener::ListenerSetup,
    settings::StartupSettings,
    state::{Server, Shared},
    worker::Worker,
};
use crate::{
    config::Guard,
    engine::{registry::EngineProbes, usage::InlineUsage},
    guard,
    kubernetes::Watcher,
    listener::{GlobalLimit, SourceRules},
    net::splice_pipe::{MAX_PIPES, Pipes},
    telemetry::{backlog::BacklogTotal, metrics::Metrics},
};

/// What the server starts with.
#[derive(Debug)]
pub struct StartupState {
    /// What only a restart changes.
    pub settings: StartupSettings,
    /// The operator's limit of connections over all listeners.
    pub max_connections: usize,
    /// Bans, and limits on each source.
    pub guard: Option<Guard>,
    /// The table of bans, if there is a guard.
    pub bans: Option<guard::Guard>,
    /// Follows Services of Kubernetes.
    pub watcher: Watcher,
    /// How long sessions may continue after a shutdown began.
    pub stop_deadline: Duration,
    /// In the order of the configuration.
    pub listeners: Vec<ListenerSetup>,
    /// Listening sockets that systemd passed. They stay open until the daemon exits.
    pub inherited: Vec<(SocketAddr, Socket)>,
    /// The results of the engines' self-tests.
    pub probes: EngineProbes,
    /// The counts of the inline engine, if it runs.
    pub inline_usage: Option<Arc<dyn InlineUsage>>,
    /// The limit of open files.
    pub nofile: u64,
    /// How many connections that limit allows.
    pub capacity: usize,
}

impl Server {
    /// Starts the workers and all listeners.
    ///
    /// # Errors
    /// When the system has no thread or epoll instance left.
    pub fn start(
        startup: StartupState,
        metrics: &Metrics,
        backlog_total: &BacklogTotal,
    ) -> anyhow::Result<Self> {
        let StartupState {
            settings,
            max_connections,
            guard,
            bans,
            watcher,
            stop_deadline,
            listeners,
            inherited,
            probes,
            inline_usage,
            nofile,
            capacity,
        } = startup;
        let (acceptors, stop_workers) = (TaskTracker::new(), CancellationToken::new());
        let worker = |number| Worker::start(number, &acceptors, stop_workers.clone());
        let workers: Result<Vec<_>, _> = (0..settings.workers).map(worker).collect();
        let workers = workers.context("starting a worker thread")?;
        let shared = Shared {
            stop_accepting: CancellationToken::new(),
            abort_sessions: CancellationToken::new(),
            stop_workers,
            acceptors,
            sessions: TaskTracker::new(),
            limits: GlobalLimit::new(
                max_connections,
                capacity,
                (bans, overall(guard.as_ref(), max_connections.min(capacity))),
                inline_usage.as_ref().map(|usage| usage.all()),
                workers.iter().map(|worker| worker.sessions().clone()).collect(),
            ),
            pipes: Pipes::new(MAX_PIPES),
            backlog_total: backlog_total.clone(),
            metrics: metrics.clone(),
            run_id: RandomState::new().hash_one(std::process::id()),
        };
        let mut server = Self {
            settings,
            max_connections,
            guard,
            stop_deadline,
            probes,
            inherited,
            nofile,
            capacity,
            shared,
            listeners: Vec::new(),
            closing: Vec::new(),
            removed: Vec::new(),
            closed_to_inline: BTreeMap::new(),
            workers,
            backends_changed: Arc::default(),
            watcher,
            inline_usage,
            inline_listeners: watch::Sender::default(),
            listen_addresses: watch::Sender::default(),
            stop_following_addresses: CancellationToken::new(),
        };
        server.listeners = listeners.into_iter().map(|setup| server.start_listener(setup)).collect();
        server.publish_limits();
        server.publish_to_inline();
        server.publish_addresses();
        Ok(server)
    }
}

/// The limits on each source over all listeners, which have so many places.
pub(super) fn overall(guard: Option<&Guard>, places: usize) -> SourceRules {
    let limits = guard.map(|guard| guard.per_source).unwrap_or_default();
    SourceRules::new(guard, limits.or_half_of(places))
}
