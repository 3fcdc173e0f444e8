//! The listeners that are open, and how that changes while the daemon runs: another configuration, a drain, the stop.
//!
//! What a change may fail of is done first ([`Server::prepare`]); what follows ([`Server::apply`]) cannot fail. Sessions
//! keep what they began with: a change is for those that come after it.

mod active_listener;
mod drain;
mod inline_bridge;
mod listen_sockets;
mod listeners;
mod reload;
mod shutdown;
mod startup;
mod state;
mod worker;

pub use self::{
    active_listener::{ActiveListener, DrainState, RemovedListener},
    listen_sockets::{BoundSockets, bind, connection_capacity, listen_socket_count},
    reload::{Changes, Prepared},
    startup::StartupState,
    state::Server,
};
