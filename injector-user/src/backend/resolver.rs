//! Resolves the names of backends periodically.

use std::{io, net::SocketAddr, sync::atomic::Ordering};

use futures_util::future::join_all;
use tokio::time::timeout;

use super::{addresses::Resolved, lookup::lookup, pool::Backends, state::Backend};
use crate::{config::Destination, telemetry::log::target};

impl Backends {
    /// Resolves all names at each interval, and when [`Self::resolve_now`] asks for it. One lookup of
    /// a name runs at a time: it occupies a thread until the C library gives up.
    pub(super) async fn run_resolver(&self) {
        let named = |backend: &Backend| matches!(backend.configured.destination, Destination::Name { .. });
        if !self.all.iter().any(named) {
            return;
        }
        loop {
            join_all(self.all.iter().map(|backend| self.resolve(backend))).await;
            self.resolved.notify_waiters();
            let _ = timeout(self.resolve_interval, self.resolve_now.notified()).await;
        }
    }

    /// Waits until the resolver has tried all names again, or for the first time.
    pub(super) async fn resolve_now(&self) {
        let resolved = self.resolved.notified();
        self.resolve_now.notify_one();
        resolved.await;
    }

    async fn resolve(&self, backend: &Backend) {
        let Destination::Name { name, port } = &backend.configured.destination else { return };
        match lookup(name, *port).await {
            Ok(addresses) => self.note_resolved(backend, addresses),
            Err(error) => self.note_unresolved(backend, &error),
        }
    }

    fn note_resolved(&self, backend: &Backend, addresses: Vec<SocketAddr>) {
        let (listener, name) = (&self.listener, backend.configured.destination.host());
        let again = backend.state.unresolved.swap(false, Ordering::Relaxed);
        let resolved = backend.state.addresses().replace(addresses.clone());
        match resolved {
            Resolved::Changed => {
                tracing::info!(target: target::RESOLVER, listener, backend = %name, ?addresses, "backend name resolved");
                self.changed.notify_one();
            }
            Resolved::Same | Resolved::Reordered if again => {
                tracing::info!(target: target::RESOLVER, listener, backend = %name, ?addresses, "backend name resolved again");
            }
            Resolved::Reordered => {
                tracing::debug!(target: target::RESOLVER, listener, backend = %name, ?addresses, "backend name resolved to the same addresses in another order");
            }
            Resolved::Same => {}
        }
    }

    /// Warns once, until the name resolves again.
    fn note_unresolved(&self, backend: &Backend, error: &io::Error) {
        let (listener, name) = (&self.listener, backend.configured.destination.host());
        if backend.state.unresolved.swap(true, Ordering::Relaxed) {
            tracing::debug!(target: target::RESOLVER, listener, backend = %name, %error, "resolving the backend's name still fails");
            return;
        }
        if backend.addresses().is_empty() {
            tracing::warn!(target: target::RESOLVER, listener, backend = %name, %error, "resolving the backend's name failed; the backend has no address and gets no connections");
        } else {
            tracing::warn!(target: target::RESOLVER, listener, backend = %name, %error, "resolving the backend's name failed; the last known addresses stay in use");
        }
    }
}
