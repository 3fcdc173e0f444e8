//! Source addresses of connections to backends.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
};

use socket2::Socket;
use thiserror::Error;

use crate::os::sockopt;

/// This host lacks a configured source address.
#[derive(Debug, Error)]
#[error(
    "source_addresses {address}: {error}: no interface of this machine has the address; add it, or remove it from the list"
)]
pub struct SourceError {
    address: IpAddr,
    error: io::Error,
}

/// Binds a socket that will connect. The kernel chooses the port when it connects, so that the same
/// port can serve connections to other addresses (`IP_BIND_ADDRESS_NO_PORT`, Linux 4.2).
///
/// # Errors
/// [`SourceError`] within an error of the kind of bind(2)'s.
pub(super) fn bind(socket: &Socket, address: IpAddr) -> io::Result<()> {
    sockopt::bind_address_no_port(socket)?;
    let bound = socket.bind(&SocketAddr::new(address, 0).into());
    bound.map_err(|error| io::Error::new(error.kind(), SourceError { address, error }))
}

/// Tests that this host has the addresses.
///
/// # Errors
/// [`SourceError`], for the first that it lacks.
pub fn check(addresses: &[IpAddr]) -> Result<(), SourceError> {
    let check = |address: &IpAddr| {
        let bound = UdpSocket::bind(SocketAddr::new(*address, 0));
        bound.map(drop).map_err(|error| SourceError { address: *address, error })
    };
    addresses.iter().try_for_each(check)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_this_host_lacks_is_refused() {
        let [own, foreign] = ["127.0.0.5", "192.0.2.1"].map(|text| text.parse().unwrap());
        check(&[own]).unwrap();
        let error = check(&[own, foreign]).unwrap_err().to_string();
        assert!(error.starts_with("source_addresses 192.0.2.1: Cannot assign requested address"), "{error}");
    }
}
