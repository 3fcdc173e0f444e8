//! The accept loop of a listening socket.

use std::{
    cell::LazyCell,
    io::{self, Read as _},
    net::{IpAddr, Shutdown, SocketAddr},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::Socket;
use tokio::io::{Interest, unix::AsyncFd};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    admission::{AdmissionPolicy, ConnectionPermits, GlobalLimit, SocketOwner},
    rejections::Refusal,
    reserve_fd::{ReserveFd, is_fd_exhaustion},
};
use crate::{
    config::Network,
    guard::{Guard, NotBannedSources},
    net::{canonical, socket::Endpoint},
    os::{clock, poll},
    protocol::Rejection,
    session::{self, Context},
    telemetry::{log::target, metrics::RejectReason},
};

/// Pause after an accept that failed because file descriptors or memory were exhausted, and the
/// [`ReserveFd`] was already released.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(50);

/// Accepts the connections of one listening socket.
#[derive(Clone, Debug)]
pub struct Acceptor {
    /// The listener that owns the socket.
    pub owner: Arc<SocketOwner>,
    /// The limit of the whole daemon.
    pub limit: GlobalLimit,
    /// Tracks the sessions that this acceptor starts.
    pub sessions: TaskTracker,
    /// Cancelled when the socket must accept no more connections.
    pub stop: CancellationToken,
}

impl Acceptor {
    /// Accepts on `socket` until `stop` is cancelled, then rejects the clients that still wait.
    pub async fn run(self, socket: Socket) {
        let address = socket.local_addr().ok().and_then(|address| address.as_socket());
        let socket = match poll::register(socket, Interest::READABLE) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::error!(target: target::LISTENER,
                    listener = &*self.owner.policy().context().listener,
                    address = address.map(tracing::field::display),
                    %error,
                    "accept loop failed; one worker accepts no connections on this address until a restart"
                );
                return;
            }
        };
        let mut reserve = ReserveFd::new(socket.get_ref());
        let mut not_banned = NotBannedSources::default();
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                accepted = accept(&socket) => accepted,
            };
            match accepted {
                Ok(client) if reserve.refill(socket.get_ref()) => self.admit(client, &mut not_banned),
                Ok(client) => {
                    let context = self.owner.policy().context();
                    self.limit.0.exhaustion_warning.log(&context.listener, address);
                    let refusal = Refusal::from(RejectReason::NoDescriptors);
                    self.limit.0.rejection_log.log(&context, client.peer, &client.socket, refusal);
                    reject_without_fd(&context, client);
                    reserve.refill(socket.get_ref());
                }
                Err(error) if is_fd_exhaustion(&error) => {
                    self.limit.0.exhaustion_warning.log(&self.owner.policy().context().listener, address);
                    if !reserve.release() {
                        tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                    }
                }
                // The client has closed in the meantime, or the network reported an error
                // (accept(2)).
                Err(error) => {
                    tracing::debug!(
                        target: target::LISTENER,
                        listener = &*self.owner.policy().context().listener,
                        %error,
                        "accepting a connection failed; retrying"
                    );
                }
            }
        }
        let context = self.owner.policy().context();
        while let Ok(client) = accept_now(socket.get_ref()) {
            context.metrics.accepted();
            self.reject(&context, client, RejectReason::Stopping.into());
        }
    }

    fn admit(&self, client: Accepted, not_banned: &mut NotBannedSources) {
        let policy = self.owner.policy();
        let context = policy.context();
        context.metrics.accepted();
        let is_banned = |bans: &Guard| not_banned.is_banned(bans, client.peer.ip());
        if self.limit.0.bans.as_ref().is_some_and(is_banned) {
            return self.reset(&context, &client, RejectReason::Banned);
        }
        if policy.draining.load(Ordering::Relaxed) {
            return self.reject(&context, client, RejectReason::Draining.into());
        }
        if Network::any_contains(&context.translated_sources, client.peer.ip()) {
            return self.reject(&context, client, RejectReason::TranslatedSource.into());
        }
        let permits = match self.acquire_permits(&policy, client.peer.ip()) {
            Ok(permits) => permits,
            Err(refusal) => return self.reject(&context, client, refusal),
        };
        let active = context.metrics.active();
        // On the heap, because a future is copied nine times on its way into a task and out of it.
        let session = session::serve(context, client.socket, client.peer, (active, permits));
        self.sessions.spawn(Box::pin(session));
    }

    /// The limits on its source come first: what one source has too many of is no shortage for others.
    fn acquire_permits(
        &self,
        policy: &AdmissionPolicy,
        client: IpAddr,
    ) -> Result<ConnectionPermits, Refusal> {
        // For both limits, and only if there is one.
        let is_allowed =
            LazyCell::new(|| self.limit.0.bans.as_ref().is_some_and(|bans| bans.is_allowed(client)));
        let own_source = policy.source_limit.try_acquire(client, || *is_allowed, clock::monotonic_ns)?;
        let source = self.limit.0.sources.try_acquire(client, || *is_allowed, clock::monotonic_ns)?;
        let own = policy.listener_limit.try_acquire().ok_or(RejectReason::TooManyConnections)?;
        let total = self.limit.0.connections.try_acquire().ok_or_else(|| self.limit.reason())?;
        Ok(ConnectionPermits { _total: total, _own: own, _source: [own_source, source] })
    }

    /// Rejects a client without a byte.
    fn reset(&self, context: &Context, client: &Accepted, reason: RejectReason) {
        context.metrics.rejected(reason);
        self.limit.0.rejection_log.log(context, client.peer, &client.socket, reason.into());
        // An error means that the client has closed already.
        let _ = client.socket.set_linger(Some(Duration::ZERO));
    }

    fn reject(&self, context: &Arc<Context>, client: Accepted, refusal: Refusal) {
        let context = Arc::clone(context);
        let rejection = refusal.rejection();
        context.metrics.rejected(refusal.reason);
        self.limit.0.rejection_log.log(&context, client.peer, &client.socket, refusal);
        let of_source = refusal.of_source.is_some();
        let limit = if of_source { &self.limit.0.source_rejections } else { &self.limit.0.rejections };
        let permit = Arc::clone(limit).try_acquire_owned();
        self.sessions.spawn(async move {
            let Ok(client) = Endpoint::accepted(client.socket) else { return };
            match permit {
                Ok(_permit) => session::reject(client, context.protocol, rejection).await,
                Err(_) => client.reset(),
            }
        });
    }
}

