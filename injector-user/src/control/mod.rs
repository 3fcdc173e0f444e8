//! Commands to a running daemon over a unix socket, such as `injector status`.
//!
//! A connection carries one line of JSON with the [`Request`] and one with the [`Reply`]. Only the
//! socket's mode (0600) protects it: a process that can open it can send every command.

mod bans;
pub mod client;
mod dry_run;
#[cfg(test)]
mod fixtures;
mod guard;
mod handler;
mod show;
mod socket;
mod status;
mod target;
mod text;
pub mod top;
mod watch_file;
pub mod wire;

pub use self::{
    handler::{ConfigSource, Control, log_remarks},
    socket::{ControlSocket, SocketError},
    watch_file::watch,
    wire::{Reply, Request},
};
