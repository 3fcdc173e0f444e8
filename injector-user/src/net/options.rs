//! Options of the daemon's TCP sockets.

use std::{io, time::Duration};

use socket2::{Socket, TcpKeepalive};

use crate::os::sockopt;

/// The receive buffer of every socket. It is fixed: because the kernel removes spliced data at
/// once, autotuning would measure an infinitely fast reader. The kernel doubles the value and
/// limits it to net.core.rmem_max.
const RECEIVE_BUFFER: usize = 256 * 1024;

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

/// Configures a listening socket: fixes the receive buffer, saves the SYN of each connection, and
/// sets the options that accepted sockets inherit (sk_clone, net/core/sock.c).
///
/// # Errors
/// As setsockopt(2).
pub fn configure_listen(socket: &Socket) -> io::Result<()> {
    configure(socket)?;
    set_receive_buffer(socket)?;
    sockopt::save_syn(socket)
}

/// Fixes the receive buffer. Must precede connect(2) or listen(2), which derive the window scale
/// from it.
///
/// # Errors
/// As setsockopt(2).
pub(super) fn set_receive_buffer(socket: &Socket) -> io::Result<()> {
    socket.set_recv_buffer_size(RECEIVE_BUFFER)
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
