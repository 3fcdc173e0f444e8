//! Listening sockets of all listeners, and the connections that the open-file limit allows.

use std::{net::SocketAddr, sync::Arc};

use socket2::Socket;

use super::{
    active_listener::{ActiveListener, BoundSockets, ListenSockets},
    state::Server,
};
use crate::{
    config::Listener,
    listener::{self, Acceptor, SocketOwner},
    telemetry::log::target,
};

impl Server {
    /// Starts an acceptor on each socket.
    pub(super) fn start_sockets(&self, active: &mut ActiveListener, sockets: BoundSockets) {
        for (address, sockets) in sockets {
            let bound = sockets.first().and_then(|socket| socket.local_addr().ok()?.as_socket());
            tracing::info!(target: target::LISTENER,
                listener = active.settings.name,
                address = bound.map(tracing::field::display),
                "listening"
            );
            let stop_accepting = self.shared.stop_accepting.child_token();
            let owners: Vec<_> =
                active.policies.iter().map(|policy| Arc::new(SocketOwner::new(Arc::clone(policy)))).collect();
            for ((worker, owner), socket) in self.workers.iter().zip(&owners).zip(sockets) {
                let acceptor = Acceptor {
                    owner: Arc::clone(owner),
                    limit: self.shared.limits.clone(),
                    sessions: self.shared.sessions.clone(),
                    stop: stop_accepting.clone(),
                };
                worker.spawn_acceptor(acceptor, socket);
            }
            active.sockets.insert(address, ListenSockets { stop_accepting, owners });
        }
    }

    /// Binds the addresses of a listener that no listener has yet.
    pub(super) fn bind_new_addresses(&self, listener: &Listener) -> anyhow::Result<BoundSockets> {
        // A socket of another listener is handed over instead of opened again.
        let ours =
            |address: &&SocketAddr| self.listeners.iter().any(|active| active.sockets.contains_key(address));
        let bind = |address: &SocketAddr| {
            let sockets = bind(*address, &self.inherited, self.settings.workers, listener)?;
            Ok((*address, sockets))
        };
        listener.bind.iter().filter(|address| !ours(address)).map(bind).collect()
    }
}

/// Binds one address of a listener with one socket for each worker, or adopts the socket that
/// systemd passed for it.
///
/// # Errors
/// When the address cannot be bound; the message states what to do.
pub fn bind(
    address: SocketAddr,
    inherited: &[(SocketAddr, Socket)],
    workers: usize,
    listener: &Listener,
) -> anyhow::Result<Vec<Socket>> {
    let passed = inherited.iter().find(|(bound, _)| *bound == address);
    Ok(match passed {
        Some((_, socket)) => listener::adopt(address, socket, workers, &listener.timeouts)?,
        None => listener::bind_reuseport(address, workers, &listener.timeouts)?,
    })
}

/// How many connections the open-file limit allows besides the sockets of these listeners.
#[must_use]
pub fn connection_capacity(workers: usize, listeners: &[Listener], nofile: u64) -> usize {
    listener::connection_capacity(nofile, listen_socket_count(workers, listeners), workers)
}

/// How many listening sockets these listeners need.
#[must_use]
pub fn listen_socket_count(workers: usize, listeners: &[Listener]) -> usize {
    workers * listeners.iter().map(|listener| listener.bind.len()).sum::<usize>()
}
