//! Socket options and ioctls that no crate wraps.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Fields of a socket's `TCP_INFO` (struct tcp_info, include/uapi/linux/tcp.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    /// One of the `TCP_*` states, [`TcpInfo::ESTABLISHED`] among them.
    pub state: u8,
    /// Bytes the peer has acknowledged. The count starts at an arbitrary value: compare
    /// differences only.
    pub bytes_acked: u64,
    /// Bytes received in order since the connection began. A received FIN counts as one byte.
    pub bytes_received: u64,
}

impl TcpInfo {
    /// `TCP_ESTABLISHED`, include/net/tcp_states.h.
    pub const ESTABLISHED: u8 = 1;
    /// `TCP_CLOSE`: the connection has ended or failed.
    pub const CLOSE: u8 = 7;
    /// `TCP_CLOSE_WAIT`: the peer has sent its FIN, this side has not.
    pub const CLOSE_WAIT: u8 = 8;
}

/// Reads `TCP_INFO`. The call takes the socket lock, so it also waits for a segment that the
/// kernel is processing.
///
/// # Errors
/// As getsockopt(2). A kernel older than 4.1 returns a shorter structure: `InvalidData`.
pub fn tcp_info(socket: &impl AsRawFd) -> io::Result<TcpInfo> {
    const BYTES_ACKED: usize = 120;
    const BYTES_RECEIVED: usize = 128;
    const END: libc::socklen_t = 136;

    let mut raw = [0_u8; END as usize];
    let mut len = END;
    // SAFETY: `raw` is writable for `len` bytes, and the kernel writes at most that many.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            raw.as_mut_ptr().cast(),
            &raw mut len,
        )
    })?;
    let word = |at: usize| -> io::Result<u64> {
        let bytes = raw.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u64::from_ne_bytes).ok_or_else(|| io::ErrorKind::InvalidData.into())
    };
    if len < END {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(TcpInfo { state: raw[0], bytes_acked: word(BYTES_ACKED)?, bytes_received: word(BYTES_RECEIVED)? })
}

/// Bytes in the socket's write queue: not yet sent, or sent and not yet acknowledged (`SIOCOUTQ`,
/// tcp(7)).
///
/// # Errors
/// As ioctl(2).
pub fn unacknowledged(socket: &impl AsRawFd) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ (the number of TIOCOUTQ) writes one int.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) })?;
    u64::try_from(bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// The length of an option that is one int.
const INT: libc::socklen_t = 4;

/// Makes the kernel process the receive queue again, as if a segment had just arrived: setting
/// `SO_RCVLOWAT` calls the socket's data-ready hook (tcp_set_rcvlowat, net/ipv4/tcp.c). On a
/// spliced socket the hook runs the program `verdict`.
///
/// # Errors
/// As setsockopt(2).
pub fn rerun_data_ready(socket: &impl AsRawFd) -> io::Result<()> {
    set_int(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 1)
}

/// Sets the size of the receive buffer, whatever `net.core.rmem_max` is (`SO_RCVBUFFORCE`).
///
/// # Errors
/// As setsockopt(2): `EPERM` without `CAP_NET_ADMIN`.
pub fn set_receive_buffer_force(socket: &impl AsRawFd, bytes: usize) -> io::Result<()> {
    set_int(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, int(bytes))
}

/// Sets the largest receive window (`TCP_WINDOW_CLAMP`; tcp_set_window_clamp, net/ipv4/tcp.c).
///
/// # Errors
/// As setsockopt(2).
pub fn set_window_clamp(socket: &impl AsRawFd, bytes: usize) -> io::Result<()> {
    set_int(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, int(bytes))
}

fn int(number: usize) -> libc::c_int {
    libc::c_int::try_from(number).unwrap_or(libc::c_int::MAX)
}

fn set_int(
    socket: &impl AsRawFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the value is one int, which outlives the call.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), INT) })
}

/// Makes bind(2) with port 0 leave the choice of the port to connect(2)
/// (`IP_BIND_ADDRESS_NO_PORT`, also of IPv6 sockets).
///
/// # Errors
/// As setsockopt(2).
pub fn bind_address_no_port(socket: &impl AsRawFd) -> io::Result<()> {
    set_int(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// Makes a listening socket keep the network and TCP headers of each SYN for [`saved_syn`]
/// (`TCP_SAVE_SYN`, Linux 4.3).
///
/// # Errors
/// As setsockopt(2).
pub fn save_syn(socket: &impl AsRawFd) -> io::Result<()> {
    set_int(socket, libc::IPPROTO_TCP, libc::TCP_SAVE_SYN, 1)
}

/// Takes the saved headers of the SYN that opened an accepted connection (`TCP_SAVED_SYN`). Empty
/// when they were taken before, and for a connection that was accepted by SYN cookie.
///
/// # Errors
/// As getsockopt(2).
pub fn saved_syn(socket: &impl AsRawFd) -> io::Result<Vec<u8>> {
    // Room for 60 bytes of TCP and a long chain of IPv6 extension headers.
    let mut syn = vec![0_u8; 512];
    let mut len: libc::socklen_t = 512;
    // SAFETY: `syn` is writable for `len` bytes, and the kernel writes at most that many.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_SAVED_SYN,
            syn.as_mut_ptr().cast(),
            &raw mut len,
        )
    })?;
    syn.truncate(len as usize);
    Ok(syn)
}

/// Attaches a socket filter program, which runs for every packet of `socket` (`SO_ATTACH_BPF`).
///
/// # Errors
/// As setsockopt(2).
pub fn attach_filter(socket: &impl AsRawFd, program: BorrowedFd<'_>) -> io::Result<()> {
    set_int(socket, libc::SOL_SOCKET, libc::SO_ATTACH_BPF, program.as_raw_fd())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        time::Duration,
    };

    use super::*;
    use crate::os::tcp_pair;

    #[test]
    fn tcp_info_counts_received_bytes_and_one_for_the_fin() {
        let (mut out, mut inside) = tcp_pair();
        assert_eq!(tcp_info(&inside).unwrap().bytes_received, 0);
        out.write_all(&[7; 1000]).unwrap();
        inside.read_exact(&mut [0; 1000]).unwrap();
        assert_eq!(tcp_info(&inside).unwrap().bytes_received, 1000);

        out.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(inside.read(&mut [0; 1]).unwrap(), 0);
        let info = tcp_info(&inside).unwrap();
        assert_eq!((info.bytes_received, info.state), (1001, TcpInfo::CLOSE_WAIT));
    }

    #[test]
    fn acknowledged_and_queued_bytes_add_up_to_what_was_written() {
        let (mut out, _stalled) = tcp_pair();
        out.set_nonblocking(true).unwrap();
        let base = tcp_info(&out).unwrap().bytes_acked;
        let mut written = 0;
        while let Ok(n) = out.write(&[7; 65536]) {
            written += n as u64;
        }
        std::thread::sleep(Duration::from_millis(20));
        let acked = tcp_info(&out).unwrap().bytes_acked;
        let queued = unacknowledged(&out).unwrap();
        assert!(queued > 0);
        assert_eq!(acked + queued - base, written);
    }
}
