//! Looks up a name, as the C library does (`docs/decisions/0018-names-by-getaddrinfo.md`).

use std::{io, net::SocketAddr};

/// The addresses of a name, in the order of getaddrinfo(3).
///
/// # Errors
/// When the name does not exist, or no name server answers.
pub(super) async fn lookup(name: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok(tokio::net::lookup_host((name, port)).await?.collect())
}
