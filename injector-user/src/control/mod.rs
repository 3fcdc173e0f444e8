//! The operator's side of a running daemon: a unix socket on which `injector status` and its like are answered.
//!
//! One connection, one line of JSON with the [`Request`], one line with the [`Reply`]. The socket's mode (0600) is all the
//! protection there is: whoever may open it may do everything.

pub mod client;
#[cfg(test)]
mod fixtures;
mod handler;
mod show;
mod socket;
mod status;
pub mod top;
mod watch_file;
pub mod wire;

pub use self::{
    handler::{ConfigSource, Control},
    socket::{ControlSocket, SocketError},
    watch_file::watch,
    wire::{Reply, Request},
};
