//! One backend: its configuration, and the state that outlives a reload.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Instant,
};

use tokio::sync::Notify;

use super::{
    addresses::Addresses,
    balance::Candidate,
    health::{Health, HealthState},
};
use crate::config;

/// One backend. Its state is kept when the configuration is reloaded.
#[derive(Clone, Debug)]
pub struct Backend {
    pub(super) configured: config::Backend,
    /// The configured weight, or the operator's, which lasts until the next reload.
    pub(super) weight: Arc<AtomicU32>,
    /// The hash of its name.
    pub(super) hash: u64,
    pub(super) state: Arc<BackendState>,
}

/// The state of a backend.
#[derive(Debug, Default)]
pub(super) struct BackendState {
    /// The addresses that its name last resolved to.
    pub(super) addresses: Mutex<Addresses>,
    /// Whether its name could not be resolved the last time.
    pub(super) unresolved: AtomicBool,
    pub(super) health: Mutex<Health>,
    pub(super) counters: Counters,
    /// It answered the last header that it answered at all as commands.
    pub(super) misreads: AtomicBool,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) active: AtomicU64,
    pub(super) sessions: AtomicU64,
    pub(super) passed: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) ejections: AtomicU64,
    pub(super) misread: AtomicU64,
}

/// The counters of a backend at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendStats {
    /// Open sessions. Not those of the inline engine, which the kernel forwards.
    pub active: u64,
    /// Sessions so far.
    pub sessions: u64,
    /// Passed health checks.
    pub passed: u64,
    /// Failed health checks.
    pub failed: u64,
    /// Ejections because connections failed.
    pub ejections: u64,
    /// Headers that it answered as commands.
    pub misread: u64,
}

/// Counts as one of the backend's sessions until it is dropped.
#[derive(Debug)]
pub struct SessionGuard {
    state: Arc<BackendState>,
    /// Notified on drop: a client may wait for the place.
    released: Arc<Notify>,
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        self.state.counters.active.fetch_sub(1, Ordering::Relaxed);
        // Clients from before a reload and those from after it wait for the same backend.
        self.released.notify_waiters();
    }
}

impl BackendState {
    pub(super) fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn addresses(&self) -> MutexGuard<'_, Addresses> {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend {
    /// Its configuration.
    #[must_use]
    pub fn configured(&self) -> &config::Backend {
        &self.configured
    }

    /// Its share of new connections now.
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.weight.load(Ordering::Relaxed)
    }

    /// The addresses that its name last resolved to.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.state.addresses().all().collect()
    }

    /// Whether its name has resolved to an address.
    pub(super) fn has_address(&self) -> bool {
        self.state.addresses().all().next().is_some()
    }

    /// As if its name had resolved to these.
    #[cfg(test)]
    pub(crate) fn set_addresses(&self, addresses: &[SocketAddr]) {
        self.state.addresses().replace(addresses.to_vec());
    }

    /// Those of its addresses that failed when they were last tried, by a connection or a check.
    /// They are tried after all others.
    #[must_use]
    pub fn failing_addresses(&self) -> Vec<SocketAddr> {
        self.state.addresses().failing(Instant::now())
    }

    /// Its addresses of one family that do not fail; all of the family if all of them fail.
    #[must_use]
    pub fn usable_addresses(&self, ipv6: bool) -> Vec<SocketAddr> {
        self.state.addresses().usable(ipv6, Instant::now())
    }

    /// Whether it gets connections, and why.
    #[must_use]
    pub fn health_state(&self) -> HealthState {
        self.state.health().health_state(Instant::now())
    }

    /// Whether it answered its last header as commands.
    #[must_use]
    pub fn misreads_header(&self) -> bool {
        self.state.misreads.load(Ordering::Relaxed)
    }

    /// Its counters.
    #[must_use]
    pub fn stats(&self) -> BackendStats {
        let Counters { active, sessions, passed, failed, ejections, misread } = &self.state.counters;
        let [active, sessions, passed, failed, ejections, misread] =
            [active, sessions, passed, failed, ejections, misread].map(|count| count.load(Ordering::Relaxed));
        BackendStats { active, sessions, passed, failed, ejections, misread }
    }

    /// A place for one more session; `None` if the backend has as many as it may.
    pub(super) fn reserve(&self, released: &Arc<Notify>) -> Option<SessionGuard> {
        let limit = self.configured.max_connections.map_or(u64::MAX, |limit| limit as u64);
        let more = |active: u64| (active < limit).then_some(active + 1);
        let active = &self.state.counters.active;
        active.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(SessionGuard { state: Arc::clone(&self.state), released: Arc::clone(released) })
    }

    pub(super) fn candidate(&self) -> Candidate {
        let health_state = self.health_state();
        Candidate {
            weight: self.weight(),
            backup: self.configured.backup,
            up: health_state.is_up(),
            disabled: health_state == HealthState::ForcedDown,
            active: self.state.counters.active.load(Ordering::Relaxed),
            hash: self.hash,
        }
    }
}
