//! Prometheus metrics. `docs/metrics.md` lists them, and a test compares both.
//!
//! Names begin with `injector_`. No label has a client's address. The series of a listener are
//! looked up once, so that a connection only updates atomics.

mod backends;
mod bpf;
mod connections;
mod crowdsec;
mod exposition;
mod families;
mod guard;
pub mod http;
mod labels;
mod listener;
mod log;
#[cfg(test)]
mod observability;
mod registry;
mod services;
mod source;
#[cfg(test)]
mod tests;

pub use self::{
    backends::{BackendSample, BackendSource},
    bpf::BpfCounters,
    connections::ConnectionCounts,
    crowdsec::CrowdSecMetrics,
    guard::{GuardSample, GuardSource, ListSample},
    http::Readiness,
    listener::{ActiveGuard, ListenerMetrics, ListenerSnapshot, RejectReason},
    registry::Metrics,
    services::{ServiceSample, ServiceSource},
};
