//! Listening sockets and admission, in this order: a socket is bound, accepts, and admits or
//! rejects.

mod acceptor;
mod admission;
mod bind;
mod connection_limit;
mod fd_budget;
mod reserve_fd;

pub use self::{
    acceptor::Acceptor,
    admission::{AdmissionPolicy, GlobalLimit, SocketOwner},
    bind::{BindError, adopt, bind, bind_reuseport},
    connection_limit::{ConnectionLimit, ConnectionPermit},
    fd_budget::{connection_capacity, required_fds},
};
