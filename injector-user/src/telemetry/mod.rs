//! Logs and metrics.

pub mod backlog;
pub mod log;
pub mod metrics;
pub mod outcome;
pub mod rate_limit;
