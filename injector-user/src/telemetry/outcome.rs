//! Why a connection was closed, and its line in the access log.

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use crate::telemetry::log::target;

/// Why a connection was closed: the field `reason` of its log line and the label of
/// `injector_connections_closed_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CloseReason {
    /// The client sent its FIN first, then the backend: every byte was delivered.
    ClientClosed,
    /// The backend sent its FIN first, then the client: every byte was delivered.
    BackendClosed,
    /// The client reset the connection.
    ClientReset,
    /// The backend reset the connection.
    BackendReset,
    /// The client stopped answering.
    ClientTimedOut,
    /// The backend stopped answering.
    BackendTimedOut,
    /// The backend closed or reset before its first byte: it rejected the header or failed.
    NoBanner,
    /// The backend answered the header as commands: its port does not expect one.
    HeaderMisread,
    /// No byte was forwarded in either direction for the idle timeout.
    Idle,
    /// One side had sent its FIN, and the other sent nothing for the half-closed timeout.
    HalfClosed,
    /// The backend had finished and every byte was delivered, and the client did not finish in time.
    ClientFin,
    /// The client sent a PROXY header of its own.
    Forged,
    /// Sending the header ahead of the payload failed.
    HeaderFailed,
    /// The kernel dropped payload.
    Lost,
    /// Aborted at the deadline of a shutdown, a drain or a removed listener, or by a second signal.
    Aborted,
    /// Every address of the backend refused the connection.
    BackendRefused,
    /// No address of the backend answered in time.
    ConnectTimeout,
    /// No source port of this host is left towards the backend.
    NoSourcePorts,
    /// The backend could not be reached for another reason, such as no route.
    BackendUnreachable,
    /// The backend's name has no address.
    BackendUnresolved,
    /// The operator ended the session.
    EndedByOperator,
    /// Every backend has as many sessions as it may, and the client has waited in vain.
    BackendFull,
    /// All connections together had too much backlog in the kernel, and this one had a part of it.
    Overload,
    /// The daemon itself failed, for instance for want of descriptors.
    Internal,
}

impl CloseReason {
    /// All reasons.
    pub const ALL: [Self; 24] = [
        Self::ClientClosed,
        Self::BackendClosed,
        Self::ClientReset,
        Self::BackendReset,
        Self::ClientTimedOut,
        Self::BackendTimedOut,
        Self::NoBanner,
        Self::HeaderMisread,
        Self::Idle,
        Self::HalfClosed,
        Self::ClientFin,
        Self::Forged,
        Self::HeaderFailed,
        Self::Lost,
        Self::Aborted,
        Self::EndedByOperator,
        Self::BackendRefused,
        Self::ConnectTimeout,
        Self::NoSourcePorts,
        Self::BackendUnreachable,
        Self::BackendUnresolved,
        Self::BackendFull,
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
            Self::HeaderMisread => "header_misread",
            Self::Idle => "idle",
            Self::HalfClosed => "half_closed",
            Self::ClientFin => "client_fin",
            Self::Forged => "forged_header",
            Self::HeaderFailed => "header_failed",
            Self::Lost => "lost",
            Self::Aborted => "aborted",
            Self::EndedByOperator => "ended_by_operator",
            Self::BackendRefused => "backend_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::NoSourcePorts => "no_source_ports",
            Self::BackendUnreachable => "backend_unreachable",
            Self::BackendUnresolved => "backend_unresolved",
            Self::BackendFull => "backend_full",
            Self::Overload => "overload",
            Self::Internal => "internal",
        }
    }

    /// Refines a reset by its error: if the kernel gave up on a silent peer, or the network reported
    /// it unreachable, the peer timed out and did not reset the connection.
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

/// Bytes of one direction, by the data path that forwarded them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    /// Copied by user space.
    pub relayed: u64,
    /// Moved by user space through a pipe, without a copy.
    pub piped: u64,
    /// Forwarded by the kernel.
    pub spliced: u64,
}

impl Bytes {
    /// The sum.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.relayed + self.piped + self.spliced
    }
}

/// A finished connection's line in the access log.
#[derive(Clone, Debug)]
pub struct AccessLogEntry {
    /// The client's address.
    pub client: SocketAddr,
    /// The address that the client connected to.
    pub local: SocketAddr,
    /// The listener's name.
    pub listener: Arc<str>,
    /// The backend's address, if one was connected.
    pub backend: Option<SocketAddr>,
    /// The engine's name.
    pub engine: &'static str,
    /// Bytes from the client to the backend, without the header.
    pub to_backend: Bytes,
    /// Bytes from the backend to the client.
    pub to_client: Bytes,
    /// Time since the accept.
    pub duration: Duration,
    /// The connection's unique id in the header, if the receiver is configured for it.
    pub unique_id: Option<String>,
    /// Why it was closed.
    pub reason: CloseReason,
    /// The kernel's error, if there was one.
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
