//! Options of the daemon's TCP sockets.

use std::{io, os::fd::AsFd, time::Duration};

use socket2::{SockRef, Socket, TcpKeepalive};

use crate::os::sockopt;

/// The receive window of a spliced socket: what a connection of 200 ms needs for 5 MB/s.
const SPLICED_WINDOW: usize = 1 << 20;

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

/// Opens the receive window of a socket whose data the kernel forwards. Autotuning grows it when
/// user space reads (tcp_rcv_space_adjust, net/ipv4/tcp_input.c), so it would stay as it is. The
/// receive queue of such a socket is empty most of the time: what its target does not take waits
/// elsewhere, and has limits of its own.
///
/// # Errors
/// As setsockopt(2).
pub fn open_spliced_window(socket: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(socket);
    // The kernel doubles what is set, and counts all memory of a segment, not only its payload.
    if socket.recv_buffer_size()? < 2 * SPLICED_WINDOW {
        // Without CAP_NET_ADMIN, as much as net.core.rmem_max allows.
        sockopt::set_receive_buffer_force(&*socket, SPLICED_WINDOW)
            .or_else(|_| socket.set_recv_buffer_size(SPLICED_WINDOW))?;
        sockopt::set_window_clamp(&*socket, SPLICED_WINDOW)?;
    }
    Ok(())
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
