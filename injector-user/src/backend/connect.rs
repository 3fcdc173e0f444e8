//! Connects to a backend: tries the backends in order, and the addresses of each side by side, until
//! one accepts.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::atomic::Ordering,
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use thiserror::Error;
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    addresses::RETRY_AFTER,
    pool::Backends,
    queue::NoPlace,
    state::{Backend, SessionGuard},
};
use crate::{
    net::{socket::Endpoint, syn::ObserveSyn},
    telemetry::log::target,
};

/// How long an address of a backend may take before the next one is tried beside it: the
/// "Connection Attempt Delay" of RFC 8305, section 5.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// A connection to a backend.
#[derive(Debug)]
pub struct BackendConnection {
    /// The socket.
    pub endpoint: Endpoint,
    /// The address that accepted.
    pub address: SocketAddr,
    /// To be held until the connection ends.
    pub session: SessionGuard,
}

/// Why no backend could be reached: the most specific error of all addresses.
#[derive(Debug, Error)]
pub enum Unreachable {
    /// No name has an address.
    #[error("no name of a backend resolves to an address")]
    Unresolved,
    /// The operator has disabled all of them.
    #[error("all backends are disabled by the operator; `injector backend auto` enables one again")]
    AllDisabled,
    /// Refused, and no other address timed out.
    #[error("{address}: {error}")]
    Refused {
        /// The last address that refused.
        address: SocketAddr,
        /// Connection refused.
        error: io::Error,
    },
    /// No reply in time.
    #[error("{address}: no answer within {within:?}")]
    Timeout {
        /// The last address that did not reply.
        address: SocketAddr,
        /// The time that the attempt had.
        within: Duration,
    },
    /// Every source port of this host is in use towards this address.
    #[error(
        "{address}: no source port of this host is left: widen net.ipv4.ip_local_port_range, or give the \
         listener more source_addresses"
    )]
    NoSourcePorts {
        /// The last address.
        address: SocketAddr,
    },
    /// All that could be tried have as many sessions as they may.
    #[error("every backend has reached its max_connections, and {0}")]
    Full(NoPlace),
    /// Any other error, such as no route.
    #[error("{address}: {error}")]
    Other {
        /// The last address that failed.
        address: SocketAddr,
        /// The error of connect(2).
        error: io::Error,
    },
}

impl Backends {
    /// Connects to the first backend that accepts, while `observe` reads its SYN. The backends share
    /// the time `within`: each gets an equal part of the rest. While all of them have as many sessions
    /// as they may, the client waits in the listener's queue.
    ///
    /// # Errors
    /// [`Unreachable`], after all addresses of all backends failed, or without a place.
    pub async fn connect(
        &self,
        client: IpAddr,
        within: Duration,
        observe: &ObserveSyn<'_>,
    ) -> Result<BackendConnection, Unreachable> {
        let start = Instant::now();
        if !self.all().iter().any(|backend| backend.has_address() && backend.candidate().is_selectable()) {
            // The names had no address when they were last resolved.
            let _ = timeout(within, self.resolve_now()).await;
        }
        let within = within.saturating_sub(start.elapsed());
        let reserve = || self.reserve(client);
        let (session, order) =
            self.queue.wait(reserve).await.unwrap_or_else(|no_place| Err(Unreachable::Full(no_place)))?;
        let mut reserved = Some(session);
        let deadline = Instant::now() + within;
        let mut worst = Unreachable::Unresolved;
        for (left, backend) in (1..=u32::try_from(order.len()).unwrap_or(1)).rev().zip(order) {
            let session = reserved.take().or_else(|| backend.reserve(&self.queue.released));
            let Some(session) = session else { continue };
            let share = deadline.saturating_duration_since(Instant::now()) / left;
            match self.connect_to(backend, share, observe).await {
                Ok((address, endpoint)) => {
                    self.reached(backend);
                    return Ok(BackendConnection { endpoint, address, session });
                }
                Err(failed) => {
                    if failed.counts_as_failure() {
                        self.failed(backend);
                    }
                    worst = most_specific(worst, failed);
                }
            }
        }
        Err(worst)
    }

