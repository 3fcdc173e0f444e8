//! The series of one listener, looked up once.

use std::{sync::Arc, time::Duration};

use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};

use super::{
    families::Families,
    labels::{BytesLabels, ChangeLabels, ClosedLabels, ListenerLabels, ReasonLabels, ServedLabels},
};
use crate::telemetry::outcome::{Bytes, CloseReason};

/// Why a connection was rejected: the label `reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectReason {
    /// Its source is banned.
    Banned,
    /// The configured limit is reached.
    TooManyConnections,
    /// No file descriptors are left.
    NoDescriptors,
    /// Every address of the backend refused.
    BackendRefused,
    /// No address of the backend answered in time.
    ConnectTimeout,
    /// The backend could not be reached for another reason.
    BackendUnreachable,
    /// The backend's name has no address.
    BackendUnresolved,
    /// Every backend has as many sessions as it may, and the client has waited in vain.
    BackendFull,
    /// The backend closed before its first byte.
    NoBanner,
    /// The backend answered the header as commands.
    HeaderMisread,
    /// No source port is left towards the backend.
    NoSourcePorts,
    /// The client sent a PROXY header of its own.
    ForgedHeader,
    /// The daemon is shutting down.
    Stopping,
    /// The operator drains the listener.
    Draining,
    /// The source has as many connections open as one may.
    SourceConnections,
    /// The source opens connections too fast.
    SourceRate,
    /// Translation on the way here has replaced the client's address.
    TranslatedSource,
}

impl RejectReason {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::Banned,
        Self::TooManyConnections,
        Self::NoDescriptors,
        Self::BackendRefused,
        Self::ConnectTimeout,
        Self::BackendUnreachable,
        Self::BackendUnresolved,
        Self::BackendFull,
        Self::NoBanner,
        Self::HeaderMisread,
        Self::NoSourcePorts,
        Self::ForgedHeader,
        Self::Stopping,
        Self::Draining,
        Self::SourceConnections,
        Self::SourceRate,
        Self::TranslatedSource,
    ];

    /// The name in logs and labels.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Banned => "banned",
            Self::TooManyConnections => "too_many_connections",
            Self::NoDescriptors => "no_descriptors",
            Self::BackendRefused => "backend_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::BackendUnreachable => "backend_unreachable",
            Self::BackendUnresolved => "backend_unresolved",
            Self::BackendFull => "backend_full",
            Self::NoBanner => "no_banner",
            Self::HeaderMisread => "header_misread",
            Self::NoSourcePorts => "no_source_ports",
            Self::ForgedHeader => "forged_header",
            Self::Stopping => "stopping",
            Self::Draining => "draining",
            Self::SourceConnections => "source_connections",
            Self::SourceRate => "source_rate",
            Self::TranslatedSource => "translated_source",
        }
    }

    /// The reject reason for a connection that was admitted but ended before its backend spoke.
    const fn from_close(reason: CloseReason) -> Option<Self> {
        match reason {
            CloseReason::BackendRefused => Some(Self::BackendRefused),
            CloseReason::ConnectTimeout => Some(Self::ConnectTimeout),
            CloseReason::BackendUnreachable => Some(Self::BackendUnreachable),
            CloseReason::BackendUnresolved => Some(Self::BackendUnresolved),
            CloseReason::BackendFull => Some(Self::BackendFull),
            CloseReason::NoBanner => Some(Self::NoBanner),
            CloseReason::HeaderMisread => Some(Self::HeaderMisread),
            CloseReason::NoSourcePorts => Some(Self::NoSourcePorts),
            CloseReason::Forged => Some(Self::ForgedHeader),
            _ => None,
        }
    }
}

/// The metrics of one listener and the engine that serves it. Clones share them.
#[derive(Clone, Debug)]
pub struct ListenerMetrics(Arc<Series>);

#[derive(Debug)]
struct Series {
    name: Arc<str>,
    families: Families,
    accepted: Counter,
    active: Gauge,
    rejected: [(RejectReason, Counter); RejectReason::ALL.len()],
    closed: [(CloseReason, Counter); CloseReason::ALL.len()],
    headers_sent: Counter,
    headers_failed: Counter,
    to_backend: PathCounters,
    to_client: PathCounters,
    first_byte: Histogram,
    enrolments: Counter,
    paused: Counter,
    moved_to_user_space: Counter,
    resumed: Counter,
}

/// A listener's counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListenerSnapshot {
    /// Accepted connections.
    pub accepted: u64,
    /// Open connections.
    pub active: u64,
    /// Rejected connections.
    pub rejected: u64,
    /// Headers sent to a backend.
    pub headers_sent: u64,
    /// Payload bytes from clients to backends.
    pub to_backend: u64,
    /// Payload bytes from backends to clients.
    pub to_client: u64,
}

/// The byte counters of one direction.
#[derive(Debug)]
struct PathCounters {
    relayed: Counter,
    piped: Counter,
    spliced: Counter,
}

impl PathCounters {
    fn total(&self) -> u64 {
        [&self.relayed, &self.piped, &self.spliced].into_iter().map(Counter::get).sum()
    }

    fn count(&self, bytes: Bytes) {
        self.relayed.inc_by(bytes.relayed);
        self.piped.inc_by(bytes.piped);
        self.spliced.inc_by(bytes.spliced);
    }
}

