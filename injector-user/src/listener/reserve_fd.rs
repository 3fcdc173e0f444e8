//! A file descriptor in reserve, for the moment when no other is left.

use std::{io, net::SocketAddr, time::Instant};

use socket2::Socket;

use crate::telemetry::{log::target, rate_limit::RateLimit};

/// A file descriptor in reserve. Without one a client could not even be rejected when descriptors
/// are exhausted: clients would wait in the accept queue until they time out.
#[derive(Debug)]
pub(super) struct ReserveFd(Option<Socket>);

impl ReserveFd {
    /// Duplicates the descriptor of `socket`, which costs nothing but the descriptor.
    pub(super) fn new(socket: &Socket) -> Self {
        Self(socket.try_clone().ok())
    }

    /// Takes a descriptor again if the reserve was released. `false` if none is left.
    pub(super) fn refill(&mut self, socket: &Socket) -> bool {
        if self.0.is_none() {
            *self = Self::new(socket);
        }
        self.0.is_some()
    }

    /// Frees the descriptor for one client. `false` if the reserve is empty.
    pub(super) fn release(&mut self) -> bool {
        self.0.take().is_some()
    }
}

/// Warns that file descriptors are exhausted, with limited frequency.
#[derive(Debug, Default)]
pub(super) struct FdExhaustionWarning {
    rate: RateLimit,
}

impl FdExhaustionWarning {
    pub(super) fn log(&self, listener: &str, address: Option<SocketAddr>) {
        if let Some(count) = self.rate.allow(Instant::now()) {
            tracing::warn!(target: target::LISTENER,
                listener,
                count,
                address = address.map(tracing::field::display),
                "no file descriptors left; new connections are rejected: raise the open-file limit (LimitNOFILE= in \
                 systemd, ulimit -n) or lower limits.max_connections"
            );
        }
    }
}

pub(super) fn is_fd_exhaustion(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
