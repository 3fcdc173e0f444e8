//! Backends: finding their addresses, choosing one by health and weight, and connecting to it.

mod addresses;
mod balance;
mod checker;
mod connect;
mod health;
mod lookup;
mod misread;
mod pool;
mod queue;
mod reply;
mod resolver;
mod service;
mod source;
mod state;

#[cfg(feature = "bpf")]
pub(crate) use self::balance::stable_hash;
pub use self::{
    checker::CheckError,
    connect::{BackendConnection, Unreachable},
    health::{AdminState, HealthState},
    pool::{Backends, try_once},
    state::{Backend, BackendStats, SessionGuard},
};
