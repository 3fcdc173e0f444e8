//! One end of a connection: a non-blocking TCP socket that user space reads and writes, or only
//! monitors while the kernel forwards its payload.

mod read;
mod write;

use std::{
    future::poll_fn,
    io,
    net::{IpAddr, Shutdown, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{Interest as Readiness, Ready, unix::AsyncFd};

use crate::{
    net::{
        canonical,
        hangup::{HangupMonitor, HangupRegistration},
        options, source,
        syn::{ObserveSyn, parse_isn},
    },
    os::{
        poll,
        sockopt::{self, TcpInfo},
    },
};

/// The events of a socket that the session waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// User space reads the payload.
    pub read: bool,
    /// User space may have to wait until it can write.
    pub write: bool,
}

/// The delay before a socket is read again if no event will report more data.
pub const RETRY_DELAY: Duration = Duration::from_millis(1);

impl Interest {
    const ALL: Self = Self { read: true, write: true };
}

type Io = AsyncFd<Arc<Socket>>;

/// One end of a connection.
///
/// One task handles both directions of a connection by polling. Each socket therefore needs one
/// waker for reading and one for writing, and tokio has exactly these two slots. A future for each
/// wait, as `AsyncFd::ready` creates it, would cost more time per step, and memory while the
/// connection is idle.
#[derive(Debug)]
pub struct Endpoint {
    socket: Arc<Socket>,
    /// Read from the kernel when first needed; 0 means not read yet.
    cookie: AtomicU64,
    // Only `set_interest` changes these two, according to `interest`.
    io: Option<Io>,
    hangup: Option<Box<HangupRegistration<Arc<Socket>>>>,
    interest: Interest,
    /// Of a connecting socket. For an accepted socket it is read on demand.
    peer_isn: Option<u32>,
    /// The last read drained the receive queue.
    recv_drained: AtomicBool,
    /// The peer's FIN follows the data that was read last.
    fin_follows: AtomicBool,
    /// The kernel has reported an error other than by a read. It reports an error once, so the next
    /// read returns an end of file.
    error_reported: AtomicBool,
}

impl Endpoint {
    /// Takes over a connected, non-blocking socket, accepted by a listening socket with
    /// [`options::configure_listen`].
    ///
    /// # Errors
    /// When the runtime cannot register it.
    pub fn accepted(socket: Socket) -> io::Result<Self> {
        let socket = Arc::new(socket);
        let io = register(&socket, Interest::ALL)?;
        Ok(Self::connected(socket, io, None))
    }

    /// Connects to `address`, while an observer reads the peer's SYN. Dropping the future aborts
    /// the attempt. The first data sent, a delay of 200 ms or [`Endpoint::ack_now`] completes the
    /// handshake for the peer.
    ///
    /// # Errors
    /// As connect(2).
    pub async fn connect(address: SocketAddr, observe: &ObserveSyn<'_>) -> io::Result<Self> {
        Self::connect_from(None, address, observe).await
    }

    /// The same, from an address of this host.
    ///
    /// # Errors
    /// As connect(2); when this host lacks the address, an error without a number and of the kind
    /// `AddrNotAvailable`.
    pub async fn connect_from(
        source: Option<IpAddr>,
        address: SocketAddr,
        observe: &ObserveSyn<'_>,
    ) -> io::Result<Self> {
        let stream = Type::STREAM.nonblocking();
        let socket = Socket::new(Domain::for_address(address), stream, Some(Protocol::TCP))?;
        options::configure(&socket)?;
        options::disable_quickack(&socket)?;
        if let Some(source) = source {
            source::bind(&socket, source)?;
        }
        let socket = Arc::new(socket);
        let observer = observe(&socket);
        match socket.connect(&address.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
            _ => {}
        }
        let io = register(&socket, Interest::ALL)?;
        if let Some(io) = &io {
            poll_fn(|task| io.poll_write_ready(task).map_ok(drop)).await?;
        }
        match socket.take_error()? {
            Some(error) => Err(error),
            None => {
                let peer_isn = observer.and_then(|observer| observer.peer_isn());
                Ok(Self::connected(socket, io, peer_isn))
            }
        }
    }

    fn connected(socket: Arc<Socket>, io: Option<Io>, peer_isn: Option<u32>) -> Self {
        Self {
            cookie: AtomicU64::new(0),
            io,
            hangup: None,
            interest: Interest::ALL,
            peer_isn,
            recv_drained: AtomicBool::new(false),
            fin_follows: AtomicBool::new(false),
            error_reported: AtomicBool::new(false),
            socket,
        }
    }

    /// The kernel's identifier of this socket, unique until a reboot (`SO_COOKIE`).
    #[must_use]
    pub fn cookie(&self) -> u64 {
        let known = self.cookie.load(Ordering::Relaxed);
        if known != 0 {
            return known;
        }
        // This cannot fail on an open socket.
        let cookie = self.socket.cookie().unwrap_or_default();
        self.cookie.store(cookie, Ordering::Relaxed);
        cookie
    }

    /// The sequence number of the peer's SYN. For an accepted socket it can be read once, and only
    /// if the listening socket saves it ([`options::configure_listen`]).
    #[must_use]
    pub fn peer_isn(&self) -> Option<u32> {
        self.peer_isn.or_else(|| sockopt::saved_syn(&self.socket).ok().and_then(|syn| parse_isn(&syn)))
    }

    /// The local address, in its own family. For a client's socket: the address to which the client
    /// connected.
    ///
    /// # Errors
    /// As getsockname(2).
    pub fn local(&self) -> io::Result<SocketAddr> {
        let local = self.socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidInput)?;
        Ok(canonical(local))
    }

    /// Sets the events to wait for. If user space does not read the socket, `monitor` reports only
    /// its peer close, so that payload forwarded by the kernel wakes no task.
    ///
    /// # Errors
    /// When the socket cannot be registered.
    pub fn set_interest(&mut self, interest: Interest, monitor: &HangupMonitor) -> io::Result<()> {
        if interest == self.interest {
            return Ok(());
        }
        self.io = None;
        self.io = register(&self.socket, interest)?;
        if interest.read {
            self.hangup = None;
        } else if self.hangup.is_none() {
            self.hangup = Some(Box::new(monitor.add(Arc::clone(&self.socket), self.cookie())?));
        }
        self.interest = interest;
        Ok(())
    }

    /// Acknowledges received data now, and later data at once until the kernel detects an
    /// interactive session.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn ack_now(&self) -> io::Result<()> {
        // Setting it again acknowledges (__tcp_sock_set_quickack, net/ipv4/tcp.c).
        self.socket.set_tcp_quickack(true)
    }

    /// Sends data that [`Endpoint::try_write_more`] has delayed.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn push(&self) -> io::Result<()> {
        // Setting it again pushes (tcp_sock_set_nodelay, net/ipv4/tcp.c).
        self.socket.set_tcp_nodelay(true)
    }

    /// Records that the kernel has reported an error.
    fn record_error<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.inspect_err(|_| self.error_reported.store(true, Ordering::Relaxed))
    }

    /// Resolves when the peer has finished sending, as [`Endpoint::poll_finished`]. Cancel safe.
    pub async fn finished(&self) {
        poll_fn(|task| self.poll_finished(task)).await;
    }

    /// Ready when the peer has finished sending, for a socket that user space does not read.
    pub fn poll_finished(&self, task: &mut Context<'_>) -> Poll<()> {
        self.hangup.as_ref().map_or(Poll::Pending, |hangup| hangup.poll_finished(task))
    }

    /// Resolves when the connection breaks, as [`Endpoint::poll_closed`]. Cancel safe.
    pub async fn closed(&self) -> Option<io::Error> {
        poll_fn(|task| self.poll_closed(task)).await
    }

    /// Ready with an error when the connection is broken, or without one when both sides have
    /// finished. It clears the runtime's write readiness: call it before writing.
    pub fn poll_closed(&self, task: &mut Context<'_>) -> Poll<Option<io::Error>> {
        if let Some(hangup) = &self.hangup {
            ready!(hangup.poll_broken(task));
        } else if let Some(io) = &self.io {
            // An error of the readiness means that the runtime shuts down; treat it as broken.
            while let Ok(mut ready) = ready!(io.poll_write_ready(task)) {
                if ready.ready().is_write_closed() {
                    break;
                }
                ready.clear_ready_matching(Ready::WRITABLE);
            }
        } else {
            return Poll::Pending;
        }
        let error = self.socket.take_error().unwrap_or_else(Some);
        self.error_reported.fetch_or(error.is_some(), Ordering::Relaxed);
        Poll::Ready(error)
    }

    /// Sends a FIN.
    ///
    /// # Errors
    /// As shutdown(2).
    pub fn finish(&self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }

    /// Waits until the peer has acknowledged all data, or has acknowledged nothing for `timeout`, or
    /// the connection is gone.
    pub async fn wait_acked(&self, timeout: Duration) {
        let (mut left, mut since) = (u64::MAX, Instant::now());
        let mut pause = Duration::from_millis(1);
        // The queue of a connection that has failed stays as it was.
        while sockopt::tcp_info(&self.socket).is_ok_and(|info| info.state != TcpInfo::CLOSE) {
            match sockopt::unacknowledged(&self.socket) {
                Ok(0) | Err(_) => return,
                Ok(bytes) if bytes < left => (left, since) = (bytes, Instant::now()),
                Ok(_) if since.elapsed() >= timeout => return,
                Ok(_) => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// As [`options::set_peer_timeouts`].
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn set_peer_timeouts(&self, user_timeout: Duration, keepalive: Duration) -> io::Result<()> {
        options::set_peer_timeouts(&self.socket, user_timeout, keepalive)
    }

    /// Closes with a RST, so that the peer does not take partial data as complete. Discards unsent
    /// data.
    pub fn reset(self) {
        // If this fails, the connection is already gone.
        let _ = self.socket.set_linger(Some(Duration::ZERO));
    }

    /// As [`Endpoint::reset`], after sending delayed data.
    pub fn push_and_reset(self) {
        // If this fails, no data can be sent.
        let _ = self.push();
        self.reset();
    }
}

impl AsFd for Endpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Endpoint {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn register(socket: &Arc<Socket>, interest: Interest) -> io::Result<Option<Io>> {
    let interest = match interest {
        Interest { read: true, write: true } => Readiness::READABLE | Readiness::WRITABLE,
        Interest { read: true, write: false } => Readiness::READABLE,
        Interest { read: false, write: true } => Readiness::WRITABLE,
        Interest { read: false, write: false } => return Ok(None),
    };
    poll::register(Arc::clone(socket), interest | Readiness::ERROR).map(Some)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::AsyncReadExt as _,
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::net::syn::no_observer;

    async fn pair() -> (Endpoint, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = Endpoint::connect(listener.local_addr().unwrap(), &no_observer).await.unwrap();
        ours.ack_now().unwrap();
        (ours, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn delayed_data_is_sent_by_push_and_reset_and_discarded_by_reset() {
        let mut seen = [0; 9];
        let (ours, mut peer) = pair().await;
        assert_eq!(ours.try_write_more(b"221 bye\r\n").unwrap(), 9);
        ours.push_and_reset();
        peer.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"221 bye\r\n");
        assert_eq!(peer.read(&mut seen).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let (ours, mut peer) = pair().await;
        assert_eq!(ours.try_write_more(b"no header").unwrap(), 9);
        ours.reset();
        assert_eq!(peer.read(&mut seen).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_slow_reader_is_waited_for_and_a_failed_connection_is_not() {
        const LIMIT: Duration = Duration::from_millis(400);
        let (ours, mut peer) = pair().await;
        while ours.try_write(&[7; 1 << 16]).unwrap() > 0 {}
        let reading = tokio::spawn(async move {
            let mut buffer = vec![0; 1 << 20];
            tokio::time::sleep(LIMIT / 2).await;
            while peer.read(&mut buffer).await.unwrap() > 0 {
                tokio::time::sleep(LIMIT / 4).await;
            }
        });
        ours.finish().unwrap();
        ours.wait_acked(LIMIT).await;
        assert_eq!(sockopt::unacknowledged(&ours).unwrap(), 0);
        drop(ours);
        reading.await.unwrap();

        let (ours, peer) = pair().await;
        while ours.try_write(&[7; 1 << 16]).unwrap() > 0 {}
        peer.set_zero_linger().unwrap();
        drop(peer);
        let began = Instant::now();
        ours.wait_acked(Duration::from_secs(20)).await;
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn the_last_payload_is_marked_by_the_fin_that_follows() {
        let (ours, peer) = pair().await;
        let peer = peer.into_std().unwrap();
        let (first, last) = (b"250 go on\r\n", b"221 bye\r\n");
        peer.set_nonblocking(false).unwrap();
        Socket::from(peer.try_clone().unwrap()).send(first).unwrap();
        assert_eq!(ours.read(<[u8]>::len).await.unwrap(), first.len());
        assert!(!ours.fin_follows());
        let peer = Socket::from(peer);
        peer.send_with_flags(last, libc::MSG_MORE).unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        assert_eq!(ours.read(<[u8]>::len).await.unwrap(), last.len());
        assert!(ours.fin_follows());
        assert_eq!(ours.read(<[u8]>::len).await.unwrap(), 0);
    }
}
