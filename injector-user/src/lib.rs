//! The injector daemon. Start reading at [`session`]: the life of one connection.

pub mod backend;
#[cfg(feature = "bpf")]
pub mod bpf;
pub mod choice;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod endpoint;
pub mod engine;
pub mod header;
#[cfg(feature = "bpf")]
pub mod inline;
pub mod listener;
pub mod log;
pub mod metrics;
pub mod pipe;
pub mod protocol;
pub mod relay;
pub mod rights;
pub mod selftest;
pub mod session;
#[cfg(feature = "bpf")]
pub mod splice;
pub mod sys;
pub mod watch;
pub mod worker;
