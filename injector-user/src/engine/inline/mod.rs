//! The user-space half of the inline engine. The programs are in `injector-ebpf/src/inline/`.
//!
//! It loads the programs, gives them the listeners and backends, attaches them to the devices and
//! reads their events. Start reading in [`runner`].
//!
//! Packets do not pass the daemon: programs and maps stay when it exits, until
//! `injector inline detach` removes them.

mod attach;
mod counts;
pub mod detach;
mod flow_tracker;
mod installation;
mod maps;
pub mod migrate;
mod nat_rules;
mod netfilter;
pub mod pins;
mod places;
mod plan;
mod pool;
mod programs;
mod reset;
mod route_lookups;
pub mod runner;
pub mod selftest;
mod service;
mod source_maps;
mod sources;
mod tables;
mod usage;

pub use self::{
    attach::SET,
    detach::{DetachError, detach},
    flow_tracker::FlowTracker,
    programs::{InlinePrograms, LoadError},
};
