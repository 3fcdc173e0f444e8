//! Decides which connections are admitted, before a backend is involved.

use std::sync::{
    Arc, PoisonError, RwLock,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::Semaphore;

use super::{
    connection_limit::{ConnectionLimit, ConnectionPermit},
    rejections::RejectionLog,
    reserve_fd::FdExhaustionWarning,
    source_limit::{SourceLimit, SourcePermit, SourceRules},
};
use crate::{
    engine::usage::UsageCounts,
    guard::Guard,
    session::{Context, registry::SessionRegistry},
    telemetry::metrics::RejectReason,
};

/// How many clients are rejected in their protocol at the same time; more are reset.
const MAX_PROTOCOL_REJECTIONS: usize = 256;

/// The same of clients whose source is at its limit: one source must not take the places of others.
const MAX_SOURCE_REJECTIONS: usize = 64;

/// The limit on connections over all listeners.
#[derive(Clone, Debug)]
pub struct GlobalLimit(pub(super) Arc<Shared>);

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) connections: Arc<ConnectionLimit>,
    /// Whether file descriptors run out before the operator's limit is reached.
    fds_are_tighter: AtomicBool,
    /// Whose connections are reset.
    pub(super) bans: Option<Guard>,
    /// The limits on each source over all listeners.
    pub(super) sources: Arc<SourceLimit>,
    pub(super) rejections: Arc<Semaphore>,
    pub(super) source_rejections: Arc<Semaphore>,
    pub(super) exhaustion_warning: FdExhaustionWarning,
    pub(super) rejection_log: RejectionLog,
}

impl GlobalLimit {
    /// At most `connections`, and at most `capacity` sessions, for which there are file descriptors.
    /// `bans` and `sources` are the bans and the limits on each source. `inline` has the connections of
    /// the inline engine, which needs no descriptors. `registries` are those of the workers.
    #[must_use]
    pub fn new(
        connections: usize,
        capacity: usize,
        (bans, sources): (Option<Guard>, SourceRules),
        inline: Option<Arc<dyn UsageCounts>>,
        registries: Vec<SessionRegistry>,
    ) -> Self {
        let limit = Self(Arc::new(Shared {
            connections: ConnectionLimit::new(Some(connections), inline.clone()),
            bans,
            sources: SourceLimit::new(sources, inline),
            fds_are_tighter: AtomicBool::new(false),
            rejections: Arc::new(Semaphore::new(MAX_PROTOCOL_REJECTIONS)),
            source_rejections: Arc::new(Semaphore::new(MAX_SOURCE_REJECTIONS)),
            exhaustion_warning: FdExhaustionWarning::default(),
            rejection_log: RejectionLog::new(registries),
        }));
        limit.resize(connections, capacity);
        limit
    }

    /// Changes the limits. Existing connections stay.
    pub fn resize(&self, connections: usize, capacity: usize) {
        self.0.connections.resize(Some(connections));
        self.0.connections.resize_sessions(capacity);
        self.0.fds_are_tighter.store(capacity < connections, Ordering::Relaxed);
    }

    /// Changes the limits on each source.
    pub fn set_source_rules(&self, rules: SourceRules) {
        self.0.sources.set_rules(rules);
    }

    /// The number of sessions.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.0.connections.sessions()
    }

    /// The number of connections that the inline engine carries.
    #[must_use]
    pub fn inline_connections(&self) -> usize {
        self.0.connections.inline_connections()
    }

    /// Which of the two is the limit: the operator's or the file descriptors.
    pub(super) fn reason(&self) -> RejectReason {
        if self.0.fds_are_tighter.load(Ordering::Relaxed) && !self.0.connections.is_reached() {
            RejectReason::NoDescriptors
        } else {
            RejectReason::TooManyConnections
        }
    }
}

/// Decides over the connections of one listener on one worker. It can be changed while the
/// listener's sockets accept.
#[derive(Debug)]
pub struct AdmissionPolicy {
    /// For the connections that are admitted from now on.
    context: RwLock<Arc<Context>>,
    /// The listener's own limit.
    pub(super) listener_limit: Arc<ConnectionLimit>,
    /// The listener's own limits on each source.
    pub(super) source_limit: Arc<SourceLimit>,
    /// Every connection is rejected.
    pub(super) draining: AtomicBool,
}

impl AdmissionPolicy {
    /// Admits connections up to `listener_limit` and, of each source, up to `source_limit`.
    #[must_use]
    pub fn new(
        context: Arc<Context>,
        listener_limit: Arc<ConnectionLimit>,
        source_limit: Arc<SourceLimit>,
    ) -> Self {
        let draining = AtomicBool::new(false);
        Self { context: RwLock::new(context), listener_limit, source_limit, draining }
    }

    /// Sets the context of the connections that are admitted from now on.
    pub fn replace_context(&self, context: Arc<Context>) {
        *self.context.write().unwrap_or_else(PoisonError::into_inner) = context;
    }

    /// Rejects every connection, or admits connections again.
    pub fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::Relaxed);
    }

    pub(super) fn context(&self) -> Arc<Context> {
        Arc::clone(&self.context.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The listener that owns a listening socket. A reload can hand the socket to another listener: to
/// close it and open a new one would reset the clients in its accept queue.
#[derive(Debug)]
pub struct SocketOwner(RwLock<Arc<AdmissionPolicy>>);

impl SocketOwner {
    /// Owned by the listener with this policy.
    #[must_use]
    pub fn new(policy: Arc<AdmissionPolicy>) -> Self {
        Self(RwLock::new(policy))
    }

    /// Hands the socket to the listener with `policy`, for the clients that are accepted from now
    /// on.
    pub fn replace_policy(&self, policy: Arc<AdmissionPolicy>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    pub(super) fn policy(&self) -> Arc<AdmissionPolicy> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Held by an admitted connection until its end.
#[derive(Debug)]
pub(super) struct ConnectionPermits {
    pub(super) _total: ConnectionPermit,
    pub(super) _own: ConnectionPermit,
    pub(super) _source: SourcePermits,
}

/// Those of the listener and of the daemon.
pub(super) type SourcePermits = [SourcePermit; 2];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PerSource;

    #[test]
    fn the_reject_reason_is_the_tighter_limit() {
        let of = |max| {
            let sources = SourceRules::new(None, PerSource::default());
            GlobalLimit::new(max, 400, (None, sources), None, Vec::new()).reason()
        };
        assert_eq!(of(10), RejectReason::TooManyConnections);
        assert_eq!(of(10_000), RejectReason::NoDescriptors);
    }
}
