//! The injector daemon. Start reading at [`session`]: the life of one connection.

pub mod backend;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod doctor;
pub mod engine;
pub mod guard;
pub mod header;
pub mod kubernetes;
pub mod listener;
pub mod net;
pub mod os;
#[cfg(feature = "probe")]
pub mod probe;
pub mod protocol;
pub mod server;
pub mod session;
pub mod telemetry;