    /// A place at the first backend that has one, of those to try for this client; with that backend and
    /// those behind it. `None` if each of them has as many sessions as it may.
    fn reserve(&self, client: IpAddr) -> Option<Result<(SessionGuard, Vec<&Backend>), Unreachable>> {
        let mut order = self.order(client);
        if order.is_empty() {
            return Some(Err(Unreachable::AllDisabled));
        }
        order.retain(|backend| backend.has_address());
        if order.is_empty() {
            return Some(Err(Unreachable::Unresolved));
        }
        let place =
            |(index, backend): (usize, &&Backend)| Some((index, backend.reserve(&self.queue.released)?));
        let (index, session) = order.iter().enumerate().find_map(place)?;
        Some(Ok((session, order.split_off(index))))
    }

    /// Connects to the address of a backend that accepts first. The next address is tried when one
    /// has failed, or has not answered for [`ATTEMPT_DELAY`] (RFC 8305, section 5).
    async fn connect_to(
        &self,
        backend: &Backend,
        within: Duration,
        observe: &ObserveSyn<'_>,
    ) -> Result<(SocketAddr, Endpoint), Unreachable> {
        let deadline = Instant::now() + within;
        let order = backend.state.addresses().order(std::time::Instant::now());
        // Each of them is tried, also within a short time.
        let delay = ATTEMPT_DELAY.min(within / u32::try_from(order.len()).unwrap_or(1).max(1));
        let attempt = |address| async move { (address, self.connect_from_any(address, observe).await) };
        let mut attempts = FuturesUnordered::new();
        // The addresses of the attempts, in the order of their start.
        let mut pending: Vec<SocketAddr> = Vec::new();
        let mut order = order.into_iter();
        let mut worst = Unreachable::Unresolved;
        loop {
            match order.next() {
                Some(address) => {
                    pending.push(address);
                    attempts.push(attempt(address));
                }
                None if pending.is_empty() => return Err(worst),
                None => {}
            }
            let until = if order.len() > 0 { deadline.min(Instant::now() + delay) } else { deadline };
            match timeout_at(until, attempts.next()).await {
                Ok(Some((address, Ok(endpoint)))) => {
                    let overtaken = pending.iter().take_while(|pending| **pending != address);
                    overtaken.for_each(|slower| self.note_address_failed(backend, *slower));
                    self.note_address_connected(backend, address);
                    return Ok((address, endpoint));
                }
                Ok(Some((address, Err(error)))) => {
                    pending.retain(|pending| *pending != address);
                    worst = most_specific(worst, self.attempt_failed(backend, address, within, Some(error)));
                }
                Ok(None) => return Err(worst),
                Err(_) if Instant::now() < deadline => {}
                Err(_) => {
                    for address in pending {
                        worst = most_specific(worst, self.attempt_failed(backend, address, within, None));
                    }
                    return Err(worst);
                }
            }
        }
    }

    /// Connects from the next source address, or if its ports are in use or this host lacks it, from
    /// another one.
    async fn connect_from_any(&self, address: SocketAddr, observe: &ObserveSyn<'_>) -> io::Result<Endpoint> {
        let mut last = io::ErrorKind::AddrNotAvailable.into();
        for source in self.sources.towards(address) {
            match Endpoint::connect_from(source, address, observe).await {
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => last = error,
                result => return result,
            }
        }
        Err(last)
    }

    /// Records a failed attempt; `error` is `None` if it had no answer.
    fn attempt_failed(
        &self,
        backend: &Backend,
        address: SocketAddr,
        within: Duration,
        error: Option<io::Error>,
    ) -> Unreachable {
        let failed = match error {
            Some(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                Unreachable::Refused { address, error }
            }
            // Of connect(2), not of bind(2) (__inet_hash_connect, net/ipv4/inet_hashtables.c).
            Some(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
                self.warn_of_source_ports(backend, address);
                Unreachable::NoSourcePorts { address }
            }
            Some(error) if error.kind() != io::ErrorKind::TimedOut => Unreachable::Other { address, error },
            _ => Unreachable::Timeout { address, within },
        };
        tracing::debug!(target: target::BACKEND, listener = self.listener, error = %failed, "connecting to a backend address failed; trying the next one, if any");
        if failed.counts_as_failure() {
            self.note_address_failed(backend, address);
        }
        failed
    }

