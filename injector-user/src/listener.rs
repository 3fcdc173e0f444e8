//! Listening sockets, and who is let in: limits decide before a backend is touched.

use std::{
    io::{self, Read as _},
    net::{Shutdown, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    endpoint::{self, Endpoint},
    metrics::RefusedReason,
    pipe,
    protocol::Refusal,
    session::{self, Context},
    sys,
};

/// Descriptors that the daemon needs for itself: listeners, maps, programs, epoll, metrics, logs, pipes.
const DESCRIPTORS_OF_OUR_OWN: u64 = 128 + 2 * pipe::MOST as u64;
/// A connection has two sockets.
const DESCRIPTORS_PER_CONNECTION: u64 = 2;
/// How many clients are turned away politely at one time; the others are reset.
const POLITE_REFUSALS: usize = 256;
/// Pause after an accept that failed for want of descriptors or memory, with no [`Spare`] left to make room.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often at most one listening socket says that there is no room.
const SHORTAGE_EVERY: Duration = Duration::from_secs(10);
/// Connections that wait to be accepted; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// Why an address cannot be listened on.
#[derive(Debug, Error)]
#[error("cannot listen on {address}: {error}{}", advice(.error))]
pub struct BindError {
    address: SocketAddr,
    #[source]
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
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        // A restart must not wait for the connections of the last run to leave TIME_WAIT.
        socket.set_reuse_address(true)?;
        endpoint::accepts(&socket)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    };
    bind().map_err(|error| BindError { address, error })
}

/// How many connections `nofile` descriptors are good for.
#[must_use]
pub fn connections_for(nofile: u64) -> usize {
    let connections = nofile.saturating_sub(DESCRIPTORS_OF_OUR_OWN) / DESCRIPTORS_PER_CONNECTION;
    usize::try_from(connections).unwrap_or(usize::MAX)
}

/// The limits on connections over all listeners.
#[derive(Clone, Debug)]
pub struct Limits {
    total: Arc<Semaphore>,
    /// What the total stands for: the operator's limit, or the descriptors.
    total_reason: RefusedReason,
    polite: Arc<Semaphore>,
}

impl Limits {
    /// At most `connections`, fewer if `nofile` descriptors do not carry them.
    #[must_use]
    pub fn new(connections: usize, nofile: u64) -> Self {
        let carried = connections_for(nofile);
        let total_reason = if carried < connections {
            RefusedReason::NoDescriptors
        } else {
            RefusedReason::TooManyConnections
        };
        let total = connections.min(carried).min(Semaphore::MAX_PERMITS);
        Self {
            total: Arc::new(Semaphore::new(total)),
            total_reason,
            polite: Arc::new(Semaphore::new(POLITE_REFUSALS)),
        }
    }
}

/// One listener's door.
#[derive(Clone, Debug)]
pub struct Door {
    /// What its connections share.
    pub context: Arc<Context>,
    /// The limits of the whole daemon.
    pub limits: Limits,
    /// The listener's own.
    pub own: Option<Arc<Semaphore>>,
    /// The connections that are served.
    pub sessions: TaskTracker,
    /// Cancelled when no more may come.
    pub stop: CancellationToken,
}

/// What an admitted connection holds until its end.
#[derive(Debug)]
struct Admitted {
    _total: OwnedSemaphorePermit,
    _own: Option<OwnedSemaphorePermit>,
}

impl Door {
    /// Accepts on `socket` until the stop, and turns away politely who is still waiting then.
    ///
    /// # Errors
    /// When the runtime cannot poll the socket.
    pub async fn keep_open(self, socket: Socket) -> io::Result<()> {
        let socket = sys::poll(socket, Interest::READABLE)?;
        let mut spare = Spare::kept_of(socket.get_ref());
        let mut shortage = Shortage::default();
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                accepted = accept(&socket) => accepted,
            };
            match accepted {
                Ok(client) if spare.keep(socket.get_ref()) => self.let_in(client),
                Ok(client) => {
                    shortage.tell(&self.context.listener);
                    self.turn_away_at_once(client);
                    spare.keep(socket.get_ref());
                }
                Err(error) if no_room(&error) => {
                    shortage.tell(&self.context.listener);
                    if !spare.give_up() {
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
                // The client has gone meanwhile, or the network had news of it (accept(2)).
                Err(error) => tracing::debug!(listener = self.context.listener, %error, "accept"),
            }
        }
        while let Ok((client, _)) = socket.get_ref().accept() {
            self.context.metrics.accepted();
            self.turn_away(client, RefusedReason::Stopping, Refusal::Stopping);
        }
        Ok(())
    }

    fn let_in(&self, client: Socket) {
        let metrics = &self.context.metrics;
        metrics.accepted();
        let admitted = match self.admit() {
            Ok(admitted) => admitted,
            Err(reason) => return self.turn_away(client, reason, Refusal::TooManyConnections),
        };
        let context = Arc::clone(&self.context);
        let active = metrics.active();
        self.sessions.spawn(async move {
            match Endpoint::accepted(client, &context.watch) {
                Ok(client) => session::serve(&context, client).await,
                // Reset between the handshake and the accept.
                Err(error) => {
                    tracing::debug!(listener = context.listener, %error, "gone before it was served")
                }
            }
            drop((active, admitted));
        });
    }

