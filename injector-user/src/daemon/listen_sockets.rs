//! Opens the listening sockets of the configured listeners.

use std::net::SocketAddr;

use anyhow::Context as _;
use socket2::Socket;

use crate::{
    config::Listener,
    listener::{self, Neighbours},
    net::source,
    server::{self, BoundSockets},
    telemetry::log::target,
};

/// Listens on the addresses of all listeners, and warns about sockets of systemd that no listener uses.
///
/// # Errors
/// When an address cannot be bound, or this host lacks a source address; the message states what to do.
pub(super) fn bind_all(
    listeners: &[Listener],
    workers: usize,
    inherited: &[(SocketAddr, Socket)],
) -> anyhow::Result<Vec<BoundSockets>> {
    let bind = |listener: &Listener| {
        source::check(&listener.source_addresses).with_context(|| format!("listener {:?}", listener.name))?;
        let bind = |address: &SocketAddr| {
            let sockets = server::bind(*address, Neighbours::None, inherited, workers, listener)?;
            listener::listen(*address, &sockets)?;
            Ok((*address, sockets))
        };
        let sockets: anyhow::Result<BoundSockets> = listener.bind.iter().map(bind).collect();
        sockets.with_context(|| format!("listener {:?}", listener.name))
    };
    let used = |address: &SocketAddr| {
        listeners.iter().any(|listener| server::uses_inherited(&listener.bind, *address))
    };
    for (address, _) in inherited.iter().filter(|(address, _)| !used(address)) {
        tracing::warn!(target: target::DAEMON, %address, "systemd passed a socket for this address, but no listener binds it; its clients are never accepted: \
             add the address to a listener or remove it from the .socket unit");
    }
    listeners.iter().map(bind).collect()
}
