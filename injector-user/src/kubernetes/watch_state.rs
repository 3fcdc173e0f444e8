//! What is known of one watch, for metrics and `injector status`.

use std::{sync::Arc, time::SystemTime};

use super::{
    endpoints::{Endpoints, Readiness},
    watcher::Watcher,
};
use crate::{
    config::ServiceRef,
    telemetry::metrics::{ServiceSample, ServiceSource},
};

/// The state of a watch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WatchState {
    /// When the API last answered. `None`: never.
    pub last_answer: Option<SystemTime>,
    /// How many requests failed.
    pub failures: u64,
    /// Why the last request failed, if it did.
    pub error: Option<String>,
}

/// A Service that is followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchedService {
    /// The Service.
    pub service: ServiceRef,
    /// The kind of objects that are watched: `endpointslices` or `services`.
    pub resource: &'static str,
    /// How the watch is.
    pub state: WatchState,
    /// The endpoints, once they are known.
    pub endpoints: Option<Arc<Endpoints>>,
}

impl ServiceSource for Watcher {
    fn sample(&self) -> Vec<ServiceSample> {
        let sample = |watched: WatchedService| ServiceSample {
            service: watched.service.to_string(),
            resource: watched.resource,
            up: watched.state.error.is_none() && watched.state.last_answer.is_some(),
            last_answer: watched.state.last_answer,
            failures: watched.state.failures,
            endpoints: watched
                .endpoints
                .map(|endpoints| Readiness::ALL.map(|it| (it.name(), endpoints.count(it)))),
        };
        self.watched().into_iter().map(sample).collect()
    }
}
