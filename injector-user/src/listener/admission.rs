//! Which connections are admitted: limits decide before a backend is touched.

use std::sync::{
    Arc, PoisonError, RwLock,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::Semaphore;

use super::{
    connection_limit::{ConnectionLimit, ConnectionPermit},
    reserve_fd::FdExhaustionWarning,
};
use crate::{session::Context, telemetry::metrics::RejectReason};

/// How many clients are turned away politely at one time; the others are reset.
const MAX_PROTOCOL_REJECTIONS: usize = 256;

/// The limits on connections over all listeners.
#[derive(Clone, Debug)]
pub struct GlobalLimit(pub(super) Arc<Shared>);

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) connections: Arc<ConnectionLimit>,
    /// Whether descriptors run out before the operator's limit is reached.
    fds_are_tighter: AtomicBool,
    pub(super) rejections: Arc<Semaphore>,
    pub(super) exhaustion_warning: FdExhaustionWarning,
}

impl GlobalLimit {
    /// At most `connections`, fewer if the descriptors do not carry them.
    #[must_use]
    pub fn new(connections: usize, capacity: usize) -> Self {
        let limits = Self(Arc::new(Shared {
            connections: ConnectionLimit::new(None),
            fds_are_tighter: AtomicBool::new(false),
            rejections: Arc::new(Semaphore::new(MAX_PROTOCOL_REJECTIONS)),
            exhaustion_warning: FdExhaustionWarning::default(),
        }));
        limits.resize(connections, capacity);
        limits
    }

    /// The same for other numbers. Who is there stays.
    pub fn resize(&self, connections: usize, capacity: usize) {
        self.0.connections.resize(Some(connections.min(capacity)));
        self.0.fds_are_tighter.store(capacity < connections, Ordering::Relaxed);
    }

    /// How many there are.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.0.connections.in_use()
    }

    /// What the limit stands for: the operator's will, or the descriptors.
    pub(super) fn reason(&self) -> RejectReason {
        if self.0.fds_are_tighter.load(Ordering::Relaxed) {
            RejectReason::NoDescriptors
        } else {
            RejectReason::TooManyConnections
        }
    }
}

/// What decides over the connections of one listener on one worker. It can be changed while its doors are open.
#[derive(Debug)]
pub struct AdmissionPolicy {
    /// What those share that are let in from now on.
    context: RwLock<Arc<Context>>,
    /// The listener's own limit.
    pub(super) own: Arc<ConnectionLimit>,
    /// Nobody is let in.
    pub(super) draining: AtomicBool,
}

impl AdmissionPolicy {
    /// Lets everybody in.
    #[must_use]
    pub fn new(context: Arc<Context>, own: Arc<ConnectionLimit>) -> Self {
        Self { context: RwLock::new(context), own, draining: AtomicBool::new(false) }
    }

    /// For those that are let in from now on.
    pub fn replace_context(&self, context: Arc<Context>) {
        *self.context.write().unwrap_or_else(PoisonError::into_inner) = context;
    }

    /// Turns everybody away, or lets them in again.
    pub fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::Relaxed);
    }

    pub(super) fn context(&self) -> Arc<Context> {
        Arc::clone(&self.context.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Whose a listening socket is. It can be handed to another listener: closing it and opening another would reset clients that
/// the kernel has let in and nobody has accepted yet.
#[derive(Debug)]
pub struct SocketOwner(RwLock<Arc<AdmissionPolicy>>);

impl SocketOwner {
    /// The listener with this policy.
    #[must_use]
    pub fn new(policy: Arc<AdmissionPolicy>) -> Self {
        Self(RwLock::new(policy))
    }

    /// Another one, for the clients that are accepted from now on.
    pub fn replace_policy(&self, policy: Arc<AdmissionPolicy>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    pub(super) fn policy(&self) -> Arc<AdmissionPolicy> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What an admitted connection holds until its end.
#[derive(Debug)]
pub(super) struct ConnectionPermits {
    pub(super) _total: ConnectionPermit,
    pub(super) _own: ConnectionPermit,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_the_limit_is_the_tighter_bound() {
        assert_eq!(GlobalLimit::new(10, 400).reason(), RejectReason::TooManyConnections);
        assert_eq!(GlobalLimit::new(10_000, 400).reason(), RejectReason::NoDescriptors);
    }
}
