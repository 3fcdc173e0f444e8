//! What the daemon answers to `status` and `sessions`.

use std::time::{Duration, Instant};

use super::wire::{
    BackendStatus, ConfigStatus, EngineStatus, ListenerStatus, RemovedListenerStatus, SessionRow, Sessions,
    Status,
};
use crate::{
    backend::Backend,
    server::{ActiveListener, Server},
    session::registry::Snapshot,
};

/// The state of the daemon, whose configuration, readiness and uptime the caller knows.
pub(super) fn status(
    server: &mut Server,
    config: ConfigStatus,
    readiness: String,
    uptime: Duration,
) -> Status {
    let (connections, max_connections) = server.connections();
    let removed_listeners =
        server.removed_listeners().into_iter().map(|(removed, sessions)| RemovedListenerStatus {
            name: removed.name.clone(),
            sessions,
            abort_in_ms: millis(removed.deadline.saturating_duration_since(Instant::now())),
        });
    let removed_listeners = removed_listeners.collect();
    let engine = |name: &str, failure: Option<String>| EngineStatus { name: name.to_owned(), failure };
    let probes = server.probes();
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_ms: millis(uptime),
        readiness,
        config,
        connections: connections as u64,
        max_connections: max_connections as u64,
        backlog_bytes: server.backlog(),
        engines: vec![
            engine("inline", probes.inline.failure()),
            engine("splice", probes.splice.failure()),
            engine("relay", None),
        ],
        listeners: server.listeners().iter().map(listener_status).collect(),
        removed_listeners,
    }
}

fn listener_status(active: &ActiveListener) -> ListenerStatus {
    let counts = active.metrics.snapshot();
    ListenerStatus {
        name: active.settings.name.clone(),
        protocol: active.settings.protocol.name().to_owned(),
        engine: active.engine.as_ref().map_or("inline", |engine| engine.name()).to_owned(),
        bind: active.settings.bind.clone(),
        draining: active.drain.is_some(),
        abort_in_ms: active
            .drain
            .and_then(|drain| drain.deadline)
            .map(|deadline| millis(deadline.saturating_duration_since(Instant::now()))),
        active: counts.active,
        accepted: counts.accepted,
        rejected: counts.rejected,
        headers_sent: counts.headers_sent,
        bytes_to_backend: counts.to_backend,
        bytes_to_client: counts.to_client,
        backends: active.backends.all().iter().map(backend_status).collect(),
    }
}

fn backend_status(backend: &Backend) -> BackendStatus {
    let stats = backend.stats();
    BackendStatus {
        name: backend.configured().to_string(),
        weight: backend.configured().weight,
        backup: backend.configured().backup,
        state: backend.health_state(),
        addresses: backend.addresses(),
        active: stats.active,
        sessions: stats.sessions,
        checks_passed: stats.passed,
        checks_failed: stats.failed,
        ejections: stats.ejections,
    }
}

/// The sessions of one listener or of all, the oldest first.
pub(super) fn sessions(server: &Server, listener: Option<&str>, limit: Option<usize>) -> Sessions {
    let mut all = server.sessions();
    all.retain(|session| listener.is_none_or(|name| *session.listener == *name));
    all.sort_by_key(|session| std::cmp::Reverse(session.age));
    let count = all.len() as u64;
    all.truncate(limit.unwrap_or(usize::MAX));
    let row = |session: Snapshot| SessionRow {
        listener: session.listener.to_string(),
        engine: session.engine.to_owned(),
        client: session.client,
        local: session.local,
        backend: session.backend,
        age_ms: millis(session.age),
        bytes_to_backend: session.to_backend,
        bytes_to_client: session.to_client,
    };
    Sessions { count, rows: all.into_iter().map(row).collect() }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