/// Rejects a client without waiting, because its file descriptor was the last one.
fn reject_without_fd(context: &Context, client: Accepted) {
    let client = client.socket;
    context.metrics.accepted();
    context.metrics.rejected(RejectReason::NoDescriptors);
    let line = context.protocol.rejection_line(Rejection::TooManyConnections);
    let sent = line.is_some_and(|line| {
        client.send_with_flags(line, libc::MSG_NOSIGNAL).is_ok() && client.shutdown(Shutdown::Write).is_ok()
    });
    if sent {
        // Closing a socket with unread bytes sends a reset, which can overtake the line.
        while (&client).read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
    } else {
        // An error means that the client has closed already.
        let _ = client.set_linger(Some(Duration::ZERO));
    }
}

/// Waits for the next client. Cancel safe.
async fn accept(socket: &AsyncFd<Socket>) -> io::Result<Accepted> {
    loop {
        let mut ready = socket.readable().await?;
        match ready.try_io(|socket| accept_now(socket.get_ref())) {
            // The kernel allocates a file descriptor before it looks for a client, so this error
            // may mean that no client waits (__sys_accept4_file, net/socket.c).
            Ok(Err(error)) if is_fd_exhaustion(&error) && !poll::readable_now(socket)? => ready.clear_ready(),
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

/// Accepts a waiting client, as a non-blocking socket.
fn accept_now(socket: &Socket) -> io::Result<Accepted> {
    let (client, peer) = acceptfrom_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok()).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Accepted { socket: client.into(), peer: canonical(peer) })
}

/// An accepted connection.
#[derive(Debug)]
struct Accepted {
    socket: Socket,
    /// The client's address, in its own family.
    peer: SocketAddr,
}
