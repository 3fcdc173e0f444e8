//! Resolves the names of backends periodically.

use std::sync::PoisonError;

use super::pool::Backends;
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
            let addresses: Vec<_> = match tokio::net::lookup_host((name.as_str(), *port)).await {
                Ok(addresses) => addresses.collect(),
                Err(error) => {
                    tracing::warn!(target: target::RESOLVER, listener = self.listener, backend = name, %error, "resolving the backend's name failed; the last known addresses stay in use");
                    continue;
                }
            };
            let mut known = backend.state.addresses.write().unwrap_or_else(PoisonError::into_inner);
            if *known != addresses {
                tracing::info!(target: target::RESOLVER, listener = self.listener, backend = name, ?addresses, "backend name resolved");
                *known = addresses;
            }
        }
    }
}
