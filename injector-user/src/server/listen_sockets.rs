//! Listening sockets of all listeners, and the connections that the open-file limit allows.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use socket2::Socket;

use super::{
    active_listener::{ActiveListener, BoundSockets, ListenSockets},
    state::Server,
};
use crate::{
    config::{self, Listener},
    listener::{self, Acceptor, Neighbours, SocketOwner},
    telemetry::log::target,
};

/// How long sockets stay open whose connections other sockets take from now on. A handshake that has
/// begun ends at the socket that its SYN arrived at, and would be reset without it.
const HANDSHAKE_TIME: Duration = Duration::from_secs(1);

/// How long closed sockets may be found in the way: each worker closes its own in its own time.
const CLOSE_TIME: Duration = Duration::from_secs(1);

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
            // An address with sockets for each family has two for each worker.
            for ((worker, owner), socket) in self.workers.iter().zip(&owners).cycle().zip(sockets) {
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

    /// Binds the addresses of a listener that no listener has yet. The sockets get no clients until
    /// they [`listener::listen`].
    pub(super) fn bind_new_addresses(&self, listener: &Listener) -> anyhow::Result<BoundSockets> {
        // A socket of another listener is handed over instead of opened again.
        let ours =
            |address: &&SocketAddr| self.listeners.iter().any(|active| active.sockets.contains_key(address));
        let bind = |address: &SocketAddr| {
            let neighbours = self.neighbours(*address);
            let sockets = bind(*address, neighbours, &self.inherited, self.settings.workers, listener)?;
            Ok((*address, sockets))
        };
        listener.bind.iter().filter(|address| !ours(address)).map(bind).collect()
    }

    fn neighbours(&self, address: SocketAddr) -> Neighbours {
        let now = Instant::now();
        let open = self.listeners.iter().flat_map(|active| active.sockets.keys());
        let closing = self.closing.iter().filter(|(_, until)| now < *until).map(|(address, _)| address);
        let own = open.chain(closing).any(|own| config::overlap(*own, address));
        if own { Neighbours::Own } else { Neighbours::None }
    }

    /// Closes the sockets of an address that no listener has any more; `binds` are the addresses of
    /// all listeners from now on.
    pub(super) fn close_sockets(
        &mut self,
        listener: &str,
        address: SocketAddr,
        sockets: ListenSockets,
        binds: &[SocketAddr],
    ) {
        tracing::info!(target: target::LISTENER, listener, %address, "no longer listening");
        let now = Instant::now();
        self.closing.retain(|(_, until)| now < *until);
        self.closing.push((address, now + HANDSHAKE_TIME + CLOSE_TIME));
        let stop_accepting = sockets.stop_accepting;
        if !binds.iter().any(|bind| config::accepts(address, *bind)) {
            return stop_accepting.cancel();
        }
        tokio::spawn(async move {
            tokio::time::sleep(HANDSHAKE_TIME).await;
            stop_accepting.cancel();
        });
    }
}

/// Whether a listener with these addresses serves the sockets of `address`: it has the address, or
/// one for all. Then sockets from before stay open: they get the connections to their address, and
/// closing them would reset those whose handshake has begun.
pub(super) fn serves(bind: &[SocketAddr], address: SocketAddr) -> bool {
    bind.iter().any(|bound| *bound == address || config::accepts(*bound, address))
}

/// Binds one address of a listener with one socket for each worker, or adopts the socket that
/// systemd passed for it. If that one is for IPv6 alone, IPv4 gets sockets of its own.
///
/// # Errors
/// When the address cannot be bound; the message states what to do.
pub fn bind(
    address: SocketAddr,
    neighbours: Neighbours,
    inherited: &[(SocketAddr, Socket)],
    workers: usize,
    listener: &Listener,
) -> anyhow::Result<Vec<Socket>> {
    let Some((_, socket)) = inherited.iter().find(|(bound, _)| *bound == address) else {
        let opened = listener::bind_reuseport(address, neighbours, workers, &listener.timeouts);
        let other = inherited.iter().find(|(bound, _)| config::overlap(*bound, address));
        return match other {
            Some((other, _)) => opened.with_context(|| {
                format!(
                    "systemd passed a socket for {other}, which overlaps {address}: write the same address in \
                     `bind` and in ListenStream= of the .socket unit, and restart both"
                )
            }),
            None => Ok(opened?),
        };
    };
    let mut sockets = listener::adopt(address, socket, workers, &listener.timeouts)?;
    if listener::lacks_ipv4(address, socket)? {
        let ipv4 = ipv4_wildcard(address.port());
        if !inherited.iter().any(|(bound, _)| *bound == ipv4) {
            tracing::warn!(target: target::LISTENER, listener = listener.name, %address, "systemd's socket for this address accepts IPv6 alone; the daemon opens one for IPv4 itself: \
                 set BindIPv6Only=both in the .socket unit");
        }
        let opened = bind(ipv4, neighbours, inherited, workers, listener);
        sockets.extend(opened.with_context(|| {
            format!(
                "systemd's socket for {address} accepts IPv6 alone, and IPv4 needs its own: set \
                 BindIPv6Only=both in the .socket unit"
            )
        })?);
    }
    Ok(sockets)
}

/// Whether one of these addresses uses the socket that systemd passed for `address`.
#[must_use]
pub fn uses_inherited(binds: &[SocketAddr], address: SocketAddr) -> bool {
    let both = |bind: &SocketAddr| bind.is_ipv6() && bind.ip().is_unspecified();
    let complements = address == ipv4_wildcard(address.port())
        && binds.iter().any(|bind| both(bind) && bind.port() == address.port());
    complements || binds.contains(&address)
}

fn ipv4_wildcard(port: u16) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn sockets_stay_as_long_as_a_listener_takes_their_connections() {
        let served =
            |bind: &str, socket: &str| serves(&[address("192.0.2.9:26"), address(bind)], address(socket));
        for (bind, socket, expected) in [
            ("192.0.2.1:25", "192.0.2.1:25", true),
            ("0.0.0.0:25", "192.0.2.1:25", true),
            ("[::]:25", "192.0.2.1:25", true),
            ("[::]:25", "0.0.0.0:25", true),
            ("[::]:25", "[2001:db8::1]:25", true),
            // These get new sockets, and the old ones go.
            ("192.0.2.1:25", "0.0.0.0:25", false),
            ("0.0.0.0:25", "[::]:25", false),
            ("0.0.0.0:25", "[2001:db8::1]:25", false),
            ("0.0.0.0:25", "192.0.2.1:26", false),
            // Ports that the kernel chooses.
            ("127.0.0.1:0", "127.0.0.1:0", true),
            ("0.0.0.0:0", "127.0.0.1:0", false),
        ] {
            assert_eq!(served(bind, socket), expected, "{socket} by {bind}");
        }
    }

    #[test]
    fn an_ipv4_socket_of_systemd_complements_one_for_ipv6() {
        for (bind, socket, expected) in [
            ("[::]:25", "[::]:25", true),
            ("[::]:25", "0.0.0.0:25", true),
            ("[::]:25", "0.0.0.0:26", false),
            ("[::1]:25", "0.0.0.0:25", false),
            ("0.0.0.0:25", "[::]:25", false),
        ] {
            assert_eq!(uses_inherited(&[address(bind)], address(socket)), expected, "{bind} {socket}");
        }
    }
}
