//! Connections that the inline engine carries, beside those of the listener's sockets: limits hold
//! for both together.
//!
//! The server exports `established` and `accepted` as metrics and in `injector status`. The flow
//! tracker counts headers, bytes and closed connections.

use std::{
    fmt::Debug,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use injector_common::guard::{Rate, SourceCounts, SourceLimits};

use crate::config::Network;

/// The counts of the inline engine, which its program and the daemon share in memory.
pub trait InlineUsage: Debug + Send + Sync {
    /// The counts of the listener with this name. Reserves a place for it, unless it has one: a name
    /// keeps its place while someone holds the returned value, and while a connection of it lives.
    /// `None` if no place is left; then the inline engine does not serve the listener.
    fn listener(&self, name: &str) -> Option<Arc<dyn UsageCounts>>;

    /// The counts of all listeners together.
    fn all(&self) -> Arc<dyn UsageCounts>;

    /// Resets the connections of a listener that were opened before `opened_before`. Returns at
    /// once.
    fn reset(&self, listener: &str, opened_before: Instant);

    /// Ends these connections, by [`InlineConnection::id`]. Returns at once.
    fn end(&self, ids: Vec<u64>);

    /// The established connections, for `injector sessions`.
    fn connections(&self) -> Vec<InlineConnection> {
        Vec::new()
    }
}

/// The counts of one listener, or of all: `injector_common::inline::Usage` at its place in the map.
/// Nothing here is a system call, except what concerns one source.
pub trait UsageCounts: Debug + Send + Sync {
    /// Connections that inline carries: established, and not yet ended.
    fn established(&self) -> u32;

    /// Connections that inline has opened since the map was made.
    fn accepted(&self) -> u64;

    /// Adds a session of another engine. At the start of the daemon there is none.
    fn add_session(&self);

    /// Removes a session of another engine.
    fn remove_session(&self);

    /// Sets the limit on connections of all engines together; `u32::MAX` if there is none. Until
    /// it is called for the first time, that of an earlier daemon holds, or inline opens no
    /// connection.
    fn set_limit(&self, limit: u32);

    /// Sets the limits on each source, and how many bits of an IPv4 and of an IPv6 address are one.
    fn set_source_limits(&self, limits: SourceLimits, prefixes: [u8; 2]) {
        let _ = (limits, prefixes);
    }

    /// What inline counts of this source, and its rate. A system call; only for a source with limits.
    fn of_source(&self, source: Network) -> (SourceCounts, Rate) {
        let _ = source;
        Default::default()
    }

    /// Sets how many sessions of other engines this source has. As [`UsageCounts::of_source`].
    fn set_sessions_of_source(&self, source: Network, sessions: u32) {
        let _ = (source, sessions);
    }
}

/// A connection that inline carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InlineConnection {
    /// When its first packet came, in nanoseconds of `CLOCK_MONOTONIC`: distinct.
    pub id: u64,
    /// The listener's name.
    pub listener: Arc<str>,
    /// The client's address.
    pub client: SocketAddr,
    /// The address that the client connected to.
    pub local: SocketAddr,
    /// The backend's address.
    pub backend: SocketAddr,
    /// Time since it was established.
    pub age: Duration,
    /// Payload bytes to the backend so far.
    pub to_backend: u64,
    /// Payload bytes to the client so far.
    pub to_client: u64,
}