    fn note_address_failed(&self, backend: &Backend, address: SocketAddr) {
        let new = backend.state.addresses().failed(address, std::time::Instant::now());
        if new && backend.addresses().len() > 1 {
            tracing::warn!(target: target::BACKEND, listener = self.listener, backend = %backend.configured, %address, retry_after = ?RETRY_AFTER, "one of the backend's addresses does not accept connections; new connections go to its other addresses first");
            self.changed.notify_one();
        }
    }

    fn note_address_connected(&self, backend: &Backend, address: SocketAddr) {
        let new = backend.state.addresses().connected(address);
        if new && backend.addresses().len() > 1 {
            tracing::info!(target: target::BACKEND, listener = self.listener, backend = %backend.configured, %address, "the backend's address accepts connections again");
            self.changed.notify_one();
        }
    }

    /// Records that a connection of the inline engine was refused at this address.
    pub fn note_refused(&self, address: SocketAddr) {
        for backend in self.with_address(address) {
            self.note_address_failed(backend, address);
            if backend.failing_addresses().len() == backend.addresses().len() {
                self.failed(backend);
            }
        }
    }

    /// Records that this address accepted a connection of the inline engine.
    pub fn note_connected(&self, address: SocketAddr) {
        for backend in self.with_address(address) {
            self.note_address_connected(backend, address);
            backend.state.health().connected();
        }
    }

    fn warn_of_source_ports(&self, backend: &Backend, address: SocketAddr) {
        if let Some(count) = self.source_ports_warning.allow(std::time::Instant::now()) {
            let backend = &backend.configured;
            tracing::warn!(target: target::BACKEND, listener = self.listener, %backend, %address, count, "no source port of this host is left towards the backend; clients are rejected, or get another backend: widen net.ipv4.ip_local_port_range, or give the listener more source_addresses");
        }
    }

    pub(super) fn with_address(&self, address: SocketAddr) -> impl Iterator<Item = &Backend> {
        self.all().iter().filter(move |backend| backend.addresses().contains(&address))
    }

    fn reached(&self, backend: &Backend) {
        backend.state.health().connected();
        backend.state.counters.sessions.fetch_add(1, Ordering::Relaxed);
    }

    fn failed(&self, backend: &Backend) {
        let ejected = backend.state.health().failed(std::time::Instant::now(), &self.health.ejection);
        if let Some(time) = ejected {
            backend.state.counters.ejections.fetch_add(1, Ordering::Relaxed);
            let name = &backend.configured;
            tracing::warn!(target: target::HEALTH, listener = self.listener, backend = %name, duration = ?time, "backend ejected after failed connections; it receives none until the time is over");
        }
    }
}

impl Unreachable {
    /// Whether the error shows a failure of the backend, not of the daemon.
    fn counts_as_failure(&self) -> bool {
        use io::ErrorKind::{ConnectionReset, HostUnreachable, NetworkUnreachable};
        match self {
            Self::Refused { .. } | Self::Timeout { .. } => true,
            Self::Other { error, .. } => {
                matches!(error.kind(), HostUnreachable | NetworkUnreachable | ConnectionReset)
            }
            Self::Unresolved | Self::AllDisabled | Self::NoSourcePorts { .. } | Self::Full(_) => false,
        }
    }
}

/// The more specific of two errors. A timeout outranks a refusal, because it shows a network
/// failure. A failure of this host outranks both.
fn most_specific(one: Unreachable, other: Unreachable) -> Unreachable {
    let rank = |error: &Unreachable| match error {
        Unreachable::Unresolved | Unreachable::AllDisabled | Unreachable::Full(_) => 0,
        Unreachable::Other { .. } => 1,
        Unreachable::Refused { .. } => 2,
        Unreachable::Timeout { .. } => 3,
        Unreachable::NoSourcePorts { .. } => 4,
    };
    if rank(&other) >= rank(&one) { other } else { one }
}

#[cfg(test)]
mod tests;
