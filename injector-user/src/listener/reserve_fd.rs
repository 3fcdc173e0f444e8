//! A file descriptor in reserve, for the moment when no other is left.

use std::{
    io,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use socket2::Socket;

use crate::telemetry::log::target;

/// How often at most it is said that there is no room.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);

/// A descriptor kept for the moment when there are no others: without one, nobody could even be told to come back later,
/// and clients would wait in the kernel's queue until they give up.
#[derive(Debug)]
pub(super) struct ReserveFd(Option<Socket>);

impl ReserveFd {
    /// Any descriptor will do; one more of this socket costs nothing else.
    pub(super) fn new(socket: &Socket) -> Self {
        Self(socket.try_clone().ok())
    }

    /// Whether it is there, having been taken again if that was possible.
    pub(super) fn refill(&mut self, socket: &Socket) -> bool {
        if self.0.is_none() {
            *self = Self::new(socket);
        }
        self.0.is_some()
    }

    /// Makes room for one client; `false` if there was none to make.
    pub(super) fn release(&mut self) -> bool {
        self.0.take().is_some()
    }
}

/// Says that there is no room, and not with every client.
#[derive(Debug, Default)]
pub(super) struct FdExhaustionWarning {
    last_warning: Mutex<Option<Instant>>,
}

impl FdExhaustionWarning {
    pub(super) fn log(&self, listener: &str) {
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

pub(super) fn is_fd_exhaustion(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
