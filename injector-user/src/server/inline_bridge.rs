//! Publishes to the programs which listeners there are: to the inline engine those that it serves, to the
//! guard the addresses of all.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use futures_util::future::select_all;
use tokio::sync::{Notify, watch};

use super::{active_listener::ActiveListener, state::Server};
use crate::{
    config::{Listener, accepted},
    engine::served_listener::ServedListener,
    kubernetes::Followed,
};

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
            virtual_addresses: active.virtual_addresses.clone(),
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

    /// Publishes them, and follows the virtual ones until the next call. The inline engine is notified of
    /// their changes.
    pub(super) fn publish_addresses(&mut self) {
        let mut all: Vec<_> = self
            .listeners
            .iter()
            .map(|active| (active.settings.clone(), active.virtual_addresses.clone()))
            .collect();
        self.listen_addresses.send_replace(addresses(&all));
        self.stop_following_addresses.cancel();
        self.stop_following_addresses = self.shared.stop_accepting.child_token();
        let (stop, published) = (self.stop_following_addresses.clone(), self.listen_addresses.clone());
        let changed = Arc::clone(&self.backends_changed);
        let follow = async move {
            loop {
                select_all(all.iter_mut().map(|(_, followed)| Box::pin(followed.changed()))).await;
                published.send_replace(addresses(&all));
                changed.notify_one();
            }
        };
        tokio::spawn(async move { stop.run_until_cancelled(follow).await });
    }
}

fn addresses(listeners: &[(Listener, Followed<IpAddr>)]) -> Vec<SocketAddr> {
    let of = |(settings, followed): &(Listener, Followed<IpAddr>)| {
        let bound = settings.bind.iter().flat_map(|bound| accepted(*bound));
        bound.chain(settings.virtual_sockets(&followed.current())).collect::<Vec<_>>()
    };
    listeners.iter().flat_map(of).collect()
}

/// Whether it is a listener of the inline engine, or was one.
fn uses_inline(active: &ActiveListener) -> bool {
    active.selection.inline || active.inline_metrics.is_some() || active.inline_connections() > 0
}
