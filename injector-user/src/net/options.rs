//! Options of the daemon's TCP sockets.

use std::{io, ops::RangeInclusive, os::fd::AsFd, time::Duration};

use socket2::{SockRef, Socket, TcpKeepalive};

use crate::os::sockopt;

/// Makes the kernel close connections to peers that do not answer: after `user_timeout` without an
/// acknowledgement or with a closed window. An idle peer is probed after `keepalive` (whole
/// seconds) and has `user_timeout` to answer. This also works while the kernel forwards. Accepted
/// sockets inherit it from the listening socket.
///
/// # Errors
/// As setsockopt(2).
pub fn set_peer_timeouts(socket: &Socket, user_timeout: Duration, keepalive: Duration) -> io::Result<()> {
    let interval = (keepalive / 4).max(Duration::from_secs(1));
    // With a user timeout the kernel ignores the number of probes (tcp_keepalive_timer,
    // net/ipv4/tcp_timer.c).
    let probes = TcpKeepalive::new().with_time(keepalive).with_interval(interval);
    socket.set_tcp_keepalive(&probes)?;
    socket.set_tcp_user_timeout(Some(user_timeout))
}

/// Configures a listening socket: saves the SYN of each connection, and sets the options that
/// accepted sockets inherit (sk_clone, net/core/sock.c).
///
/// # Errors
/// As setsockopt(2).
pub fn configure_listen(socket: &Socket) -> io::Result<()> {
    configure(socket)?;
    sockopt::save_syn(socket)
}

/// The receive windows of a spliced socket: of the first, it has the next one when its target has
/// kept up with what it received. With the last, a connection of 200 ms carries 20 MB/s.
pub const SPLICED_WINDOWS: RangeInclusive<usize> = 256 << 10..=4 << 20;

/// Sets the receive window of a socket whose data the kernel forwards. Autotuning grows it only when
/// user space reads (tcp_rcv_space_adjust, net/ipv4/tcp_input.c), for a target that may be slower.
///
/// # Errors
/// As setsockopt(2).
pub fn set_spliced_window(socket: &impl AsFd, window: usize) -> io::Result<()> {
    let socket = SockRef::from(socket);
    // The kernel doubles what is set, and counts all memory of a segment, not only its payload. Without
    // CAP_NET_ADMIN, as much as net.core.rmem_max allows.
    sockopt::set_receive_buffer_force(&*socket, window).or_else(|_| socket.set_recv_buffer_size(window))?;
    sockopt::set_window_clamp(&*socket, window)
}

/// Disables Nagle's algorithm and keeps urgent data in the stream.
///
/// # Errors
/// As setsockopt(2).
pub fn configure(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    // Otherwise an urgent byte leaves the stream, and the byte counts of a delivered stream never
    // match.
    socket.set_out_of_band_inline(true)
}

/// Delays acknowledgements from the first segment on, so that they travel with payload (RFC 9293,
/// section 3.8.6.3). By default the kernel acknowledges at once until it detects an interactive
/// session. On a connecting socket, the header then acknowledges the SYN-ACK
/// (tcp_rcv_synsent_state_process, net/ipv4/tcp_input.c). Must precede connect(2) but follow
/// listen(2), which resets it (inet_csk_listen_start, net/ipv4/inet_connection_sock.c). Accepted
/// sockets inherit it.
///
/// # Errors
/// As setsockopt(2).
pub fn disable_quickack(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_quickack(false)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// A client, and its connection.
    fn accepted(listener: &TcpListener) -> (TcpStream, Socket) {
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, Socket::from(listener.accept().unwrap().0))
    }

    #[test]
    fn the_kernel_tunes_the_receive_buffer_until_it_forwards() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        configure_listen(&SockRef::from(&listener)).unwrap();
        let (_client, accepted) = accepted(&listener);
        let (_client, plain) = self::accepted(&TcpListener::bind("127.0.0.1:0").unwrap());
        assert_eq!(accepted.recv_buffer_size().unwrap(), plain.recv_buffer_size().unwrap());
        let (first, last) = (*SPLICED_WINDOWS.start(), *SPLICED_WINDOWS.end());
        set_spliced_window(&accepted, first).unwrap();
        let size = accepted.recv_buffer_size().unwrap();
        assert!(size > 2 * 128 * 1024, "{size}");
        set_spliced_window(&accepted, last).unwrap();
        // Without CAP_NET_ADMIN it may be limited.
        let larger = accepted.recv_buffer_size().unwrap();
        assert!(larger >= size, "{larger} after {size}");
    }
}
