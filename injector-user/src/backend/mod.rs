//! Reaching a backend: names resolved again as they change, backends chosen by their health and weight, addresses tried in
//! order.

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
