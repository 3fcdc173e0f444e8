//! A listener: before it starts, while it serves, and after it was removed.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Instant};

use socket2::Socket;
use tokio_util::sync::CancellationToken;

use crate::{
    backend::Backends,
    config::{EngineChoice, Listener},
    engine::Engine,
    listener::{AdmissionPolicy, ConnectionLimit, SocketOwner},
    telemetry::metrics::ListenerMetrics,
};

/// Bound sockets by their configured address: one socket for each worker.
pub type BoundSockets = Vec<(SocketAddr, Vec<Socket>)>;

/// A listener that is ready to start: nothing can fail any more.
#[derive(Debug)]
pub struct ListenerSetup {
    /// The settings in effect: [`Listener::engine`] is the engine that `auto` selected.
    pub settings: Listener,
    /// The engine that the configuration asks for.
    pub requested: EngineChoice,
    /// `None` for the inline engine, which needs no sockets.
    pub engine: Option<Arc<dyn Engine>>,
    /// Sockets of the addresses that the server does not listen on yet.
    pub sockets: BoundSockets,
}

/// A listener that is served.
#[derive(Debug)]
pub struct ActiveListener {
    /// The settings in effect: [`Listener::engine`] is the engine that `auto` selected.
    pub settings: Listener,
    /// The engine that the configuration asks for.
    pub requested: EngineChoice,
    /// `None` for the inline engine.
    pub engine: Option<Arc<dyn Engine>>,
    /// Its backends with their health.
    pub backends: Arc<Backends>,
    /// Its counters.
    pub metrics: ListenerMetrics,
    /// `Some` while it is draining.
    pub drain: Option<DrainState>,
    /// Stops health checks and name resolution.
    pub(super) stop_health_tasks: CancellationToken,
    /// One for each worker.
    pub(super) policies: Vec<Arc<AdmissionPolicy>>,
    pub(super) connection_limit: Arc<ConnectionLimit>,
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
    /// When the remaining sessions are aborted; `None`: never.
    pub deadline: Option<Instant>,
}

/// A listener that is no longer configured and may still have sessions.
#[derive(Debug)]
pub struct RemovedListener {
    /// Its name.
    pub name: String,
    /// When the remaining sessions are aborted.
    pub deadline: Instant,
    pub(super) metrics: ListenerMetrics,
}
