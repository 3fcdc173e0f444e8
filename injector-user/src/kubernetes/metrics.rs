//! What is known of the watches, as metrics.

use super::{endpoints::Readiness, watch_state::WatchedService, watcher::Watcher};
use crate::telemetry::metrics::{ServiceSample, ServiceSource};

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
                .map(|endpoints| Readiness::ALL.map(|it| (it.name(), endpoints.with(it).len()))),
        };
        self.watched().into_iter().map(sample).collect()
    }
}
