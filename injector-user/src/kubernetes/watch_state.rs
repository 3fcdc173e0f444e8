//! What is known of one watch, for metrics and `injector status`.

use std::{sync::Arc, time::SystemTime};

use super::endpoints::Endpoints;
use crate::config::ServiceRef;

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
