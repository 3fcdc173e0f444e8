//! The accept loop of a listening socket.

use std::{
    io::{self, Read as _},
    net::{Shutdown, SocketAddr},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::Socket;
use tokio::io::{Interest, unix::AsyncFd};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    admission::{AdmissionPolicy, ConnectionPermits, GlobalLimit, SocketOwner},
    reserve_fd::{ReserveFd, is_fd_exhaustion},
};
use crate::{
    net::socket::Endpoint,
    os::poll,
    protocol::Refusal,
    session::{self, Context},
    telemetry::{log::target, metrics::RejectReason},
};

/// Pause after an accept that failed for want of descriptors or memory, with no [`ReserveFd`] left to make connections.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(50);

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
