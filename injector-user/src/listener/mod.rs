//! Listening sockets and admission, in this order: a socket is bound, accepts, and admits or
//! rejects.

mod acceptor;
mod admission;
mod bind;
mod connection_limit;
mod fd_budget;
mod rejections;
mod reserve_fd;
mod source_limit;

pub use self::{
    acceptor::Acceptor,
    admission::{AdmissionPolicy, GlobalLimit, SocketOwner},
    bind::{BindError, Neighbours, adopt, bind, bind_reuseport, lacks_ipv4, listen},
    connection_limit::{ConnectionLimit, ConnectionPermit},
    fd_budget::{connection_capacity, required_fds},
    source_limit::{SourceLimit, SourceRules},
};
