//! Reaching a backend: names resolved again as they change, addresses tried in order.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use thiserror::Error;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Backend, Host, Listener},
    endpoint::Endpoint,
    engine::Engine,
    watch::Watch,
};

/// The backends of one listener.
#[derive(Debug)]
pub struct Backends {
    listener: String,
    configured: Vec<Backend>,
    /// For each configured backend, in order, what it resolved to last.
    resolved: RwLock<Vec<Vec<SocketAddr>>>,
    resolve_interval: Duration,
}

/// Why no backend could be reached; the most telling of the errors of all addresses.
#[derive(Debug, Error)]
pub enum Unreachable {
    /// No name has an address.
    #[error("no backend name has an address")]
    Unresolved,
    /// Refused, and no other address timed out.
    #[error("{address}: {error}")]
    Refused {
        /// The last that refused.
        address: SocketAddr,
        /// Connection refused.
        error: io::Error,
    },
    /// No answer in time.
    #[error("{address}: no answer within {within:?}")]
    Timeout {
        /// The last that did not answer.
        address: SocketAddr,
        /// What it was given.
        within: Duration,
    },
    /// Anything else, such as no route.
    #[error("{address}: {error}")]
    Other {
        /// The last that failed.
        address: SocketAddr,
        /// How.
        error: io::Error,
    },
}

impl Backends {
    /// The backends of `listener`; addresses are known at once, names after [`Backends::keep_resolving`] started.
    #[must_use]
    pub fn new(listener: &Listener) -> Self {
        let known = |backend: &Backend| match backend.host {
            Host::Ip(ip) => vec![SocketAddr::new(ip, backend.port)],
            Host::Name(_) => Vec::new(),
        };
        Self {
            listener: listener.name.clone(),
            resolved: RwLock::new(listener.backends.iter().map(known).collect()),
            configured: listener.backends.clone(),
            resolve_interval: listener.resolve_interval,
        }
    }

    /// Resolves the names now and then every interval, until `stop`. The last good answer is kept when resolving fails.
    pub async fn keep_resolving(self: Arc<Self>, stop: CancellationToken) {
        if self.configured.iter().all(|backend| matches!(backend.host, Host::Ip(_))) {
            return;
        }
        loop {
            self.resolve().await;
            tokio::select! {
                () = tokio::time::sleep(self.resolve_interval) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Connects to the first address that answers, on behalf of `engine`. All addresses together get `within`, each its share of what is left.
    ///
    /// # Errors
    /// [`Unreachable`], after every address was tried.
    pub async fn connect(
        &self,
        within: Duration,
        watch: &Watch,
        engine: &dyn Engine,
    ) -> Result<Endpoint, Unreachable> {
        let deadline = Instant::now() + within;
        let mut addresses = self.addresses();
        if addresses.is_empty() {
            // The name had no address when last asked.
            let _ = timeout(within, self.resolve()).await;
            addresses = self.addresses();
        }
        let mut worst = Unreachable::Unresolved;
        for (left, address) in (1..=u32::try_from(addresses.len()).unwrap_or(1)).rev().zip(addresses) {
            let share = deadline.saturating_duration_since(Instant::now()) / left;
            let failed = match timeout(share, Endpoint::connect(address, watch, engine)).await {
                Ok(Ok(backend)) => return Ok(backend),
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    Unreachable::Refused { address, error }
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => {
                    Unreachable::Timeout { address, within: share }
                }
                Ok(Err(error)) => Unreachable::Other { address, error },
                Err(_) => Unreachable::Timeout { address, within: share },
            };
            tracing::debug!(listener = self.listener, error = %failed, "backend address failed");
            worst = worse(worst, failed);
        }
        Err(worst)
    }

    /// All addresses known now, in the order of the configuration.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.resolved.read().unwrap_or_else(PoisonError::into_inner).iter().flatten().copied().collect()
    }

    async fn resolve(&self) {
        for (index, backend) in self.configured.iter().enumerate() {
            let Host::Name(name) = &backend.host else { continue };
            let addresses: Vec<_> = match tokio::net::lookup_host((name.as_str(), backend.port)).await {
                Ok(addresses) => addresses.collect(),
                Err(error) => {
                    tracing::warn!(listener = self.listener, backend = name, %error, "name not resolved");
                    continue;
                }
            };
            let mut resolved = self.resolved.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(known) = resolved.get_mut(index)
                && *known != addresses
            {
                tracing::info!(listener = self.listener, backend = name, ?addresses, "name resolved");
                *known = addresses;
            }
        }
    }
}

/// The more telling of two failures: a timeout says more of a network in trouble than a refusal does.
fn worse(one: Unreachable, other: Unreachable) -> Unreachable {
    let rank = |error: &Unreachable| match error {
        Unreachable::Unresolved => 0,
        Unreachable::Other { .. } => 1,
        Unreachable::Refused { .. } => 2,
        Unreachable::Timeout { .. } => 3,
    };
    if rank(&other) >= rank(&one) { other } else { one }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Config, engine::Relay};

    fn backends(list: &str) -> Backends {
        let text = format!(
            "[[listener]]\nname = \"a\"\nbind = [\"127.0.0.1:1\"]\nprotocol = \"smtp\"\nbackends = [{list}]\n"
        );
        Backends::new(&Config::parse(&text, "test.toml").unwrap().listeners[0])
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
    async fn the_next_address_is_tried_when_one_refuses() {
        let (_listener, good) = listening().await;
        let watch = Watch::start().unwrap();
        let backends = backends(&format!("\"{}\", \"{good}\"", refusing().await));
        let backend = backends.connect(Duration::from_secs(5), &watch, &Relay).await.unwrap();
        assert_eq!(backend.peer(), good);
    }

    #[tokio::test]
    async fn all_refusing_is_a_refusal() {
        let watch = Watch::start().unwrap();
        let backends = backends(&format!("\"{}\"", refusing().await));
        let error = backends.connect(Duration::from_secs(5), &watch, &Relay).await.unwrap_err();
        assert!(matches!(error, Unreachable::Refused { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_name_is_resolved_when_it_is_needed() {
        let (_listener, good) = listening().await;
        let watch = Watch::start().unwrap();
        let backends = backends(&format!("\"localhost:{}\"", good.port()));
        assert_eq!(backends.addresses(), []);
        let backend = backends.connect(Duration::from_secs(5), &watch, &Relay).await.unwrap();
        assert_eq!(backend.peer(), good);
    }

    #[tokio::test]
    async fn a_name_without_address_says_so() {
        let watch = Watch::start().unwrap();
        let error = backends("\"nowhere.invalid:25\"")
            .connect(Duration::from_secs(5), &watch, &Relay)
            .await
            .unwrap_err();
        assert!(matches!(error, Unreachable::Unresolved), "{error}");
    }
}
