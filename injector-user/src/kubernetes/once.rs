//! The endpoints of a Service once, for commands that follow nothing.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::timeout;

use super::{endpoints::Endpoints, watcher::Watcher};
use crate::config::{ServicePort, ServiceRef};

impl Watcher {
    /// The endpoints, as soon as the API has answered.
    ///
    /// # Errors
    /// When it does not answer within this time. The text says why.
    pub async fn endpoints_within(
        &self,
        service: &ServiceRef,
        within: Duration,
    ) -> Result<Arc<Endpoints>, String> {
        let mut endpoints = self.endpoints(service);
        let answered = timeout(within, endpoints.wait_for(Option::is_some)).await;
        answered.ok().and_then(|known| known.ok()?.clone()).ok_or_else(|| {
            let watch = self.watched().into_iter().find(|watched| watched.service == *service);
            let error = watch.and_then(|watched| watched.state.error);
            error.unwrap_or_else(|| format!("no answer from the API server within {within:?}"))
        })
    }

    /// The addresses for new connections, as soon as the API has answered.
    ///
    /// # Errors
    /// As [`Self::endpoints_within`], and when the Service has no address.
    pub async fn addresses_within(
        &self,
        service: &ServiceRef,
        port: &ServicePort,
        within: Duration,
    ) -> Result<Vec<SocketAddr>, String> {
        let endpoints = self.endpoints_within(service, within).await?;
        let place = self.place().borrow().clone();
        endpoints.choose(port, &place).map_err(|error| error.to_string())
    }
}
