//! Backends: resolving their names, choosing one by health and weight, and connecting to it.

mod balance;
mod checker;
mod connect;
mod health;
mod pool;
mod resolver;
mod state;

pub use self::{
    connect::{BackendConnection, Unreachable},
    health::{AdminState, HealthState},
    pool::Backends,
    state::{Backend, BackendStats, SessionGuard},
};
