//! Publishes to the programs which listeners there are: to the inline engine those that it serves, to the
//! guard the addresses of all.

use std::{net::SocketAddr, sync::Arc};

use tokio::sync::{Notify, watch};

use super::{active_listener::ActiveListener, state::Server};
use crate::{config::accepted, engine::served_listener::ServedListener};

impl Server {
    /// The listeners of the inline engine with every later change, and a notification when other
    /// backends become eligible.
    #[must_use]
    pub fn inline_updates(&self) -> (watch::Receiver<Vec<ServedListener>>, Arc<Notify>) {
        (self.inline_listeners.subscribe(), Arc::clone(&self.backends_changed))
    }

    /// Publishes the current listeners. One that was changed to another engine drains: its inline
    /// connections go on, and its backends' PROXY ports stay closed to others.
    pub(super) fn publish_to_inline(&self) {
        let served = |active: &ActiveListener| ServedListener {
            listener: active.settings.clone(),
            backends: Arc::clone(&active.backends),
            draining: active.drain.is_some() || !active.selection.inline,
        };
        self.inline_listeners.send_replace(
            self.listeners
                .iter()
                .filter(|active| active.inline_counts.is_some() && uses_inline(active))
                .map(served)
                .collect(),
        );
    }

    /// The addresses of all listeners, with every later change.
    #[must_use]
    pub fn listen_addresses(&self) -> watch::Receiver<Vec<SocketAddr>> {
        self.listen_addresses.subscribe()
    }

    /// Publishes them.
    pub(super) fn publish_addresses(&self) {
        let addresses = |active: &ActiveListener| {
            let settings = &active.settings;
            let of_virtual = settings.virtual_addresses.iter().flat_map(|ip| settings.virtual_sockets(*ip));
            settings.bind.iter().flat_map(|bound| accepted(*bound)).chain(of_virtual).collect::<Vec<_>>()
        };
        self.listen_addresses.send_replace(self.listeners.iter().flat_map(addresses).collect());
    }
}

/// Whether it is a listener of the inline engine, or was one.
fn uses_inline(active: &ActiveListener) -> bool {
    active.selection.inline || active.inline_metrics.is_some() || active.inline_connections() > 0
}
