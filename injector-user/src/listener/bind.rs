//! Opens listening sockets.

use std::{io, net::SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;

use crate::{config::Timeouts, net::options};

/// The length of the accept queue; the kernel caps it at net.core.somaxconn.
const LISTEN_BACKLOG: i32 = 4096;

/// Opening a listening socket failed.
#[derive(Debug, Error)]
#[error("cannot listen on {address}: {error}{}", advice(.error))]
pub struct BindError {
    address: SocketAddr,
    error: io::Error,
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => ": another program listens there; `ss -ltnp` names it",
        io::ErrorKind::AddrNotAvailable => ": no interface of this machine has the address; add it first",
        io::ErrorKind::PermissionDenied => ": ports below 1024 need CAP_NET_BIND_SERVICE, or root",
        _ => "",
    }
}

/// Listens on `address`.
///
/// # Errors
/// [`BindError`], with advice.
pub fn bind(address: SocketAddr) -> Result<Socket, BindError> {
    let bind = || {
        let socket = bound_socket(address, false)?;
        socket.listen(LISTEN_BACKLOG)?;
        Ok(socket)
    };
    bind().map_err(|error| BindError { address, error })
}

/// Listens on `address` with one socket for each worker, over which the kernel distributes clients.
///
/// # Errors
/// [`BindError`], with advice.
pub fn bind_reuseport(
    address: SocketAddr,
    workers: usize,
    timeouts: &Timeouts,
) -> Result<Vec<Socket>, BindError> {
    let bind = || {
        // A shared port can be shared with another daemon's sockets too: first find out if it is
        // free.
        let first = bound_socket(address, false)?;
        let address = first.local_addr()?.as_socket().unwrap_or(address);
        drop(first);
        let sockets: io::Result<Vec<_>> = (0..workers).map(|_| bound_socket(address, true)).collect();
        let sockets = sockets?;
        for socket in &sockets {
            options::set_peer_timeouts(socket, timeouts.user_timeout, timeouts.keepalive)?;
            socket.listen(LISTEN_BACKLOG)?;
            options::disable_quickack(socket)?;
        }
        Ok(sockets)
    };
    bind().map_err(|error| BindError { address, error })
}

fn bound_socket(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let stream = Type::STREAM.nonblocking();
    let socket = Socket::new(Domain::for_address(address), stream, Some(Protocol::TCP))?;
    // A restart must not wait until the connections of the last run have left TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    options::configure_listen(&socket)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Adopts a listening socket that another process has opened (systemd). All workers accept from its
/// one queue.
///
/// # Errors
/// [`BindError`].
pub fn adopt(
    address: SocketAddr,
    socket: &Socket,
    workers: usize,
    timeouts: &Timeouts,
) -> Result<Vec<Socket>, BindError> {
    let ready = || {
        socket.set_nonblocking(true)?;
        options::configure_listen(socket)?;
        options::disable_quickack(socket)?;
        options::set_peer_timeouts(socket, timeouts.user_timeout, timeouts.keepalive)?;
        (0..workers).map(|_| socket.try_clone()).collect::<io::Result<_>>()
    };
    ready().map_err(|error| BindError { address, error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_named_with_advice() {
        let occupied = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let error = bind(occupied.local_addr().unwrap()).unwrap_err().to_string();
        assert!(error.contains("another program listens there"), "{error}");
    }

    #[test]
    fn a_port_of_another_daemon_is_not_shared() {
        let text = "[[listener]]\nname = \"a\"\nbind = [\"127.0.0.1:1\"]\nprotocol = \"smtp\"\n\
                    backends = [\"127.0.0.1:2\"]\n";
        let timeouts = crate::config::Config::parse(text, "test.toml").unwrap().listeners[0].timeouts;
        let sockets = bind_reuseport("127.0.0.1:0".parse().unwrap(), 3, &timeouts).unwrap();
        let address = sockets[0].local_addr().unwrap().as_socket().unwrap();
        assert!(sockets.iter().all(|socket| socket.local_addr().unwrap().as_socket() == Some(address)));
        let error = bind_reuseport(address, 3, &timeouts).unwrap_err().to_string();
        assert!(error.contains("another program listens there"), "{error}");
    }

    #[test]
    fn an_address_of_another_machine_is_named_with_advice() {
        let error = bind("192.0.2.1:0".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("no interface of this machine"), "{error}");
    }
}
