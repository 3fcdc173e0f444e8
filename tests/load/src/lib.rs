//! The load generator of the benchmark: a client that makes load and measures, and a server that
//! responds and counts headers.
//!
//! Each runs as a process of its own, the client in the client's namespace and the server in the
//! mail namespace. They exchange lines of JSON with the process that started them. The crate is
//! separate from the testbed so that it is always compiled with optimisation
//! (`[profile.dev.package.injector-load]`): on two cores a slow load generator hides the
//! differences that the benchmark measures.
//!
//! In reading order: [`service`] defines what is spoken on which port, [`server`] responds,
//! [`client`] executes a [`job`] and prints its [`job::JobOutcome`], and [`cpu`] reads the
//! processor time of the whole machine. Beside all that, [`flood`] sends SYNs that are forged.

pub mod client;
pub mod cpu;
mod descriptors;
pub mod flood;
pub mod job;
pub mod latency;
#[cfg(test)]
mod loopback;
pub mod poller;
pub mod server;
pub mod service;
