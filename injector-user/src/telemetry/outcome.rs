//! How a connection ended, and the one line that says so.

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use crate::telemetry::log::target;

/// How a connection ended: the field `reason` of its log line and the label of
/// `injector_connections_closed_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CloseReason {
    /// The client finished first, then the backend: everything was delivered.
    ClientClosed,
    /// The backend finished first, then the client: everything was delivered.
    BackendClosed,
    /// The client reset the connection.
    ClientReset,
    /// The backend reset the connection.
    BackendReset,
    /// The client did not answer any more.
    ClientTimedOut,
    /// The backend did not answer any more.
    BackendTimedOut,
    /// The backend closed or reset before its first byte: it does not want the header, or has
    /// trouble of its own.
    NoBanner,
    /// No byte either way for too long.
    Idle,
    /// One side had finished, and the other was silent for too long.
    HalfClosed,
    /// The client sent a PROXY header of its own.
    Forged,
    /// The header could not be put in front of the payload.
    HeaderFailed,
    /// The kernel dropped payload.
    Lost,
    /// Aborted at the deadline of a shutdown, a drain or a removed listener, or by a second signal.
    Aborted,
    /// Every address of the backend refused.
    BackendRefused,
    /// No address of the backend answered in time.
    ConnectTimeout,
    /// The backend could not be reached for another reason, such as no route.
    BackendUnreachable,
    /// The backend's name has no address.
    BackendUnresolved,
    /// Too much waited in the kernel over all connections, and some of it here.
    Overload,
    /// The daemon itself failed, for instance for want of descriptors.
    Internal,
}

impl CloseReason {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::ClientClosed,
        Self::BackendClosed,
        Self::ClientReset,
        Self::BackendReset,
        Self::ClientTimedOut,
        Self::BackendTimedOut,
        Self::NoBanner,
        Self::Idle,
        Self::HalfClosed,
        Self::Forged,
        Self::HeaderFailed,
        Self::Lost,
        Self::Aborted,
        Self::BackendRefused,
        Self::ConnectTimeout,
        Self::BackendUnreachable,
        Self::BackendUnresolved,
        Self::Overload,
        Self::Internal,
    ];

    /// The name in logs and labels.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClientClosed => "client_closed",
            Self::BackendClosed => "backend_closed",
            Self::ClientReset => "client_reset",
            Self::BackendReset => "backend_reset",
            Self::ClientTimedOut => "client_timed_out",
            Self::BackendTimedOut => "backend_timed_out",
            Self::NoBanner => "no_banner",
            Self::Idle => "idle",
            Self::HalfClosed => "half_closed",
            Self::Forged => "forged_header",
            Self::HeaderFailed => "header_failed",
            Self::Lost => "lost",
            Self::Aborted => "aborted",
            Self::BackendRefused => "backend_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::BackendUnreachable => "backend_unreachable",
            Self::BackendUnresolved => "backend_unresolved",
            Self::Overload => "overload",
            Self::Internal => "internal",
        }
    }

    /// A connection that broke because the kernel gave up on a silent peer, or the network said
    /// that nobody is there, was not reset by that peer: it vanished.
    #[must_use]
    pub fn refine(self, error: Option<&io::Error>) -> Self {
        use io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut};
        let silent = error
            .is_some_and(|error| matches!(error.kind(), TimedOut | HostUnreachable | NetworkUnreachable));
        match self {
            Self::ClientReset if silent => Self::ClientTimedOut,
            Self::BackendReset if silent => Self::BackendTimedOut,
            other => other,
        }
    }

    /// Whether both sides got every byte and a FIN.
    #[must_use]
    pub const fn clean(self) -> bool {
        matches!(self, Self::ClientClosed | Self::BackendClosed)
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Bytes of one direction, by the plane that carried them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    /// Copied by user space.
    pub relayed: u64,
    /// Moved by user space through a pipe, without a copy.
    pub piped: u64,
    /// Carried by the kernel.
    pub spliced: u64,
}

impl Bytes {
    /// All of them.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.relayed + self.piped + self.spliced
    }
}

/// What is known of a finished connection.
#[derive(Clone, Debug)]
pub struct AccessLogEntry {
    /// The client.
    pub client: SocketAddr,
    /// The address of ours that it connected to.
    pub local: SocketAddr,
    /// The listener's name.
    pub listener: Arc<str>,
    /// The backend, once one was reached.
    pub backend: Option<SocketAddr>,
    /// The engine's name.
    pub engine: &'static str,
    /// From the client to the backend, without the header.
    pub to_backend: Bytes,
    /// From the backend to the client.
    pub to_client: Bytes,
    /// From the accept on.
    pub duration: Duration,
    /// What the backend was told to call the connection, where it wants that.
    pub unique_id: Option<String>,
    /// How it ended.
    pub reason: CloseReason,
    /// What the kernel said, where it said something.
    pub error: Option<String>,
}

impl AccessLogEntry {
    /// Writes the line. It is the only one above DEBUG that names a client.
    pub fn log(&self) {
        tracing::info!(target: target::ACCESS,
            client = %self.client,
            listener = &*self.listener,
            local = %self.local,
            backend = self.backend.map(tracing::field::display),
            engine = self.engine,
            bytes_to_backend = self.to_backend.total(),
            bytes_to_client = self.to_client.total(),
            spliced_to_backend = self.to_backend.spliced,
            spliced_to_client = self.to_client.spliced,
            piped_to_backend = self.to_backend.piped,
            piped_to_client = self.to_client.piped,
            duration_ms = u64::try_from(self.duration.as_millis()).unwrap_or(u64::MAX),
            unique_id = self.unique_id,
            reason = self.reason.name(),
            error = self.error,
            "connection closed"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct() {
        let names: std::collections::BTreeSet<_> =
            CloseReason::ALL.into_iter().map(CloseReason::name).collect();
        assert_eq!(names.len(), CloseReason::ALL.len());
    }
}
