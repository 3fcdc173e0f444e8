//! Options of the daemon's TCP sockets.

use std::{io, time::Duration};

use socket2::{Socket, TcpKeepalive};

use crate::os::sockopt;

/// The receive buffer of every socket: fixed, since autotuning would see a reader of infinite speed where the kernel
/// takes the payload away at once. The kernel doubles it, and caps it at net.core.rmem_max.
const RECEIVE_BUFFER: usize = 256 * 1024;

/// From now on a peer that does not answer is given up: one that has been sent something after `user_timeout`, as is one
/// whose window stays closed for so long; an idle one is asked whether it lives after `keepalive` (whole seconds), and from
/// then on, and given up after `user_timeout` as well. By the kernel alone, whoever carries the payload. Accepted sockets
/// have it from the listening one.
///
/// # Errors
/// As setsockopt(2).
pub fn set_peer_timeouts(socket: &Socket, user_timeout: Duration, keepalive: Duration) -> io::Result<()> {
    let interval = (keepalive / 4).max(Duration::from_secs(1));
    // With a user timeout the kernel does not count probes (tcp_keepalive_timer, net/ipv4/tcp_timer.c).
    let probes = TcpKeepalive::new().with_time(keepalive).with_interval(interval);
    socket.set_tcp_keepalive(&probes)?;
    socket.set_tcp_user_timeout(Some(user_timeout))
}

/// Readies a socket that is to accept: fixes the receive buffer, saves the SYN of each connection until it is read, and
/// sets what accepted sockets then have as well (sk_clone, net/core/sock.c).
///
/// # Errors
/// As setsockopt(2).
pub fn configure_listen(socket: &Socket) -> io::Result<()> {
    configure(socket)?;
    set_receive_buffer(socket)?;
    sockopt::save_syn(socket)
}

/// Fixes the receive buffer; before connect(2) or listen(2), so that the window scale fits it.
///
/// # Errors
/// As setsockopt(2).
pub(super) fn set_receive_buffer(socket: &Socket) -> io::Result<()> {
    socket.set_recv_buffer_size(RECEIVE_BUFFER)
}

/// Without Nagle, and with urgent data in its place.
///
/// # Errors
/// As setsockopt(2).
pub fn configure(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    // Without it an urgent byte leaves the stream, and the counts of the EOF proof never meet.
    socket.set_out_of_band_inline(true)
}

/// Has acknowledgements go along with payload where some follows soon (delayed, RFC 9293, section 3.8.6.3), from the first
/// segment on; the kernel alone sends them at once until it has seen a conversation. A connecting socket leaves that of the
/// SYN-ACK to the header (tcp_rcv_synsent_state_process, net/ipv4/tcp_input.c). To be called before connect(2), but after
/// listen(2), which forgets it (inet_csk_listen_start, net/ipv4/inet_connection_sock.c); accepted sockets have it as well.
///
/// # Errors
/// As setsockopt(2).
pub fn disable_quickack(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_quickack(false)
}
