//! The system calls that no crate wraps. All of the daemon's `unsafe` is here, except one line in
//! `systemd.rs`, which takes over the sockets that systemd passes.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

#[cfg(feature = "bpf")]
use rustix::mm;
use rustix::{
    buffer::spare_capacity,
    event::{self, PollFd, PollFlags, Timespec, epoll},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use tokio::io::{Interest, unix::AsyncFd};

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

const NO_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// The length of an option that is one int.
const INT: libc::socklen_t = 4;

/// Makes the kernel process the receive queue again, as if a segment had just arrived: setting
/// `SO_RCVLOWAT` calls the socket's data-ready hook (tcp_set_rcvlowat, net/ipv4/tcp.c). On a spliced
/// socket the hook runs the program `verdict`.
///
/// # Errors
/// As setsockopt(2).
pub fn kick(socket: &impl AsRawFd) -> io::Result<()> {
    set_int(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 1)
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

/// `CLOCK_MONOTONIC` in nanoseconds: the clock of `bpf_ktime_get_ns`.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, nanoseconds) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(nanoseconds.unwrap_or(0))
}

/// The mapped memory of a BPF array of 64-bit words (`BPF_F_MMAPABLE`, Linux 5.5). Reading it takes
/// no system call.
#[cfg(feature = "bpf")]
#[derive(Debug)]
pub struct MmapArray {
    first: std::ptr::NonNull<std::sync::atomic::AtomicU64>,
    count: usize,
}

// SAFETY: the memory is read only by atomic loads, and the mapping lives as long as the value.
#[cfg(feature = "bpf")]
unsafe impl Send for MmapArray {}
// SAFETY: as above.
#[cfg(feature = "bpf")]
unsafe impl Sync for MmapArray {}

#[cfg(feature = "bpf")]
impl MmapArray {
    /// Maps the first `count` words of the array.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn of(array: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        let len = count * size_of::<u64>();
        // SAFETY: creates a new mapping, at an address that the kernel chooses.
        let start = unsafe {
            mm::mmap(std::ptr::null_mut(), len, mm::ProtFlags::READ, mm::MapFlags::SHARED, array, 0)
        }?;
        let first = std::ptr::NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { first, count })
    }

    /// The present value of the word at `index`.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<u64> {
        // SAFETY: inside the mapping, which starts at a page boundary, so every word is aligned.
        let word = (index < self.count).then(|| unsafe { self.first.add(index).as_ref() });
        word.map(|word| word.load(std::sync::atomic::Ordering::Acquire))
    }
}

#[cfg(feature = "bpf")]
impl Drop for MmapArray {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and no reference into it outlives the value.
        let _ = unsafe { mm::munmap(self.first.as_ptr().cast(), self.count * size_of::<u64>()) };
    }
}

/// The soft limit of open descriptors after raising it as far as the hard limit allows. When the
/// kernel refuses to raise it, the present limit is returned.
#[must_use]
pub fn raise_nofile() -> u64 {
    let before = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: before.maximum, ..before };
    let limit = if setrlimit(Resource::Nofile, wanted).is_ok() { wanted } else { before };
    // `None` means no limit.
    limit.current.unwrap_or(u64::MAX)
}

/// Whether `socket` is readable now. For a listening socket: whether a connection can be accepted.
///
/// # Errors
/// As poll(2).
pub fn readable_now(socket: &impl AsFd) -> io::Result<bool> {
    let mut polled = [PollFd::new(socket, PollFlags::IN)];
    event::poll(&mut polled, Some(&NO_WAIT))?;
    Ok(polled[0].revents().contains(PollFlags::IN))
}

/// Registers `inner` with the runtime's poller.
///
/// # Errors
/// When the runtime's epoll instance rejects the descriptor.
pub fn poll<T: AsFd + AsRawFd>(inner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: by the contract of `AsFd`, the descriptor of `inner` stays open and the same as long as
    // `inner` lives, and this function neither moves `inner` out nor mutates it.
    let registered = unsafe { AsyncFd::register_with_interest(inner, interest) };
    Ok(registered?)
}

/// An epoll instance for a condition that tokio cannot poll for: hang-up without readability.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

/// One event of [`Epoll::wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hangup {
    /// The key passed to [`Epoll::add`].
    pub key: u64,
    /// The socket has a pending error or is closed in both directions. Otherwise the peer has only
    /// finished sending.
    pub broken: bool,
}

impl Epoll {
    /// Creates an empty instance.
    ///
    /// # Errors
    /// As epoll_create1(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Watches `socket` for the peer's FIN, for errors and for hang-up, edge-triggered.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn add(&self, socket: &impl AsFd, key: u64) -> io::Result<()> {
        let events = epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        Ok(epoll::add(&self.0, socket, epoll::EventData::new_u64(key), events)?)
    }

    /// Stops watching `socket`.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn remove(&self, socket: &impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.0, socket)?)
    }

    /// Returns pending events, at most 64, without blocking.
    ///
    /// # Errors
    /// As epoll_wait(2).
    pub fn wait(&self) -> io::Result<Vec<Hangup>> {
        let mut events = Vec::with_capacity(64);
        epoll::wait(&self.0, spare_capacity(&mut events), Some(&NO_WAIT))?;
        let broken = epoll::EventFlags::ERR | epoll::EventFlags::HUP;
        let hangup =
            |epoll::Event { flags, data, .. }| Hangup { key: data.u64(), broken: flags.intersects(broken) };
        Ok(events.into_iter().map(hangup).collect())
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Epoll {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let out = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (out, listener.accept().unwrap().0)
    }

    #[test]
    fn tcp_info_counts_received_bytes_and_one_for_the_fin() {
        let (mut out, mut inside) = pair();
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
        let (mut out, _stalled) = pair();
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

    #[test]
    fn epoll_reports_a_fin_but_no_payload() {
        let epoll = Epoll::new().unwrap();
        let (mut out, inside) = pair();
        epoll.add(&inside, 42).unwrap();
        out.write_all(b"payload").unwrap();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(epoll.wait().unwrap(), []);
        out.shutdown(std::net::Shutdown::Write).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(epoll.wait().unwrap(), [Hangup { key: 42, broken: false }]);
        epoll.remove(&inside).unwrap();
    }
}
