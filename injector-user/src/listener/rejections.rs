//! Log lines about rejected clients: one at debug for each, and a warning with the busiest source.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use socket2::Socket;

use super::source_limit::SourceRefusal;
use crate::{
    config::Network,
    net::canonical,
    protocol::Rejection,
    session::{Context, registry::SessionRegistry},
    telemetry::{log::target, metrics::RejectReason, rate_limit::RateLimit},
};

/// Why a client is rejected at its accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) reason: RejectReason,
    /// Its source is at a limit.
    pub(super) of_source: Option<SourceRefusal>,
}

impl From<RejectReason> for Refusal {
    fn from(reason: RejectReason) -> Self {
        Self { reason, of_source: None }
    }
}

impl From<SourceRefusal> for Refusal {
    fn from(refusal: SourceRefusal) -> Self {
        Self { reason: refusal.reason, of_source: Some(refusal) }
    }
}

impl Refusal {
    /// The reply to the client.
    pub(super) const fn rejection(self) -> Rejection {
        match self.reason {
            RejectReason::Stopping | RejectReason::Draining => Rejection::Stopping,
            RejectReason::SourceConnections => Rejection::SourceConnections,
            RejectReason::SourceRate => Rejection::SourceRate,
            RejectReason::TranslatedSource => Rejection::TranslatedSource,
            _ => Rejection::TooManyConnections,
        }
    }
}

/// Logs rejected clients.
#[derive(Debug)]
pub(super) struct RejectionLog {
    /// The sessions of all workers.
    registries: Vec<SessionRegistry>,
    rate: RateLimit,
    source_rate: RateLimit,
    translated_rate: RateLimit,
}

impl RejectionLog {
    pub(super) fn new(registries: Vec<SessionRegistry>) -> Self {
        let [rate, source_rate, translated_rate] = Default::default();
        Self { registries, rate, source_rate, translated_rate }
    }

    /// Logs a client at debug. At a limit also warns, with limited frequency.
    pub(super) fn log(&self, context: &Context, client: SocketAddr, socket: &Socket, refusal: Refusal) {
        let reason = refusal.reason;
        let local = socket.local_addr().ok().and_then(|address| address.as_socket()).map(canonical);
        let listener = &*context.listener;
        tracing::debug!(
            target: target::ACCESS,
            %client,
            listener,
            local = local.map(tracing::field::display),
            reason = reason.name(),
            "connection rejected"
        );
        if let Some(SourceRefusal { source, limit, .. }) = refusal.of_source
            && let Some(count) = self.source_rate.allow(Instant::now())
        {
            tracing::warn!(
                target: target::LISTENER,
                listener,
                count,
                %source,
                reason = reason.name(),
                limit,
                "connections are rejected because their source is at its limit: if it may have more, raise \
                 max_connections_per_source or max_rate_per_source, or add it to guard.allow"
            );
        }
        if reason == RejectReason::TranslatedSource
            && let Some(count) = self.translated_rate.allow(Instant::now())
        {
            tracing::warn!(
                target: target::LISTENER,
                listener,
                count,
                source = %client.ip(),
                local = local.map(tracing::field::display),
                "connections are refused because translation on the way here has replaced the client's address by \
                 one of translated_sources: have the network keep it (externalTrafficPolicy: Local on the Service \
                 that leads here)"
            );
        }
        if reason == RejectReason::TooManyConnections
            && let Some(count) = self.rate.allow(Instant::now())
        {
            let sessions: Vec<_> = self.registries.iter().flat_map(SessionRegistry::snapshot).collect();
            let busiest = busiest(sessions.iter().map(|session| session.client.ip()));
            let (source, of_source) = busiest.map(|(source, count)| (source.to_string(), count)).unzip();
            tracing::warn!(
                target: target::LISTENER,
                listener,
                count,
                sessions = sessions.len(),
                busiest_source = source,
                sessions_of_source = of_source,
                "connections are rejected: limits.max_connections or the listener's max_connections is reached: end the \
                 sessions of a source that has too many (`injector sessions end ADDRESS`), or raise the limit"
            );
        }
    }
}

/// The source with the most sessions: an IPv4 address, or an IPv6 network of 64 bits, which one host
/// may have alone. Of equals, the lowest.
fn busiest(clients: impl Iterator<Item = IpAddr>) -> Option<(Network, usize)> {
    let mut counts: HashMap<Network, usize> = HashMap::new();
    for client in clients {
        *counts.entry(Network::of_source(client)).or_default() += 1;
    }
    counts.into_iter().max_by(|one, other| one.1.cmp(&other.1).then(other.0.cmp(&one.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_source_is_an_address_or_a_network_of_64_bits() {
        let of = |clients: &[&str]| {
            busiest(clients.iter().map(|client| client.parse().unwrap()))
                .map(|(source, count)| (source.to_string(), count))
        };
        assert_eq!(of(&[]), None);
        let named = |source: &str, count| Some((source.to_owned(), count));
        let clients = ["192.0.2.1", "192.0.2.2", "::ffff:192.0.2.2", "2001:db8::1", "192.0.2.1", "192.0.2.2"];
        assert_eq!(of(&clients), named("192.0.2.2/32", 3));
        assert_eq!(of(&["192.0.2.1", "2001:db8::1", "2001:db8::2:1"]), named("2001:db8::/64", 2));
        assert_eq!(of(&["192.0.2.9", "192.0.2.1"]), named("192.0.2.1/32", 1));
    }
}
