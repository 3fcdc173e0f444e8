//! Listening sockets of all listeners, and the connections that the open-file limit allows.

use std::{net::SocketAddr, sync::Arc};

use socket2::Socket;

use super::{
    active_listener::{ActiveListener, ListenSockets},
    state::Server,
};
use crate::{
    config::{Config, EngineChoice, Listener},
    listener::{self, Acceptor, SocketOwner},
    telemetry::log::target,
};

/// Sockets by the address of the configuration: for each, one for each worker.
pub type BoundSockets = Vec<(SocketAddr, Vec<Socket>)>;

impl Server {
    pub(super) fn start_sockets(&self, active: &mut ActiveListener, sockets: BoundSockets) {
        for (address, sockets) in sockets {
            let bound = sockets.first().and_then(|socket| socket.local_addr().ok()?.as_socket());
            tracing::info!(target: target::LISTENER,
                listener = active.config.name,
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

    /// Sockets for the addresses of a listener that nobody has open.
    pub(super) fn bind_new_addresses(&self, listener: &Listener) -> anyhow::Result<BoundSockets> {
        if listener.engine == EngineChoice::Inline {
            return Ok(Vec::new());
        }
        // Its own, or that of a listener that hands it over.
        let ours =
            |address: &&SocketAddr| self.listeners.iter().any(|active| active.sockets.contains_key(address));
        let bind = |address: &SocketAddr| {
            let sockets = bind(*address, &self.inherited, self.config.limits.workers, listener)?;
            Ok((*address, sockets))
        };
        listener.bind.iter().filter(|address| !ours(address)).map(bind).collect()
    }
}

/// The sockets of one address of a listener, one for each worker. Those that systemd holds are taken over.
///
/// # Errors
/// With what to do about it.
pub fn bind(
    address: SocketAddr,
    inherited: &[(SocketAddr, Socket)],
    workers: usize,
    listener: &Listener,
) -> anyhow::Result<Vec<Socket>> {
    let handed = inherited.iter().find(|(bound, _)| *bound == address);
    Ok(match handed {
        Some((_, socket)) => listener::adopt(address, socket, workers, &listener.timeouts)?,
        None => listener::bind_reuseport(address, workers, &listener.timeouts)?,
    })
}

/// How many connections the descriptors carry.
#[must_use]
pub fn connection_capacity(config: &Config, nofile: u64) -> usize {
    listener::connection_capacity(nofile, listen_socket_count(config), config.limits.workers)
}

/// How many listening sockets a configuration makes.
#[must_use]
pub fn listen_socket_count(config: &Config) -> usize {
    config.limits.workers * config.listeners.iter().map(|listener| listener.bind.len()).sum::<usize>()
}
