//! In place of the watcher, in a build without the feature `kubernetes`: follows nothing. The
//! configuration names no Service then ([`crate::config::Config::load`]).

use std::{net::IpAddr, path::PathBuf, sync::Arc};

use tokio::sync::watch;

use super::{
    endpoints::{Endpoints, Place},
    exposure::Exposure,
    watch_state::WatchedService,
};
use crate::config::{Kubernetes, ServiceRef};

/// Follows nothing.
#[derive(Clone, Debug)]
pub struct Watcher(());

impl Watcher {
    /// Ignores the settings.
    #[must_use]
    pub fn new(_settings: Kubernetes) -> Self {
        Self(())
    }

    /// None.
    #[must_use]
    pub fn directories(_settings: &Kubernetes) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Never known.
    #[must_use]
    pub fn endpoints(&self, _service: &ServiceRef) -> watch::Receiver<Option<Arc<Endpoints>>> {
        watch::channel(None).1
    }

    /// Never known.
    #[must_use]
    pub fn load_balancer_addresses(
        &self,
        _service: &ServiceRef,
    ) -> watch::Receiver<Option<Arc<Vec<IpAddr>>>> {
        watch::channel(None).1
    }

    /// Never known.
    ///
    /// # Errors
    /// Always.
    pub async fn exposure(&self, _service: &ServiceRef) -> Result<Option<Exposure>, String> {
        Err("this injector was built without the feature `kubernetes`".to_owned())
    }

    /// Not known.
    #[must_use]
    pub fn place(&self) -> watch::Receiver<Place> {
        watch::channel(Place::default()).1
    }

    /// None.
    #[must_use]
    pub fn watched(&self) -> Vec<WatchedService> {
        Vec::new()
    }
}
