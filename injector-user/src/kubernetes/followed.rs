//! Lists of the configuration to which Services add addresses.

use std::{net::IpAddr, sync::Arc};

use futures_util::future::select_all;
use tokio::sync::watch;

use super::{endpoints::Endpoints, watcher::Watcher};
use crate::config::{Network, WithServices};

/// What the configuration lists, and the addresses of its Services as the API last named them. Clones
/// follow the same Services.
#[derive(Clone, Debug)]
pub struct Followed<T> {
    listed: Vec<T>,
    services: Vec<Addresses>,
}

/// What a Service adds.
#[derive(Clone, Debug)]
enum Addresses {
    OfLoadBalancer(watch::Receiver<Option<Arc<Vec<IpAddr>>>>),
    OfEndpoints(watch::Receiver<Option<Arc<Endpoints>>>),
}

impl Addresses {
    /// `None` until the API has answered.
    fn current(&self) -> Option<Vec<IpAddr>> {
        match self {
            Self::OfLoadBalancer(addresses) => addresses.borrow().as_deref().cloned(),
            Self::OfEndpoints(endpoints) => {
                endpoints.borrow().as_deref().map(|endpoints| endpoints.addresses().into_iter().collect())
            }
        }
    }

    /// Waits for a change; without end once the watcher is gone. Cancel safe.
    async fn changed(&mut self) {
        let changed = match self {
            Self::OfLoadBalancer(addresses) => addresses.changed().await,
            Self::OfEndpoints(endpoints) => endpoints.changed().await,
        };
        if changed.is_err() {
            std::future::pending().await
        }
    }
}

impl Followed<IpAddr> {
    /// Addresses, and those of load balancers. To be called in a runtime.
    #[must_use]
    pub fn load_balancers(configured: &WithServices<IpAddr>, watcher: &Watcher) -> Self {
        let follow = |service| Addresses::OfLoadBalancer(watcher.load_balancer_addresses(service));
        Self { listed: configured.listed.clone(), services: configured.services.iter().map(follow).collect() }
    }
}

impl Followed<Network> {
    /// Networks, and the addresses of endpoints. To be called in a runtime.
    #[must_use]
    pub fn endpoints(configured: &WithServices<Network>, watcher: &Watcher) -> Self {
        let follow = |service| Addresses::OfEndpoints(watcher.endpoints(service));
        Self { listed: configured.listed.clone(), services: configured.services.iter().map(follow).collect() }
    }
}

impl<T: Clone + Ord + From<IpAddr>> Followed<T> {
    /// Only what is listed.
    #[must_use]
    pub const fn listed(listed: Vec<T>) -> Self {
        Self { listed, services: Vec::new() }
    }

    /// What is listed, in that order, and what the Services add.
    #[must_use]
    pub fn current(&self) -> Vec<T> {
        let addresses = self.services.iter().filter_map(Addresses::current).flatten();
        let mut added: Vec<T> = addresses.map(|ip| ip.to_canonical().into()).collect();
        added.sort_unstable();
        added.dedup();
        added.retain(|item| !self.listed.contains(item));
        [self.listed.as_slice(), &added].concat()
    }

    /// Whether the API has named the addresses of all Services.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.services.iter().all(|service| service.current().is_some())
    }

    /// Waits for a change; without end if there is no Service. Cancel safe.
    pub async fn changed(&mut self) {
        if self.services.is_empty() {
            return std::future::pending().await;
        }
        let changes = self.services.iter_mut().map(|service| Box::pin(service.changed()));
        select_all(changes).await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|it| it.parse().unwrap()).collect()
    }

    #[tokio::test]
    async fn services_add_to_what_is_listed() {
        let (one, of_one) = watch::channel(None);
        let (two, of_two) = watch::channel(None);
        let mut followed = Followed {
            listed: ips(&["192.0.2.10"]),
            services: vec![Addresses::OfLoadBalancer(of_one), Addresses::OfLoadBalancer(of_two)],
        };
        assert_eq!((followed.current(), followed.is_complete()), (ips(&["192.0.2.10"]), false));
        one.send_replace(Some(Arc::new(ips(&["198.51.100.2", "192.0.2.10"]))));
        followed.changed().await;
        two.send_replace(Some(Arc::new(ips(&["198.51.100.1", "198.51.100.2"]))));
        followed.changed().await;
        assert_eq!(followed.current(), ips(&["192.0.2.10", "198.51.100.1", "198.51.100.2"]));
        assert!(followed.is_complete());
        // A Service without addresses adds none, and the API's end is no change.
        two.send_replace(Some(Arc::default()));
        followed.changed().await;
        assert_eq!(followed.current(), ips(&["192.0.2.10", "198.51.100.2"]));
        drop((one, two));
        assert!(timeout(Duration::from_millis(20), followed.changed()).await.is_err());
    }

    #[tokio::test]
    async fn a_list_without_services_never_changes() {
        let mut followed = Followed::<Network>::listed(vec!["10.0.0.0/24".parse().unwrap()]);
        assert!(followed.is_complete());
        assert!(timeout(Duration::from_millis(20), followed.changed()).await.is_err());
    }
}
