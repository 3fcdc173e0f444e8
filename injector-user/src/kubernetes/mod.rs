//! Follows Services of Kubernetes: their endpoints, and the addresses of their load balancer.
//!
//! One [`Watcher`] serves the whole daemon. For each Service it keeps one list and watch of the API
//! (Kubernetes documentation, "API Concepts", "Efficient detection of changes"), however many
//! listeners use it, and only while one does. While the API is away, the last state stays.
//!
//! Reading order: `watcher` says who follows what, `follower` lists and watches, `connection` has the
//! credentials, `slice` and `load_balancer` read the objects, [`Endpoints`] decides which addresses
//! are used. Without the feature `kubernetes` there is only the last one, and a watcher that follows
//! nothing: [`crate::config::Config::load`] refuses files that name a Service.

mod endpoints;
mod exposure;
mod followed;

#[cfg(feature = "kubernetes")]
mod api_error;
#[cfg(feature = "kubernetes")]
mod connection;
#[cfg(feature = "kubernetes")]
mod follower;
#[cfg(feature = "kubernetes")]
mod load_balancer;
mod metrics;
mod once;
#[cfg(feature = "kubernetes")]
mod resource;
#[cfg(feature = "kubernetes")]
mod slice;
#[cfg(feature = "kubernetes")]
#[cfg(test)]
pub(crate) mod stub_api;
#[cfg(feature = "kubernetes")]
#[cfg(test)]
mod tests;
mod watch_state;
#[cfg_attr(not(feature = "kubernetes"), path = "watcher_stub.rs")]
mod watcher;

pub use self::{
    endpoints::{Endpoint, Endpoints, NoAddress, Place, Readiness},
    exposure::Exposure,
    followed::Followed,
    watch_state::{WatchState, WatchedService},
    watcher::Watcher,
};
