//! The listeners, the worker threads that serve them, and their changes: reload, drain, shutdown.
//!
//! A session keeps the settings that it started with. Every change applies to new sessions only.

mod active_listener;
mod drain;
mod inline_bridge;
mod listen_sockets;
mod listeners;
mod reload;
mod settings;
mod shutdown;
mod startup;
mod state;
mod worker;

pub use self::{
    active_listener::{ActiveListener, BoundSockets, DrainState, ListenerSetup, RemovedListener},
    listen_sockets::{bind, connection_capacity, listen_socket_count, uses_inherited},
    reload::{Changes, Prepared, Rehearsal},
    settings::StartupSettings,
    startup::StartupState,
    state::{Connections, Server},
};