    /// Turns away without keeping the client's descriptor for a moment longer, as there is no other.
    fn turn_away_at_once(&self, client: Socket) {
        let metrics = &self.context.metrics;
        metrics.accepted();
        metrics.refused(RefusedReason::NoDescriptors);
        let line = self.context.protocol.refusal(Refusal::TooManyConnections);
        let told = line.is_some_and(|line| {
            client.set_nonblocking(true).is_ok()
                && client.send_with_flags(line, libc::MSG_NOSIGNAL).is_ok()
                && client.shutdown(Shutdown::Write).is_ok()
        });
        if told {
            // Closing with unread bytes would send a reset, which can overtake the line.
            while (&client).read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
        } else {
            // If it fails, the client has gone.
            let _ = client.set_linger(Some(Duration::ZERO));
        }
    }

    fn admit(&self) -> Result<Admitted, RefusedReason> {
        let own = match &self.own {
            Some(own) => {
                Some(Arc::clone(own).try_acquire_owned().map_err(|_| RefusedReason::TooManyConnections)?)
            }
            None => None,
        };
        let total =
            Arc::clone(&self.limits.total).try_acquire_owned().map_err(|_| self.limits.total_reason)?;
        Ok(Admitted { _total: total, _own: own })
    }

    fn turn_away(&self, client: Socket, reason: RefusedReason, why: Refusal) {
        let context = Arc::clone(&self.context);
        context.metrics.refused(reason);
        tracing::debug!(listener = context.listener, reason = reason.name(), "refused");
        let polite = Arc::clone(&self.limits.polite).try_acquire_owned();
        self.sessions.spawn(async move {
            let Ok(client) = Endpoint::accepted(client, &context.watch) else { return };
            match polite {
                Ok(_permit) => session::refuse(client, context.protocol, why).await,
                Err(_) => client.reset(),
            }
        });
    }
}

/// The next client. Cancel safe.
async fn accept(socket: &AsyncFd<Socket>) -> io::Result<Socket> {
    loop {
        let mut ready = socket.readable().await?;
        match ready.try_io(|socket| socket.get_ref().accept()) {
            // The kernel looks for a descriptor before it looks for a client (__sys_accept4_file, net/socket.c).
            Ok(Err(error)) if no_room(&error) && !sys::readable_now(socket)? => ready.clear_ready(),
            Ok(result) => return result.map(|(client, _)| client),
            Err(_would_block) => {}
        }
    }
}

/// A descriptor kept for the moment when there are no others: without one, nobody could even be told to come back later,
/// and clients would wait in the kernel's queue until they give up.
#[derive(Debug)]
struct Spare(Option<Socket>);

impl Spare {
    /// Any descriptor will do; one more of this socket costs nothing else.
    fn kept_of(socket: &Socket) -> Self {
        Self(socket.try_clone().ok())
    }

    /// Whether it is there, having been taken again if that was possible.
    fn keep(&mut self, socket: &Socket) -> bool {
        if self.0.is_none() {
            *self = Self::kept_of(socket);
        }
        self.0.is_some()
    }

    /// Makes room for one client; `false` if there was none to make.
    fn give_up(&mut self) -> bool {
        self.0.take().is_some()
    }
}

/// Says that there is no room, and not with every client.
#[derive(Debug, Default)]
struct Shortage {
    told: Option<Instant>,
}

impl Shortage {
    fn tell(&mut self, listener: &str) {
        if self.told.is_none_or(|told| told.elapsed() >= SHORTAGE_EVERY) {
            self.told = Some(Instant::now());
            tracing::warn!(
                listener,
                "no file descriptors are left, clients are turned away: lower limits.max_connections or raise the \
                 limit of open files"
            );
        }
    }
}

fn no_room(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_bound_the_connections() {
        for (nofile, connections) in [(0, 0), (192, 0), (193, 0), (194, 1), (1024, 416), (20_192, 10_000)] {
            assert_eq!(connections_for(nofile), connections, "{nofile}");
        }
    }

    #[test]
    fn the_reason_of_the_limit_is_the_tighter_bound() {
        assert_eq!(Limits::new(10, 1024).total_reason, RefusedReason::TooManyConnections);
        assert_eq!(Limits::new(10_000, 1024).total_reason, RefusedReason::NoDescriptors);
    }

    #[test]
    fn a_port_in_use_is_named_with_advice() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let error = bind(taken.local_addr().unwrap()).unwrap_err().to_string();
        assert!(error.contains("another program listens there"), "{error}");
    }

    #[test]
    fn an_address_of_another_machine_is_named_with_advice() {
        let error = bind("192.0.2.1:0".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("no interface of this machine"), "{error}");
    }
}
