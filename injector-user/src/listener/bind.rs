//! Opens listening sockets.
//!
//! `[::]` always accepts both families: the option is set, whatever net.ipv6.bindv6only says.

use std::{io, net::SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;

use crate::{
    config::Timeouts,
    net::options,
    os::listening::{self, Process},
};

/// The length of the accept queue; the kernel caps it at net.core.somaxconn.
const LISTEN_BACKLOG: i32 = 4096;

/// Opening a listening socket failed.
#[derive(Debug, Error)]
#[error("cannot listen on {address}: {error}{advice}")]
pub struct BindError {
    address: SocketAddr,
    error: io::Error,
    advice: String,
}

impl BindError {
    fn new(address: SocketAddr, error: io::Error) -> Self {
        let advice = match error.kind() {
            io::ErrorKind::AddrInUse => in_use(listening::process_at(address)),
            io::ErrorKind::AddrNotAvailable => {
                ": no interface of this machine has the address; add it first".to_owned()
            }
            io::ErrorKind::PermissionDenied => {
                ": ports below 1024 need CAP_NET_BIND_SERVICE, or root".to_owned()
            }
            _ => String::new(),
        };
        Self { address, error, advice }
    }
}

/// The name of this program's processes.
const OWN_NAME: &str = "injector";

fn in_use(by: Option<Process>) -> String {
    match by {
        Some(Process { pid, name }) if name == OWN_NAME => {
            format!(": another injector listens there (process {pid}): stop it first")
        }
        Some(process) => format!(": another program listens there: {process}"),
        None => ": another program listens there; `ss -ltnp` names it".to_owned(),
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
    bind().map_err(|error| BindError::new(address, error))
}

/// Who may listen already on an address that is to be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neighbours {
    /// No socket.
    None,
    /// Sockets of this daemon, on an address that overlaps. The kernel gives a connection to the
    /// socket with the more specific address (inet_lookup_listener,
    /// net/ipv4/inet_hashtables.c).
    Own,
}

/// Binds one socket for each worker to `address`, over which the kernel distributes clients once
/// they [`listen`].
///
/// # Errors
/// [`BindError`], with advice.
pub fn bind_reuseport(
    address: SocketAddr,
    neighbours: Neighbours,
    workers: usize,
    timeouts: &Timeouts,
) -> Result<Vec<Socket>, BindError> {
    let bind = || {
        let address = match neighbours {
            // A shared port can be shared with another daemon's sockets too: first find out if it
            // is free.
            Neighbours::None => {
                let first = bound_socket(address, false)?;
                first.local_addr()?.as_socket().unwrap_or(address)
            }
            // Not possible beside the daemon's own sockets. A socket of another program that does
            // not share its port still causes an error.
            Neighbours::Own => address,
        };
        let sockets: io::Result<Vec<_>> = (0..workers).map(|_| bound_socket(address, true)).collect();
        let sockets = sockets?;
        for socket in &sockets {
            options::set_peer_timeouts(socket, timeouts.user_timeout, timeouts.keepalive)?;
        }
        Ok(sockets)
    };
    bind().map_err(|error| BindError::new(address, error))
}

/// Listens on sockets that were bound or adopted for `address`. From here on they get clients.
///
/// # Errors
/// [`BindError`], with advice.
pub fn listen(address: SocketAddr, sockets: &[Socket]) -> Result<(), BindError> {
    let listen = |socket: &Socket| {
        // An adopted socket keeps the length of its queue.
        if !socket.is_listener()? {
            socket.listen(LISTEN_BACKLOG)?;
        }
        options::disable_quickack(socket)
    };
    sockets.iter().try_for_each(listen).map_err(|error| BindError::new(address, error))
}

fn bound_socket(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let stream = Type::STREAM.nonblocking();
    let socket = Socket::new(Domain::for_address(address), stream, Some(Protocol::TCP))?;
    // A restart must not wait until the connections of the last run have left TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
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
        options::set_peer_timeouts(socket, timeouts.user_timeout, timeouts.keepalive)?;
        (0..workers).map(|_| socket.try_clone()).collect::<io::Result<_>>()
    };
    ready().map_err(|error| BindError::new(address, error))
}

