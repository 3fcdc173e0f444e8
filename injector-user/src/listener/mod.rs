//! Listening sockets, and who is let in: limits decide before a backend is touched.

pub mod connection_limit;

use std::{
    io::{self, Read as _},
    net::{Shutdown, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::Timeouts,
    listener::connection_limit::{ConnectionLimit, ConnectionPermit},
    net::{options, socket::Endpoint, splice_pipe as pipe},
    os::poll,
    protocol::Refusal,
    session::{self, Context},
    telemetry::{log::target, metrics::RejectReason},
};

/// Descriptors that the daemon needs for itself: maps, programs, devices, metrics, logs, pipes.
const DAEMON_FDS: u64 = 128 + 2 * pipe::MAX_PIPES as u64;
/// A listening socket has a [`ReserveFd`].
const FDS_PER_LISTEN_SOCKET: u64 = 2;
/// Epoll instances, what wakes them, and a watch.
const FDS_PER_WORKER: u64 = 6;
/// A connection has two sockets.
const FDS_PER_CONNECTION: u64 = 2;
/// How many clients are turned away politely at one time; the others are reset.
const MAX_PROTOCOL_REJECTIONS: usize = 256;
/// Pause after an accept that failed for want of descriptors or memory, with no [`ReserveFd`] left to make connections.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(50);
/// How often at most it is said that there is no room.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);
/// Connections that wait to be accepted; the kernel caps it at net.core.somaxconn.
const LISTEN_BACKLOG: i32 = 4096;

/// Why an address cannot be listened on.
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
/// [`BindError`], with what to do about it.
pub fn bind(address: SocketAddr) -> Result<Socket, BindError> {
    let bind = || {
        let socket = bound_socket(address, false)?;
        socket.listen(LISTEN_BACKLOG)?;
        Ok(socket)
    };
    bind().map_err(|error| BindError { address, error })
}

/// Listens on `address` with a socket for each worker, over which the kernel spreads clients.
///
/// # Errors
/// [`BindError`], with what to do about it.
pub fn bind_reuseport(
    address: SocketAddr,
    workers: usize,
    timeouts: &Timeouts,
) -> Result<Vec<Socket>, BindError> {
    let bind = || {
        // Sockets that share their port share it with another daemon's that do as well: first see whether it is free.
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
    // A restart must not wait for the connections of the last run to leave TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    options::configure_listen(&socket)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Readies a socket that somebody else listens with (systemd), for each worker to accept from: one queue, and whoever is
/// free takes the next.
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

/// How many connections `nofile` descriptors are good for, with so many listening sockets and workers.
#[must_use]
pub fn connection_capacity(nofile: u64, listen_sockets: usize, workers: usize) -> usize {
    let connections = nofile.saturating_sub(overhead(listen_sockets, workers)) / FDS_PER_CONNECTION;
    usize::try_from(connections).unwrap_or(usize::MAX)
}

/// How many descriptors so many connections need.
#[must_use]
pub fn required_fds(connections: usize, listen_sockets: usize, workers: usize) -> u64 {
    overhead(listen_sockets, workers).saturating_add((connections as u64).saturating_mul(FDS_PER_CONNECTION))
}

fn overhead(listen_sockets: usize, workers: usize) -> u64 {
    DAEMON_FDS + FDS_PER_LISTEN_SOCKET * listen_sockets as u64 + FDS_PER_WORKER * workers as u64
}

/// The limits on connections over all listeners.
#[derive(Clone, Debug)]
pub struct GlobalLimit(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    connections: Arc<ConnectionLimit>,
    /// Whether descriptors run out before the operator's limit is reached.
    fds_are_tighter: AtomicBool,
    rejections: Arc<Semaphore>,
    exhaustion_warning: FdExhaustionWarning,
}

impl GlobalLimit {
    /// At most `connections`, fewer if the descriptors do not carry them.
    #[must_use]
    pub fn new(connections: usize, capacity: usize) -> Self {
        let limits = Self(Arc::new(Shared {
            connections: ConnectionLimit::new(None),
            fds_are_tighter: AtomicBool::new(false),
            rejections: Arc::new(Semaphore::new(MAX_PROTOCOL_REJECTIONS)),
            exhaustion_warning: FdExhaustionWarning::default(),
        }));
        limits.resize(connections, capacity);
        limits
    }

    /// The same for other numbers. Who is there stays.
    pub fn resize(&self, connections: usize, capacity: usize) {
        self.0.connections.resize(Some(connections.min(capacity)));
        self.0.fds_are_tighter.store(capacity < connections, Ordering::Relaxed);
    }

    /// How many there are.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.0.connections.in_use()
    }

    /// What the limit stands for: the operator's will, or the descriptors.
    fn reason(&self) -> RejectReason {
        if self.0.fds_are_tighter.load(Ordering::Relaxed) {
            RejectReason::NoDescriptors
        } else {
            RejectReason::TooManyConnections
        }
    }
}

/// What decides over the connections of one listener on one worker. It can be changed while its doors are open.
#[derive(Debug)]
pub struct AdmissionPolicy {
    /// What those share that are let in from now on.
    context: RwLock<Arc<Context>>,
    /// The listener's own limit.
    own: Arc<ConnectionLimit>,
    /// Nobody is let in.
    draining: AtomicBool,
}

impl AdmissionPolicy {
    /// Lets everybody in.
    #[must_use]
    pub fn new(context: Arc<Context>, own: Arc<ConnectionLimit>) -> Self {
        Self { context: RwLock::new(context), own, draining: AtomicBool::new(false) }
    }

    /// For those that are let in from now on.
    pub fn replace_context(&self, context: Arc<Context>) {
        *self.context.write().unwrap_or_else(PoisonError::into_inner) = context;
    }

    /// Turns everybody away, or lets them in again.
    pub fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::Relaxed);
    }

    fn context(&self) -> Arc<Context> {
        Arc::clone(&self.context.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Whose a listening socket is. It can be handed to another listener: closing it and opening another would reset clients that
/// the kernel has let in and nobody has accepted yet.
#[derive(Debug)]
pub struct SocketOwner(RwLock<Arc<AdmissionPolicy>>);

impl SocketOwner {
    /// The listener with this policy.
    #[must_use]
    pub fn new(policy: Arc<AdmissionPolicy>) -> Self {
        Self(RwLock::new(policy))
    }

    /// Another one, for the clients that are accepted from now on.
    pub fn replace_policy(&self, policy: Arc<AdmissionPolicy>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    fn policy(&self) -> Arc<AdmissionPolicy> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One listening socket's way in.
#[derive(Clone, Debug)]
pub struct Acceptor {
    /// Whose it is.
    pub owner: Arc<SocketOwner>,
    /// The limits of the whole daemon.
    pub limits: GlobalLimit,
    /// The connections that are served.
    pub sessions: TaskTracker,
    /// Cancelled when no more may come.
    pub stop: CancellationToken,
}

/// What an admitted connection holds until its end.
#[derive(Debug)]
struct ConnectionPermits {
    _total: ConnectionPermit,
    _own: ConnectionPermit,
}

impl Acceptor {
    /// Accepts on `socket` until the stop, and turns away politely who is still waiting then.
    pub async fn run(self, socket: Socket) {
        let address = socket.local_addr().ok().and_then(|address| address.as_socket());
        let socket = match poll::register(socket, Interest::READABLE) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::error!(target: target::LISTENER,
                    listener = &*self.owner.policy().context().listener,
                    address = address.map(tracing::field::display),
                    %error,
                    "accept loop failed; this address accepts no connections until a restart"
                );
                return;
            }
        };
        let mut reserve = ReserveFd::new(socket.get_ref());
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                accepted = accept(&socket) => accepted,
            };
            match accepted {
                Ok(client) if reserve.refill(socket.get_ref()) => self.admit(client),
                Ok(client) => {
                    let context = self.owner.policy().context();
                    self.limits.0.exhaustion_warning.log(&context.listener);
                    reject_without_fd(&context, client);
                    reserve.refill(socket.get_ref());
                }
                Err(error) if is_fd_exhaustion(&error) => {
                    self.limits.0.exhaustion_warning.log(&self.owner.policy().context().listener);
                    if !reserve.release() {
                        tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                    }
                }
                // The client has gone meanwhile, or the network had news of it (accept(2)).
                Err(error) => {
                    tracing::debug!(target: target::LISTENER, listener = &*self.owner.policy().context().listener, %error, "accepting a connection failed; retrying")
                }
            }
        }
        let context = self.owner.policy().context();
        while let Ok(client) = accept_now(socket.get_ref()) {
            context.metrics.accepted();
            self.reject(&context, client, RejectReason::Stopping, Refusal::Stopping);
        }
    }

    fn admit(&self, client: Accepted) {
        let policy = self.owner.policy();
        let context = policy.context();
        context.metrics.accepted();
        if policy.draining.load(Ordering::Relaxed) {
            return self.reject(&context, client, RejectReason::Draining, Refusal::Stopping);
        }
        let permits = match self.acquire_permits(&policy) {
            Ok(permits) => permits,
            Err(reason) => return self.reject(&context, client, reason, Refusal::TooManyConnections),
        };
        let active = context.metrics.active();
        // On the heap: on its way into a task, and out of it at the end, a future is copied nine times.
        let session = session::serve(context, client.socket, client.peer, (active, permits));
        self.sessions.spawn(Box::pin(session));
    }

    fn acquire_permits(&self, policy: &AdmissionPolicy) -> Result<ConnectionPermits, RejectReason> {
        let own = policy.own.try_acquire().ok_or(RejectReason::TooManyConnections)?;
        let total = self.limits.0.connections.try_acquire().ok_or_else(|| self.limits.reason())?;
        Ok(ConnectionPermits { _total: total, _own: own })
    }

    fn reject(&self, context: &Arc<Context>, client: Accepted, reason: RejectReason, why: Refusal) {
        let context = Arc::clone(context);
        context.metrics.rejected(reason);
        tracing::debug!(target: target::LISTENER, listener = &*context.listener, reason = reason.name(), "connection rejected");
        let rejections = Arc::clone(&self.limits.0.rejections).try_acquire_owned();
        self.sessions.spawn(async move {
            let Ok(client) = Endpoint::accepted(client.socket) else { return };
            match rejections {
                Ok(_permit) => session::reject(client, context.protocol, why).await,
                Err(_) => client.reset(),
            }
        });
    }
}

/// Turns away without keeping the client's descriptor for a moment longer, as there is no other.
fn reject_without_fd(context: &Context, client: Accepted) {
    let client = client.socket;
    context.metrics.accepted();
    context.metrics.rejected(RejectReason::NoDescriptors);
    let line = context.protocol.refusal(Refusal::TooManyConnections);
    let last_warning = line.is_some_and(|line| {
        client.send_with_flags(line, libc::MSG_NOSIGNAL).is_ok() && client.shutdown(Shutdown::Write).is_ok()
    });
    if last_warning {
        // Closing with unread bytes would send a reset, which can overtake the line.
        while (&client).read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
    } else {
        // If it fails, the client has gone.
        let _ = client.set_linger(Some(Duration::ZERO));
    }
}

/// The next client. Cancel safe.
async fn accept(socket: &AsyncFd<Socket>) -> io::Result<Accepted> {
    loop {
        let mut ready = socket.readable().await?;
        match ready.try_io(|socket| accept_now(socket.get_ref())) {
            // The kernel looks for a descriptor before it looks for a client (__sys_accept4_file, net/socket.c).
            Ok(Err(error)) if is_fd_exhaustion(&error) && !poll::readable_now(socket)? => ready.clear_ready(),
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

/// A client that waits, as a non-blocking socket.
fn accept_now(socket: &Socket) -> io::Result<Accepted> {
    let (client, peer) = acceptfrom_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok()).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Accepted { socket: client.into(), peer })
}

/// A client's connection.
#[derive(Debug)]
struct Accepted {
    socket: Socket,
    peer: SocketAddr,
}

/// A descriptor kept for the moment when there are no others: without one, nobody could even be told to come back later,
/// and clients would wait in the kernel's queue until they give up.
#[derive(Debug)]
struct ReserveFd(Option<Socket>);

impl ReserveFd {
    /// Any descriptor will do; one more of this socket costs nothing else.
    fn new(socket: &Socket) -> Self {
        Self(socket.try_clone().ok())
    }

    /// Whether it is there, having been taken again if that was possible.
    fn refill(&mut self, socket: &Socket) -> bool {
        if self.0.is_none() {
            *self = Self::new(socket);
        }
        self.0.is_some()
    }

    /// Makes room for one client; `false` if there was none to make.
    fn release(&mut self) -> bool {
        self.0.take().is_some()
    }
}

/// Says that there is no room, and not with every client.
#[derive(Debug, Default)]
struct FdExhaustionWarning {
    last_warning: Mutex<Option<Instant>>,
}

impl FdExhaustionWarning {
    fn log(&self, listener: &str) {
        let mut last_warning = self.last_warning.lock().unwrap_or_else(PoisonError::into_inner);
        if last_warning.is_none_or(|last_warning| last_warning.elapsed() >= WARNING_INTERVAL) {
            *last_warning = Some(Instant::now());
            tracing::warn!(target: target::LISTENER,
                listener,
                "no file descriptors left; new connections are rejected: raise the open-file limit (LimitNOFILE= in \
                 systemd, ulimit -n) or lower limits.max_connections"
            );
        }
    }
}

fn is_fd_exhaustion(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_bound_the_connections() {
        for (nofile, connections) in [(0, 0), (192, 0), (200, 0), (201, 0), (202, 1), (20_200, 10_000)] {
            assert_eq!(connection_capacity(nofile, 1, 1), connections, "{nofile}");
        }
        // Eight addresses, two workers.
        assert_eq!((required_fds(10_000, 16, 2), connection_capacity(20_236, 16, 2)), (20_236, 10_000));
    }

    #[test]
    fn the_reason_of_the_limit_is_the_tighter_bound() {
        assert_eq!(GlobalLimit::new(10, 400).reason(), RejectReason::TooManyConnections);
        assert_eq!(GlobalLimit::new(10_000, 400).reason(), RejectReason::NoDescriptors);
    }

    #[test]
    fn a_port_in_use_is_named_with_advice() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let error = bind(taken.local_addr().unwrap()).unwrap_err().to_string();
        assert!(error.contains("another program listens there"), "{error}");
    }

    #[test]
    fn a_port_of_another_daemon_is_not_shared() {
        let text = "[[listener]]\nname = \"a\"\nbind = [\"127.0.0.1:1\"]\nprotocol = \"smtp\"\n\
                    backends = [\"127.0.0.1:2\"]\n";
        let timeouts = crate::config::Config::parse(text, "test.toml").unwrap().listeners[0].timeouts;
        let ours = bind_reuseport("127.0.0.1:0".parse().unwrap(), 3, &timeouts).unwrap();
        let address = ours[0].local_addr().unwrap().as_socket().unwrap();
        assert!(ours.iter().all(|socket| socket.local_addr().unwrap().as_socket() == Some(address)));
        let error = bind_reuseport(address, 3, &timeouts).unwrap_err().to_string();
        assert!(error.contains("another program listens there"), "{error}");
    }

    #[test]
    fn an_address_of_another_machine_is_named_with_advice() {
        let error = bind("192.0.2.1:0".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("no interface of this machine"), "{error}");
    }
}