/// Counts a connection as active until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct ActiveGuard(Gauge);

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl ListenerMetrics {
    pub(super) fn new(families: &Families, name: &str, engine: &'static str) -> Self {
        let name: Arc<str> = name.into();
        let plain = ListenerLabels { listener: Arc::clone(&name) };
        let served = ServedLabels { listener: Arc::clone(&name), engine };
        let rejected = |reason: RejectReason| {
            let labels = ReasonLabels { listener: Arc::clone(&name), reason: reason.name() };
            (reason, families.rejected.get_or_create_owned(&labels))
        };
        let closed = |reason: CloseReason| {
            let labels = ClosedLabels { listener: Arc::clone(&name), engine, reason: reason.name() };
            (reason, families.closed.get_or_create_owned(&labels))
        };
        let bytes = |direction, plane| {
            families.bytes.get_or_create_owned(&BytesLabels { listener: Arc::clone(&name), direction, plane })
        };
        let change = |change| {
            families.plane_changes.get_or_create_owned(&ChangeLabels { listener: Arc::clone(&name), change })
        };
        let planes = |direction| PathCounters {
            relayed: bytes(direction, "relayed"),
            piped: bytes(direction, "piped"),
            spliced: bytes(direction, "spliced"),
        };
        Self(Arc::new(Series {
            accepted: families.accepted.get_or_create_owned(&plain),
            active: families.active.get_or_create_owned(&served),
            rejected: RejectReason::ALL.map(rejected),
            closed: CloseReason::ALL.map(closed),
            headers_sent: families.headers_sent.get_or_create_owned(&served),
            headers_failed: families.headers_failed.get_or_create_owned(&served),
            to_backend: planes("client_to_backend"),
            to_client: planes("backend_to_client"),
            first_byte: families.first_byte.get_or_create_owned(&plain),
            enrolments: families.enrolments.get_or_create_owned(&plain),
            paused: change("paused"),
            moved_to_user_space: change("moved_to_user_space"),
            resumed: change("resumed"),
            families: families.clone(),
            name,
        }))
    }

    /// The present values.
    #[must_use]
    pub fn snapshot(&self) -> ListenerSnapshot {
        let Series { accepted, active, rejected, to_backend, to_client, headers_sent, .. } = &*self.0;
        ListenerSnapshot {
            accepted: accepted.get(),
            active: u64::try_from(active.get()).unwrap_or_default(),
            rejected: rejected.iter().map(|(_, counter)| counter.get()).sum(),
            headers_sent: headers_sent.get(),
            to_backend: to_backend.total(),
            to_client: to_client.total(),
        }
    }

    /// Counts an accepted connection.
    pub fn accepted(&self) {
        self.0.accepted.inc();
    }

    /// Counts a connection rejected before it was admitted. [`ListenerMetrics::closed`] counts the
    /// others.
    pub fn rejected(&self, reason: RejectReason) {
        count(&self.0.rejected, reason);
    }

    /// Counts a connection as active while the guard is held.
    pub fn active(&self) -> ActiveGuard {
        self.0.active.inc();
        ActiveGuard(self.0.active.clone())
    }

    /// Counts a closed connection. If it ended before its backend spoke, it also counts as
    /// rejected.
    pub fn closed(&self, reason: CloseReason) {
        count(&self.0.closed, reason);
        if let Some(reason) = RejectReason::from_close(reason) {
            self.rejected(reason);
        }
    }

    /// Counts a header that was sent.
    pub fn header_sent(&self) {
        self.0.headers_sent.inc();
    }

    /// Counts a header that could not be sent; the connection is reset.
    pub fn header_failed(&self) {
        self.0.headers_failed.inc();
    }

    /// Adds the payload since the last call.
    pub fn bytes(&self, to_backend: Bytes, to_client: Bytes) {
        self.0.to_backend.count(to_backend);
        self.0.to_client.count(to_client);
    }

    /// Records the time from the header to the backend's first byte.
    pub fn first_byte(&self, after: Duration) {
        self.0.first_byte.observe(after.as_secs_f64());
    }

    /// Counts a direction enrolled in the kernel.
    pub fn enrolled(&self) {
        self.0.enrolments.inc();
    }

    /// Counts a spliced direction that was paused until the target catches up.
    pub fn paused(&self) {
        self.0.paused.inc();
    }

    /// Counts a paused direction that was moved to user space.
    pub fn moved_to_user_space(&self) {
        self.0.moved_to_user_space.inc();
    }

    /// Counts a direction that the kernel forwards again.
    pub fn resumed(&self) {
        self.0.resumed.inc();
    }

    /// Counts a header or direction that stayed in user space because the kernel rejected it.
    /// `reason` is one of a fixed set.
    pub fn enrolment_failed(&self, reason: &'static str) {
        let labels = ReasonLabels { listener: Arc::clone(&self.0.name), reason };
        self.0.families.enrolment_failures.get_or_create(&labels).inc();
    }
}

/// A linear search is enough: the arrays are short, and each connection counts once.
fn count<K: Copy + PartialEq>(counters: &[(K, Counter)], key: K) {
    if let Some((_, counter)) = counters.iter().find(|(of, _)| *of == key) {
        counter.inc();
    }
}
