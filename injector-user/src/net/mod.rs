//! TCP sockets, pipes for splice(2), peer-close monitoring, and TLS for health checks.

pub mod hangup;
pub mod options;
pub mod socket;
pub mod source;
pub mod splice_pipe;
pub mod syn;
pub mod tls;
