//! Connects to a backend: tries the addresses of all backends in order until one accepts.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use thiserror::Error;
use tokio::time::{Instant, timeout};

use super::{
    pool::Backends,
    state::{Backend, SessionGuard},
};
use crate::{
    net::{socket::Endpoint, syn::ObserveSyn},
    telemetry::log::target,
};

/// A connection to a backend.
#[derive(Debug)]
pub struct BackendConnection {
    /// The socket.
    pub endpoint: Endpoint,
    /// The address that accepted.
    pub address: SocketAddr,
    /// To be held until the connection ends.
    pub session: SessionGuard,
}

/// Why no backend could be reached: the most specific error of all addresses.
#[derive(Debug, Error)]
pub enum Unreachable {
    /// No name has an address.
    #[error("no name of a backend resolves to an address")]
    Unresolved,
    /// The operator has disabled all of them.
    #[error("all backends are disabled by the operator; `injector backend auto` enables one again")]
    AllDisabled,
    /// Refused, and no other address timed out.
    #[error("{address}: {error}")]
    Refused {
        /// The last address that refused.
        address: SocketAddr,
        /// Connection refused.
        error: io::Error,
    },
    /// No reply in time.
    #[error("{address}: no answer within {within:?}")]
    Timeout {
        /// The last address that did not reply.
        address: SocketAddr,
        /// The time that the attempt had.
        within: Duration,
    },
    /// Any other error, such as no route.
    #[error("{address}: {error}")]
    Other {
        /// The last address that failed.
        address: SocketAddr,
        /// The error of connect(2).
        error: io::Error,
    },
}

impl Backends {
    /// Connects to the first address that accepts, while `observe` reads its SYN. All addresses
    /// share the time `within`: each attempt gets an equal part of the rest.
    ///
    /// # Errors
    /// [`Unreachable`], after all addresses failed.
    pub async fn connect(
        &self,
        within: Duration,
        observe: &ObserveSyn<'_>,
    ) -> Result<BackendConnection, Unreachable> {
        let deadline = Instant::now() + within;
        let order = self.order();
        if order.is_empty() {
            return Err(Unreachable::AllDisabled);
        }
        let mut addresses = addresses(&order);
        if addresses.is_empty() {
            // The name had no address when it was last resolved.
            let _ = timeout(within, self.resolve()).await;
            addresses = self::addresses(&order);
        }
        let mut worst = Unreachable::Unresolved;
        let mut failing: Option<&Backend> = None;
        for (left, (backend, address)) in
            (1..=u32::try_from(addresses.len()).unwrap_or(1)).rev().zip(addresses)
        {
            // All addresses of the previous backend have failed.
            if let Some(failing) = failing.filter(|failing| !Arc::ptr_eq(&failing.state, &backend.state)) {
                self.failed(failing);
            }
            let share = deadline.saturating_duration_since(Instant::now()) / left;
            let failed = match timeout(share, Endpoint::connect(address, observe)).await {
                Ok(Ok(endpoint)) => {
                    return Ok(BackendConnection { endpoint, address, session: self.reached(backend) });
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    Unreachable::Refused { address, error }
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => {
                    Unreachable::Timeout { address, within: share }
                }
                Ok(Err(error)) => Unreachable::Other { address, error },
                Err(_) => Unreachable::Timeout { address, within: share },
            };
            tracing::debug!(target: target::BACKEND, listener = self.listener, error = %failed, "connecting to a backend address failed; trying the next one, if any");
            failing = failed.counts_as_failure().then_some(backend);
            worst = most_specific(worst, failed);
        }
        if let Some(failing) = failing {
            self.failed(failing);
        }
        Err(worst)
    }

    /// Records that a connection of the inline engine was refused at this address.
    pub fn note_refused(&self, address: SocketAddr) {
        self.with_address(address).for_each(|backend| self.failed(backend));
    }

    /// Records that this address accepted a connection of the inline engine.
    pub fn note_connected(&self, address: SocketAddr) {
        self.with_address(address).for_each(|backend| backend.state.health().connected());
    }

    fn with_address(&self, address: SocketAddr) -> impl Iterator<Item = &Backend> {
        self.all().iter().filter(move |backend| backend.addresses().contains(&address))
    }

    fn reached(&self, backend: &Backend) -> SessionGuard {
        let state = &backend.state;
        state.health().connected();
        state.counters.active.fetch_add(1, Ordering::Relaxed);
        state.counters.sessions.fetch_add(1, Ordering::Relaxed);
        SessionGuard(Arc::clone(state))
    }

    fn failed(&self, backend: &Backend) {
        let ejected = backend.state.health().failed(std::time::Instant::now(), &self.health.ejection);
        if let Some(time) = ejected {
            backend.state.counters.ejections.fetch_add(1, Ordering::Relaxed);
            let name = &backend.configured;
            tracing::warn!(target: target::HEALTH, listener = self.listener, backend = %name, duration = ?time, "backend ejected after failed connections; it receives none until the time is over");
        }
    }
}

fn addresses<'a>(order: &[&'a Backend]) -> Vec<(&'a Backend, SocketAddr)> {
    let of = |backend: &&'a Backend| {
        let backend = *backend;
        backend.addresses().into_iter().map(move |address| (backend, address))
    };
    order.iter().flat_map(of).collect()
}