/// Whether a socket bound to `[::]` accepts no IPv4 connections. The option cannot be changed any
/// more once the socket is bound (do_ipv6_setsockopt, net/ipv6/ipv6_sockglue.c).
///
/// # Errors
/// As getsockopt(2).
pub fn lacks_ipv4(address: SocketAddr, socket: &Socket) -> io::Result<bool> {
    Ok(address.is_ipv6() && address.ip().is_unspecified() && socket.only_v6()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeouts() -> Timeouts {
        let text = "[[listener]]\nname = \"a\"\nbind = [\"127.0.0.1:1\"]\nprotocol = \"smtp\"\n\
                    backends = [\"127.0.0.1:2\"]\n";
        crate::config::Config::parse(text, "test.toml").unwrap().listeners[0].timeouts
    }

    fn reuseport(
        address: SocketAddr,
        neighbours: Neighbours,
        workers: usize,
    ) -> Result<Vec<Socket>, BindError> {
        let sockets = bind_reuseport(address, neighbours, workers, &timeouts())?;
        listen(address, &sockets)?;
        Ok(sockets)
    }

    #[test]
    fn a_port_in_use_is_named_with_advice() {
        let occupied = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let error = bind(occupied.local_addr().unwrap()).unwrap_err().to_string();
        let own = format!("(process {})", std::process::id());
        assert!(error.contains("another program listens there: ") && error.ends_with(&own), "{error}");
    }

    #[test]
    fn another_injector_is_called_so() {
        let process = |name: &str| Some(Process { pid: 7, name: name.to_owned() });
        assert_eq!(
            in_use(process("injector")),
            ": another injector listens there (process 7): stop it first"
        );
        assert_eq!(in_use(process("master")), ": another program listens there: master (process 7)");
        assert_eq!(in_use(None), ": another program listens there; `ss -ltnp` names it");
    }

    #[test]
    fn a_port_of_another_daemon_is_not_shared() {
        let sockets = reuseport("127.0.0.1:0".parse().unwrap(), Neighbours::None, 3).unwrap();
        let address = sockets[0].local_addr().unwrap().as_socket().unwrap();
        assert!(sockets.iter().all(|socket| socket.local_addr().unwrap().as_socket() == Some(address)));
        let error = reuseport(address, Neighbours::None, 3).unwrap_err().to_string();
        assert!(error.contains("another program listens there"), "{error}");
    }

    #[test]
    fn an_address_of_another_machine_is_named_with_advice() {
        let error = bind("192.0.2.1:0".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("no interface of this machine"), "{error}");
    }

    #[test]
    fn sockets_for_all_addresses_accept_both_families() {
        let port = |socket: &Socket| socket.local_addr().unwrap().as_socket().unwrap().port();
        let accepts = |socket: &Socket| {
            for host in ["127.0.0.1", "::1"] {
                std::net::TcpStream::connect((host, port(socket)))
                    .unwrap_or_else(|error| panic!("{host}: {error}"));
            }
        };
        let all: SocketAddr = "[::]:0".parse().unwrap();
        let socket = bind(all).unwrap();
        accepts(&socket);
        assert!(!lacks_ipv4(all, &socket).unwrap());
        let sockets = reuseport(all, Neighbours::None, 2).unwrap();
        accepts(&sockets[0]);
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        socket.set_only_v6(true).unwrap();
        assert!(lacks_ipv4(all, &socket).unwrap());
        assert!(!lacks_ipv4("[::1]:0".parse().unwrap(), &socket).unwrap());
    }

    /// With `ipv6-only`, `ListenStream=[::]:25` would refuse IPv4.
    #[test]
    fn the_socket_unit_accepts_both_families() {
        let unit = include_str!("../../../deploy/systemd/injector.socket");
        let settings: Vec<_> = unit.lines().filter(|line| line.starts_with("BindIPv6Only=")).collect();
        assert_eq!(settings, ["BindIPv6Only=both"]);
    }

    #[test]
    fn an_address_is_bound_beside_own_sockets_for_all_addresses_and_the_other_way_round() {
        for (first, second) in [("[::]", "127.0.0.1"), ("127.0.0.1", "[::]"), ("0.0.0.0", "127.0.0.1")] {
            let address = |host: &str, port: u16| format!("{host}:{port}").parse().unwrap();
            let held = reuseport(address(first, 0), Neighbours::None, 1).unwrap();
            let port = held[0].local_addr().unwrap().as_socket().unwrap().port();
            let second = address(second, port);
            reuseport(second, Neighbours::None, 1).unwrap_err();
            reuseport(second, Neighbours::Own, 1).unwrap();
            drop(held);
            // A socket of another program, which does not share.
            let _other = std::net::TcpListener::bind(second).unwrap();
            let error = reuseport(second, Neighbours::Own, 1).unwrap_err().to_string();
            assert!(error.contains("another program listens there"), "{error}");
        }
    }
}
