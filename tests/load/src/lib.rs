//! The two ends of the benchmark: a client that makes load and measures, and a server that answers and counts headers.
//!
//! They run as processes of their own, one in the client's namespace and one in the mail servers', and speak with whoever
//! started them in lines of JSON. The crate is apart from the testbed so that it is always compiled with optimisation
//! (`[profile.dev.package.injector-load]`): on two cores a slow load generator hides the differences it is to show.
//!
//! In reading order: [`service`] says what is spoken on which port, [`server`] answers, [`client`] carries out an
//! [`order`] and tells the [`order::Outcome`], and [`cpu`] reads what the whole machine spent meanwhile.

pub mod client;
pub mod cpu;
mod descriptors;
pub mod latency;
#[cfg(test)]
mod loopback;
pub mod order;
pub mod poller;
pub mod server;
pub mod service;