impl Unreachable {
    /// Whether the error shows a failure of the backend, not of the daemon.
    fn counts_as_failure(&self) -> bool {
        use io::ErrorKind::{ConnectionReset, HostUnreachable, NetworkUnreachable};
        match self {
            Self::Refused { .. } | Self::Timeout { .. } => true,
            Self::Other { error, .. } => {
                matches!(error.kind(), HostUnreachable | NetworkUnreachable | ConnectionReset)
            }
            Self::Unresolved | Self::AllDisabled => false,
        }
    }
}

/// The more specific of two errors. A timeout outranks a refusal, because it shows a network
/// failure.
fn most_specific(one: Unreachable, other: Unreachable) -> Unreachable {
    let rank = |error: &Unreachable| match error {
        Unreachable::Unresolved | Unreachable::AllDisabled => 0,
        Unreachable::Other { .. } => 1,
        Unreachable::Refused { .. } => 2,
        Unreachable::Timeout { .. } => 3,
    };
    if rank(&other) >= rank(&one) { other } else { one }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Config, net::syn::no_observer};

    fn backends(list: &str) -> Backends {
        let text = format!(
            "[[listener]]\nname = \"a\"\nbind = [\"127.0.0.1:1\"]\nprotocol = \"smtp\"\nbackends = [{list}]\n"
        );
        Backends::new(&Config::parse(&text, "test.toml").unwrap().listeners[0], None, Arc::default())
    }

    async fn listening() -> (tokio::net::TcpListener, SocketAddr) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    async fn refusing() -> SocketAddr {
        listening().await.1
    }

    #[tokio::test]
    async fn the_next_address_is_tried_after_a_refusal() {
        let (_listener, good) = listening().await;
        let backends = backends(&format!("\"{}\", \"{good}\"", refusing().await));
        let backend = backends.connect(Duration::from_secs(5), &no_observer).await.unwrap();
        assert_eq!(backend.address, good);
    }

    #[tokio::test]
    async fn refusals_of_all_addresses_are_reported_as_refused() {
        let backends = backends(&format!("\"{}\"", refusing().await));
        let error = backends.connect(Duration::from_secs(5), &no_observer).await.unwrap_err();
        assert!(matches!(error, Unreachable::Refused { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_name_is_resolved_on_demand() {
        let (_listener, good) = listening().await;
        let backends = backends(&format!("\"localhost:{}\"", good.port()));
        assert_eq!(backends.all()[0].addresses(), []);
        let backend = backends.connect(Duration::from_secs(5), &no_observer).await.unwrap();
        assert_eq!(backend.address, good);
    }

    #[tokio::test]
    async fn a_name_without_address_is_unresolved() {
        let error = backends("\"nowhere.invalid:25\"")
            .connect(Duration::from_secs(5), &no_observer)
            .await
            .unwrap_err();
        assert!(matches!(error, Unreachable::Unresolved), "{error}");
    }
}
