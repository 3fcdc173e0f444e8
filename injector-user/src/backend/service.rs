//! Gives the backends that are Services of Kubernetes the addresses of their endpoints.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{sync::watch, time::sleep};

use super::{addresses::Resolved, pool::Backends, state::Backend};
use crate::{
    config::{Destination, ServicePort},
    kubernetes::{Endpoints, NoAddress, Place, Watcher},
    telemetry::log::target,
};

/// Changes are taken over no faster: each one may make inline's table of backends anew. What changes
/// meanwhile is taken over together.
const PAUSE: Duration = Duration::from_millis(200);

impl Backends {
    /// Follows the endpoints of all backends that are Services. Ends if there is none.
    pub(super) async fn follow_services(&self, watcher: &Watcher) {
        join_all(self.all.iter().map(|backend| self.follow_service(backend, watcher))).await;
    }

    async fn follow_service(&self, backend: &Backend, watcher: &Watcher) {
        let Destination::Service { service, port } = &backend.configured.destination else { return };
        let (mut endpoints, mut place) = (watcher.endpoints(service), watcher.place());
        loop {
            self.take_over(backend, port, &mut endpoints, &mut place);
            tokio::select! {
                Ok(()) = endpoints.changed() => {}
                Ok(()) = place.changed() => {}
                // The watcher is gone with the runtime.
                else => return,
            }
            sleep(PAUSE).await;
        }
    }

    fn take_over(
        &self,
        backend: &Backend,
        port: &ServicePort,
        endpoints: &mut watch::Receiver<Option<Arc<Endpoints>>>,
        place: &mut watch::Receiver<Place>,
    ) {
        let Some(endpoints) = endpoints.borrow_and_update().clone() else { return };
        let chosen = endpoints.choose(port, &place.borrow_and_update());
        match chosen {
            Ok(addresses) => self.note_endpoints(backend, addresses),
            Err(error) => self.note_no_endpoint(backend, &error),
        }
    }

    fn note_endpoints(&self, backend: &Backend, addresses: Vec<SocketAddr>) {
        let (listener, name) = (&self.listener, &backend.configured);
        if addresses.len() == Endpoints::MAX_ADDRESSES {
            tracing::warn!(target: target::RESOLVER, listener, backend = %name, most = Endpoints::MAX_ADDRESSES, "the service has very many endpoints; only the first of them get connections");
        }
        let again = backend.state.unresolved.swap(false, Ordering::Relaxed);
        let changed = backend.state.addresses().replace(addresses.clone()) == Resolved::Changed;
        if changed || again {
            tracing::info!(target: target::RESOLVER, listener, backend = %name, ?addresses, "endpoints of the service");
            self.notify_changed();
            // Clients that came without an address to go to.
            self.resolved.notify_waiters();
        }
    }

    /// Connects to none: an address that is no longer the Service's may soon be another pod's. Warns
    /// once, until there are endpoints again.
    fn note_no_endpoint(&self, backend: &Backend, error: &NoAddress) {
        let (listener, name) = (&self.listener, &backend.configured);
        if backend.state.addresses().replace(Vec::new()) == Resolved::Changed {
            self.notify_changed();
        }
        if !backend.state.unresolved.swap(true, Ordering::Relaxed) {
            tracing::warn!(target: target::RESOLVER, listener, backend = %name, %error, "the service has no endpoint for connections; the backend gets none until there is one");
        }
    }
}

#[cfg(feature = "kubernetes")]
#[cfg(test)]
mod tests {
    use tokio::time::{Instant, timeout};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{
        backend::{connect::Unreachable, pool::tests::backends},
        kubernetes::stub_api::{StubApi, slice},
        net::syn::no_observer,
    };

    const SOON: Duration = Duration::from_secs(10);

    const BACKEND: &str = "{ service = \"mail/mailserver\", port = \"smtp\" }";

    /// A listener with this backend, and what ends it.
    fn running(api: &StubApi, backend: &str) -> (Arc<Backends>, CancellationToken) {
        let (backends, stop) = (Arc::new(backends(backend)), CancellationToken::new());
        tokio::spawn(Arc::clone(&backends).run(api.watcher(), stop.clone()));
        (backends, stop)
    }

    async fn become_addresses(backends: &Backends, expected: &[&str]) {
        let expected: Vec<SocketAddr> = expected.iter().map(|it| it.parse().unwrap()).collect();
        let became = async {
            while backends.all()[0].addresses() != expected {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let became = timeout(SOON, became).await;
        assert!(became.is_ok(), "{:?}, not {expected:?}", backends.all()[0].addresses());
    }

    #[tokio::test]
    async fn a_backend_has_the_endpoints_of_its_service() {
        let api = StubApi::start().await;
        api.set("a", slice(&["10.0.0.1", "10.0.0.2"]));
        let (backends, stop) = running(&api, BACKEND);
        become_addresses(&backends, &["10.0.0.1:2525", "10.0.0.2:2525"]).await;
        // What is known of an address that stays is kept.
        let failed = "10.0.0.2:2525".parse().unwrap();
        backends.all()[0].state.addresses().failed(failed, std::time::Instant::now());
        api.set("a", slice(&["10.0.0.2", "10.0.0.3"]));
        become_addresses(&backends, &["10.0.0.2:2525", "10.0.0.3:2525"]).await;
        assert_eq!(backends.all()[0].failing_addresses(), [failed]);
        // An address that the service no longer has may be another pod's.
        api.delete("a");
        become_addresses(&backends, &[]).await;
        stop.cancel();
    }

    #[tokio::test]
    async fn many_changes_are_taken_over_together_and_none_is_lost() {
        let api = StubApi::start().await;
        api.set("a", slice(&["10.0.0.1"]));
        let (backends, stop) = running(&api, BACKEND);
        become_addresses(&backends, &["10.0.0.1:2525"]).await;
        // The permit of the first change.
        backends.changed.notified().await;
        let counted = {
            let backends = Arc::clone(&backends);
            tokio::spawn(async move {
                let mut changes = 0_u32;
                while timeout(PAUSE * 3, backends.changed.notified()).await.is_ok() {
                    changes += 1;
                }
                changes
            })
        };
        let start = Instant::now();
        for host in 0..100 {
            api.set("a", slice(&[&format!("10.0.1.{host}")]));
            sleep(Duration::from_millis(10)).await;
        }
        become_addresses(&backends, &["10.0.1.99:2525"]).await;
        let most = u32::try_from(start.elapsed().as_millis() / PAUSE.as_millis()).unwrap() + 1;
        let changes = counted.await.unwrap();
        assert!((2..=most).contains(&changes), "{changes} changes, expected at most {most}");
        stop.cancel();
    }

    #[tokio::test]
    async fn a_client_waits_for_the_first_endpoint() {
        let api = StubApi::start().await;
        let (backends, stop) = running(&api, BACKEND);
        let client = "192.0.2.7".parse().unwrap();
        let none = backends.connect(client, Duration::from_millis(100), &no_observer).await;
        assert!(matches!(none.map(|it| it.address), Err(Unreachable::Unresolved)));
        let waiting = {
            let backends = Arc::clone(&backends);
            tokio::spawn(async move { backends.resolve_now().await })
        };
        sleep(Duration::from_millis(50)).await;
        assert!(!waiting.is_finished());
        api.set("a", slice(&["10.0.0.1"]));
        timeout(SOON, waiting).await.unwrap().unwrap();
        become_addresses(&backends, &["10.0.0.1:2525"]).await;
        stop.cancel();
    }
}
