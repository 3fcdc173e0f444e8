//! Resets a TCP connection that this host does not terminate: sends one end an RST in the other end's
//! name.

use std::{io, net::SocketAddr, os::fd::AsRawFd as _, time::Duration};

use socket2::{Domain, Protocol, Socket, Type};

/// `TCP_REPAIR_OFF_NO_WP`: leaves repair mode without a window probe (include/uapi/linux/tcp.h).
const REPAIR_OFF: libc::c_int = -1;
/// `TCP_RECV_QUEUE`.
const RECEIVE_QUEUE: libc::c_int = 1;
/// `TCP_SEND_QUEUE`.
const SEND_QUEUE: libc::c_int = 2;

/// Sends an RST from `source` to `destination` with these numbers. The receiver takes it only if
/// `sequence` is exactly the number that it expects next (RFC 5961, section 3.2).
///
/// The kernel makes the segment, by a socket that claims to be this connection (`TCP_REPAIR`): that
/// needs CAP_NET_ADMIN where a raw socket needs CAP_NET_RAW. `source` need not be an address of this
/// host.
///
/// # Errors
/// As socket(2), setsockopt(2), bind(2) and connect(2).
pub fn send(
    source: SocketAddr,
    destination: SocketAddr,
    sequence: u32,
    acknowledgement: u32,
) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(source), Type::STREAM, Some(Protocol::TCP))?;
    if source.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
    }
    // In repair mode bind(2) shares a port with any other socket, and connect(2) sends nothing.
    tcp(&socket, libc::TCP_REPAIR, 1)?;
    socket.bind(&source.into())?;
    for (queue, number) in [(SEND_QUEUE, sequence), (RECEIVE_QUEUE, acknowledgement)] {
        tcp(&socket, libc::TCP_REPAIR_QUEUE, queue)?;
        tcp(&socket, libc::TCP_QUEUE_SEQ, number.cast_signed())?;
    }
    socket.connect(&destination.into())?;
    tcp(&socket, libc::TCP_REPAIR, REPAIR_OFF)?;
    // Now close(2) resets.
    socket.set_linger(Some(Duration::ZERO))
}

fn tcp(socket: &Socket, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    const INT: libc::socklen_t = 4;
    let value = (&raw const value).cast();
    // SAFETY: the value is one int, which outlives the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, value, INT) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
        process::Command,
    };

    use super::*;

    /// The number of a queue of a socket in repair mode.
    fn number(socket: &Socket, queue: libc::c_int) -> u32 {
        tcp(socket, libc::TCP_REPAIR_QUEUE, queue).unwrap();
        let (mut number, mut len) = (0_u32, 4);
        let value = (&raw mut number).cast();
        // SAFETY: the value is one int, which outlives the call.
        let result = unsafe {
            libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ, value, &raw mut len)
        };
        assert_eq!(result, 0);
        number
    }

    /// A connection that one end has forgotten: the other end, the addresses of both, the forgetful
    /// one's first, and the numbers that it would use.
    fn orphan(ip: &str) -> (TcpStream, SocketAddr, SocketAddr, u32, u32) {
        let listener = TcpListener::bind((ip, 0)).unwrap();
        let mut left = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut other, _) = listener.accept().unwrap();
        left.write_all(b"from this end").unwrap();
        other.read_exact(&mut [0; 13]).unwrap();
        other.write_all(b"and back").unwrap();
        left.read_exact(&mut [0; 8]).unwrap();
        let addresses = (other.local_addr().unwrap(), other.peer_addr().unwrap());
        let other = Socket::from(other);
        tcp(&other, libc::TCP_REPAIR, 1).unwrap();
        let (sequence, acknowledgement) = (number(&other, SEND_QUEUE), number(&other, RECEIVE_QUEUE));
        // In repair mode close(2) sends nothing.
        drop(other);
        (left, addresses.0, addresses.1, sequence, acknowledgement)
    }

    /// As root: `cargo test -p injector-user --lib tcp_reset -- --ignored`.
    #[test]
    #[ignore = "needs CAP_NET_ADMIN and CAP_SYS_ADMIN"]
    fn the_other_end_takes_the_exact_number_only() {
        let in_own_namespace = || {
            // SAFETY: moves this thread alone.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", io::Error::last_os_error());
            assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
            for ip in ["127.0.0.1", "::1"] {
                let (mut left, source, destination, sequence, acknowledgement) = orphan(ip);
                left.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
                // One within the window would be answered, and nothing here knows the connection.
                send(source, destination, sequence.wrapping_sub(100), acknowledgement).unwrap();
                let error = left.read(&mut [0; 1]).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{ip}, another number");
                send(source, destination, sequence, acknowledgement).unwrap();
                let error = left.read(&mut [0; 1]).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{ip}");
            }
        };
        std::thread::spawn(in_own_namespace).join().unwrap();
    }
}
