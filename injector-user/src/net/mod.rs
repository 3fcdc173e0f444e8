//! TCP sockets and what they need: pipes for splice(2), hang-ups, TLS for checks.

pub mod hangup;
pub mod options;
pub mod socket;
pub mod splice_pipe;
pub mod syn;
pub mod tls;
