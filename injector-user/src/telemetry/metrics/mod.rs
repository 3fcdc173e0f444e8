//! What the injector counts. `docs/metrics.md` lists it for people; a test keeps the two the same.
//!
//! Names begin with `injector_`. No label carries a client's address. The handles of a listener are looked up
//! once, when it is set up: what a connection touches is an atomic.

mod backends;
mod bpf;
mod families;
pub mod http;
mod labels;
mod listener;
#[cfg(test)]
mod observability;
mod registry;
#[cfg(test)]
mod tests;

pub use self::{
    backends::{BackendSample, BackendSource},
    bpf::BpfCounters,
    http::Readiness,
    listener::{ActiveGuard, ListenerMetrics, ListenerSnapshot, RejectReason},
    registry::Metrics,
};
