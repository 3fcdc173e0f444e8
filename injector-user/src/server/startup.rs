//! Starts the worker threads and the configured listeners.

use std::{
    hash::{BuildHasher as _, RandomState},
    net::SocketAddr,
    sync::Arc,
};

use anyhow::Context as _;
use socket2::Socket;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    listen_sockets::{BoundSockets, connection_capacity},
    state::{Server, Shared},
    worker::Worker,
};
use crate::{
    config::Config,
    engine::{Engine, registry::EngineProbes, select::EngineSelection},
    listener::GlobalLimit,
    net::splice_pipe::{MAX_PIPES, Pipes},
    telemetry::{backlog::BacklogTotal, metrics::Metrics},
};

/// What the daemon was started with, and keeps.
#[derive(Debug)]
pub struct StartupState {
    /// As it runs: what `auto` came to is in [`Listener::engine`].
    pub config: Config,
    /// For each listener.
    pub selections: Vec<EngineSelection>,
    /// For each listener; none for those whose packets never reach a socket.
    pub sockets: Vec<BoundSockets>,
    /// Listening sockets of systemd's, which stay open as long as the daemon runs.
    pub inherited: Vec<(SocketAddr, Socket)>,
    /// For each listener; `None`: inline.
    pub engines: Vec<Option<Arc<dyn Engine>>>,
    /// What was found out about the engines.
    pub probes: EngineProbes,
    /// The limit of open files.
    pub nofile: u64,
}

impl Server {
    /// Opens the doors of all listeners that have an engine.
    ///
    /// # Errors
    /// When there can be no further thread or epoll instance.
    pub fn start(
        startup: StartupState,
        metrics: &Metrics,
        backlog_total: &BacklogTotal,
    ) -> anyhow::Result<Self> {
        let StartupState { config, selections, sockets, inherited, engines, probes, nofile } = startup;
        let (acceptors, stop_workers) = (TaskTracker::new(), CancellationToken::new());
        let worker = |number| Worker::start(number, &acceptors, stop_workers.clone());
        let workers: Result<Vec<_>, _> = (0..config.limits.workers).map(worker).collect();
        let workers = workers.context("starting a worker thread")?;
        let shared = Shared {
            stop_accepting: CancellationToken::new(),
            abort_sessions: CancellationToken::new(),
            stop_workers,
            acceptors,
            sessions: TaskTracker::new(),
            limits: GlobalLimit::new(config.limits.max_connections, connection_capacity(&config, nofile)),
            pipes: Pipes::new(MAX_PIPES),
            backlog_total: backlog_total.clone(),
            metrics: metrics.clone(),
            run_id: RandomState::new().hash_one(std::process::id()),
        };
        let mut server = Self {
            config: config.clone(),
            probes,
            inherited,
            nofile,
            shared,
            listeners: Vec::new(),
            removed: Vec::new(),
            workers,
            backends_changed: Arc::default(),
            inline_listeners: watch::Sender::default(),
        };
        for (((listener, choice), sockets), engine) in
            config.listeners.into_iter().zip(selections).zip(sockets).zip(engines)
        {
            let active = server.start_listener(listener, choice.requested, engine, sockets);
            server.listeners.push(active);
        }
        server.publish_limits();
        server.publish_to_inline();
        Ok(server)
    }
}
