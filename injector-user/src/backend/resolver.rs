//! Resolves the names of backends periodically.

use std::{io, net::SocketAddr, sync::atomic::Ordering};

use super::{addresses::Resolved, lookup::lookup, pool::Backends, state::Backend};
use crate::{
    config::{self, Host},
    telemetry::log::target,
};

impl Backends {
    pub(super) async fn run_resolver(&self) {
        if self.all.iter().all(|backend| matches!(backend.configured.host, Host::Ip(_))) {
            return;
        }
        loop {
            self.resolve().await;
            tokio::time::sleep(self.resolve_interval).await;
        }
    }

    pub(super) async fn resolve(&self) {
        for backend in &self.all {
            let config::Backend { host: Host::Name(name), port, .. } = &backend.configured else { continue };
            match lookup(name, *port).await {
                Ok(addresses) => self.note_resolved(backend, addresses),
                Err(error) => self.note_unresolved(backend, &error),
            }
        }
    }

    fn note_resolved(&self, backend: &Backend, addresses: Vec<SocketAddr>) {
        let (listener, name) = (&self.listener, &backend.configured.host);
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
        let (listener, name) = (&self.listener, &backend.configured.host);
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
