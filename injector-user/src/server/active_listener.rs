//! A listener that is served, drained or removed.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Instant};

use tokio_util::sync::CancellationToken;

use crate::{
    backend::Backends,
    config::{EngineChoice, Listener},
    engine::Engine,
    listener::{AdmissionPolicy, ConnectionLimit, SocketOwner},
    telemetry::metrics::ListenerMetrics,
};

/// A listener that is served.
#[derive(Debug)]
pub struct ActiveListener {
    /// As it runs.
    pub config: Listener,
    /// What the file asks for.
    pub requested: EngineChoice,
    /// `None`: inline.
    pub engine: Option<Arc<dyn Engine>>,
    /// Where its connections go.
    pub backends: Arc<Backends>,
    /// Its counters.
    pub metrics: ListenerMetrics,
    /// Since when it is drained, and until when sessions may go on.
    pub drain: Option<DrainState>,
    /// Ends checks and resolving.
    pub(super) stop_health_tasks: CancellationToken,
    /// One for each worker.
    pub(super) policies: Vec<Arc<AdmissionPolicy>>,
    pub(super) connection_limit: Arc<ConnectionLimit>,
    /// What cuts all of its sessions.
    pub(super) abort: CancellationToken,
    /// What cuts those that come from now on.
    pub(super) abort_new: CancellationToken,
    /// What cuts those that came before a drain.
    pub(super) abort_drained: Vec<CancellationToken>,
    /// By the addresses of the configuration.
    pub(super) sockets: BTreeMap<SocketAddr, ListenSockets>,
}

/// The doors of one address.
#[derive(Debug)]
pub(super) struct ListenSockets {
    /// Closes them.
    pub(super) stop_accepting: CancellationToken,
    /// One for each worker.
    pub(super) owners: Vec<Arc<SocketOwner>>,
}

/// A drain under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainState {
    /// When sessions are cut; `None`: never.
    pub deadline: Option<Instant>,
}

/// A listener that is no longer configured.
#[derive(Debug)]
pub struct RemovedListener {
    /// Its name.
    pub name: String,
    /// When its sessions are cut.
    pub deadline: Instant,
    pub(super) metrics: ListenerMetrics,
}
