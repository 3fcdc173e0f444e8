//! What the daemon answers to `status` and `sessions`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::bail;

use super::{
    target::{SessionId, SessionTarget},
    wire::{
        BackendStatus, ConfigStatus, EngineStatus, ListenerStatus, RemovedListenerStatus, ServiceStatus,
        SessionRow, Sessions, Status,
    },
};
use crate::{
    backend::Backend,
    engine::usage::InlineConnection,
    kubernetes::{Endpoints, Readiness, WatchState, WatchedService},
    server::{ActiveListener, Server},
    session::registry::Snapshot,
    telemetry::log::target,
};

/// The state of the daemon, whose configuration, log level, readiness and uptime the caller knows.
pub(super) fn status(
    server: &mut Server,
    config: ConfigStatus,
    log_level: String,
    readiness: String,
    uptime: Duration,
) -> Status {
    server.refresh_metrics();
    let connections = server.connections();
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
        log_level,
        connections: (connections.sessions + connections.inline) as u64,
        inline_connections: connections.inline as u64,
        max_connections: connections.max as u64,
        backlog_bytes: server.backlog(),
        engines: vec![
            engine("inline", probes.inline.failure()),
            engine("splice", probes.splice.failure()),
            engine("relay", None),
        ],
        guard: None,
        services: server.watcher().watched().into_iter().map(service_status).collect(),
        listeners: server.listeners().iter().map(listener_status).collect(),
        removed_listeners,
    }
}

fn listener_status(active: &ActiveListener) -> ListenerStatus {
    let counts = active.counters();
    ListenerStatus {
        name: active.settings.name.clone(),
        protocol: active.settings.protocol.name().to_owned(),
        engine: active.selection.label(),
        bind: active.settings.bind.clone(),
        virtual_addresses: active.virtual_addresses.current(),
        draining: active.drain.is_some(),
        abort_in_ms: active
            .drain
            .map(|drain| millis(drain.deadline.saturating_duration_since(Instant::now()))),
        active: counts.active,
        active_inline: active.inline_connections(),
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
        weight: backend.weight(),
        configured_weight: Some(backend.configured().weight).filter(|weight| *weight != backend.weight()),
        backup: backend.configured().backup,
        state: backend.health_state(),
        addresses: backend.addresses(),
        failing_addresses: backend.failing_addresses(),
        active: stats.active,
        sessions: stats.sessions,
        checks_passed: stats.passed,
        checks_failed: stats.failed,
        ejections: stats.ejections,
        headers_misread: stats.misread,
        misreads_header: backend.misreads_header(),
    }
}

fn service_status(watched: WatchedService) -> ServiceStatus {
    let WatchState { last_answer, error, .. } = watched.state;
    let by_state = |endpoints: Arc<Endpoints>| {
        Readiness::ALL.map(|it| (it.name().to_owned(), endpoints.with(it))).into()
    };
    ServiceStatus {
        service: watched.service.to_string(),
        resource: watched.resource.to_owned(),
        endpoints: watched.endpoints.map(by_state),
        answered_ms_ago: last_answer.map(|at| millis(at.elapsed().unwrap_or_default())),
        error,
    }
}

/// The sessions of one listener or of all, the oldest first.
pub(super) fn sessions(server: &Server, listener: Option<&str>, limit: Option<usize>) -> Sessions {
    let mut all: Vec<_> = server.sessions().into_iter().map(session_row).collect();
    all.extend(server.inline_connections().into_iter().map(inline_row));
    all.retain(|row| listener.is_none_or(|name| row.listener == *name));
    all.sort_by_key(|row| std::cmp::Reverse(row.age_ms));
    let count = all.len() as u64;
    all.truncate(limit.unwrap_or(usize::MAX));
    Sessions { count, rows: all }
}

/// Ends the sessions that `target` names, of one listener or of all. Returns their number.
///
/// # Errors
/// When `target` is not an id, an address or a network, or no session matches.
pub(super) fn end_sessions(server: &Server, target: &str, listener: Option<&str>) -> anyhow::Result<u64> {
    let wanted: SessionTarget = target.parse().map_err(anyhow::Error::msg)?;
    let of_listener = |name: &str| listener.is_none_or(|wanted| wanted == name);
    let count = server.end_sessions(
        |id, client, name| of_listener(name) && wanted.matches(SessionId::Session(id), client),
        |it| of_listener(&it.listener) && wanted.matches(SessionId::Inline(it.id), it.client),
    );
    if count == 0 {
        let which = listener.map_or(String::new(), |name| format!(" of listener {name:?}"));
        bail!("no session{which} matches {target:?}; `injector sessions` lists them");
    }
    tracing::info!(target: target::CONTROL, count, listener, "sessions ended by the operator");
    Ok(count as u64)
}

fn session_row(session: Snapshot) -> SessionRow {
    SessionRow {
        id: SessionId::Session(session.id).to_string(),
        listener: session.listener.to_string(),
        engine: session.engine.to_owned(),
        client: session.client,
        local: session.local,
        backend: session.backend,
        age_ms: millis(session.age),
        bytes_to_backend: session.to_backend,
        bytes_to_client: session.to_client,
    }
}

fn inline_row(connection: InlineConnection) -> SessionRow {
    SessionRow {
        id: SessionId::Inline(connection.id).to_string(),
        listener: connection.listener.to_string(),
        engine: "inline".to_owned(),
        client: connection.client,
        local: connection.local,
        backend: Some(connection.backend),
        age_ms: millis(connection.age),
        bytes_to_backend: connection.to_backend,
        bytes_to_client: connection.to_client,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
