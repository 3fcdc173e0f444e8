//! The user-space half of the inline engine. The programs are in `injector-ebpf/src/inline/`.
//!
//! It loads the programs, gives them the listeners and backends, attaches them to the devices and
//! reads their events. Start reading in [`runner`].
//!
//! Packets do not pass the daemon: programs, maps and NAT rules stay when it exits, until
//! [`detach`] removes them.

mod attach;
mod attach_points;
pub mod eligibility;
mod filters;
mod flow_tracker;
mod maps;
pub mod nat;
pub mod nat_sync;
mod programs;
pub mod routes;
pub mod runner;
pub mod selftest;
pub mod sysctl;

pub use self::{
    attach::{AttachError, DetachError, Role, detach, has_tcx},
    flow_tracker::{FlowTracker, ListenerInfo},
    programs::{InlinePrograms, LoadError, addresses},
};
