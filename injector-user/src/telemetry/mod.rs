//! Logs and metrics.

pub mod backlog;
pub mod log;
pub mod log_queue;
pub mod metrics;
pub mod operator_connections;
pub mod outcome;
pub mod rate_limit;
pub mod target;
