//! The operator's side of a running daemon: a unix socket on which `injector status` and its like are answered.
//!
//! One connection, one line of JSON with the [`Request`], one line with the [`Reply`]. The socket's mode (0600) is all the
//! protection there is: whoever may open it may do everything.

pub mod client;
mod server;
mod show;
pub mod top;
mod watch_file;
pub mod wire;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio::sync::{Mutex, watch};

use self::wire::{
    Answer, BackendAction, BackendStatus, ConfigStatus, EngineStatus, ListenerStatus, Reloaded,
    RemovedListenerStatus, SessionRow, Sessions, Status,
};
pub use self::{
    server::{ControlSocket, SocketError},
    watch_file::watch,
    wire::{Reply, Request},
};
use crate::{
    backend::{AdminState, Backend},
    config::{Config, ConfigError},
    os::systemd,
    server::{ActiveListener, Changes, Server},
    telemetry::{
        log::target,
        metrics::{Metrics, Readiness},
    },
};

/// Reads the configuration again, as it was read at the start.
pub type ConfigSource = Box<dyn Fn() -> Result<Config, ConfigError> + Send + Sync>;

/// What the operator can have done. Clones share it.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

struct Shared {
    /// `None` once it stops.
    server: Mutex<Option<Server>>,
    source: ConfigSource,
    file: PathBuf,
    metrics: Metrics,
    ready: watch::Sender<Readiness>,
    started: Instant,
    read: std::sync::Mutex<ConfigStatus>,
}

impl Control {
    /// Over `server`, whose configuration came from `source`, which reads `file`.
    #[must_use]
    pub fn new(
        server: Server,
        file: PathBuf,
        source: ConfigSource,
        metrics: Metrics,
        ready: watch::Sender<Readiness>,
    ) -> Self {
        let read = ConfigStatus { file: file.clone(), loaded_at: since_1970(), reload_error: None };
        Self(Arc::new(Shared {
            server: Mutex::new(Some(server)),
            source,
            file,
            metrics,
            ready,
            started: Instant::now(),
            read: std::sync::Mutex::new(read),
        }))
    }

    /// Does what is asked.
    pub async fn answer(&self, request: Request) -> Reply {
        let mut server = self.0.server.lock().await;
        let Some(server) = server.as_mut() else {
            return Reply::Error("the injector is stopping".to_owned());
        };
        let answer = match request {
            Request::Status => Ok(Answer::Status(Box::new(self.status(server)))),
            Request::Sessions { listener, limit } => {
                Ok(Answer::Sessions(sessions(server, listener.as_deref(), limit)))
            }
            Request::Drain { listener, deadline_ms } => server
                .drain(listener.as_deref(), deadline_ms.map(Duration::from_millis))
                .map(|listeners| Answer::Drained { listeners }),
            Request::Resume { listener } => {
                server.resume(listener.as_deref()).map(|listeners| Answer::Resumed { listeners })
            }
            Request::Backend { action, listener, backend } => {
                backend_set(server, action, listener.as_deref(), &backend)
                    .map(|listeners| Answer::BackendSet { listeners })
            }
            Request::Reload => self.reload(server).map(|changes| Answer::Reloaded(reloaded(changes))),
        };
        let readiness = if server.is_drained() { Readiness::Draining } else { Readiness::Ready };
        self.0.ready.send_if_modified(|now| std::mem::replace(now, readiness) != readiness);
        match answer {
            Ok(answer) => Reply::Ok(answer),
            Err(error) => Reply::Error(format!("{error:#}")),
        }
    }

    /// Takes away what is served, to end it: from here on nothing can be asked for.
    pub async fn take_server(&self) -> Option<Server> {
        let server = self.0.server.lock().await.take();
        self.0.ready.send_replace(Readiness::Stopping);
        server
    }

    /// Whether everything that serves connections does its work.
    pub async fn check_liveness(&self) -> bool {
        let liveness = match self.0.server.lock().await.as_ref() {
            Some(server) => server.check_liveness(),
            None => return true,
        };
        liveness.await
    }

    fn reload(&self, server: &mut Server) -> anyhow::Result<Changes> {
        systemd::reloading();
        let result = (self.0.source)().map_err(anyhow::Error::from).and_then(|config| server.prepare(config));
        let result = result.map(|prepared| server.apply(prepared));
        systemd::ready("serving");
        self.0.metrics.config_reloaded(result.is_ok());
        let mut read = self.0.read.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &result {
            Ok(Changes { added, changed, removed, requires_restart }) => {
                *read =
                    ConfigStatus { file: self.0.file.clone(), loaded_at: since_1970(), reload_error: None };
                tracing::info!(target: target::CONFIG, ?added, ?changed, ?removed, "configuration reloaded");
                if !requires_restart.is_empty() {
                    tracing::warn!(target: target::CONFIG, sections = ?requires_restart, "changes in these sections need a restart");
                }
            }
            Err(error) => {
                read.reload_error = Some(format!("{error:#}"));
                tracing::error!(target: target::CONFIG, error = format!("{error:#}"), "reload failed; the previous configuration stays in effect");
            }
        }
        result
    }

    fn status(&self, server: &mut Server) -> Status {
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
            uptime_ms: millis(self.0.started.elapsed()),
            readiness: self.0.ready.borrow().to_string(),
            config: self.0.read.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone(),
            connections: connections as u64,
            max_connections: max_connections as u64,
            backlog_bytes: server.backlog(),
            engines: vec![
                engine("inline", probes.inline.failure()),
                engine("splice", probes.splice.failure()),
                engine("relay", None),
            ],
            listeners: server.listeners().iter().map(listener).collect(),
            removed_listeners,
        }
    }
}

fn listener(active: &ActiveListener) -> ListenerStatus {
    let counts = active.metrics.snapshot();
    ListenerStatus {
        name: active.config.name.clone(),
        protocol: active.config.protocol.name().to_owned(),
        engine: active.engine.as_ref().map_or("inline", |engine| engine.name()).to_owned(),
        bind: active.config.bind.clone(),
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
        backends: active.backends.all().iter().map(backend).collect(),
    }
}

fn backend(backend: &Backend) -> BackendStatus {
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

fn reloaded(changes: Changes) -> Reloaded {
    let Changes { added, changed, removed, requires_restart } = changes;
    let restart_needed_for = requires_restart.into_iter().map(str::to_owned).collect();
    Reloaded { added, changed, removed, restart_needed_for }
}

/// The oldest first.
fn sessions(server: &Server, listener: Option<&str>, limit: Option<usize>) -> Sessions {
    let mut all = server.sessions();
    all.retain(|session| listener.is_none_or(|name| *session.listener == *name));
    all.sort_by_key(|session| std::cmp::Reverse(session.age));
    let count = all.len() as u64;
    all.truncate(limit.unwrap_or(usize::MAX));
    let row = |session: crate::session::registry::Snapshot| SessionRow {
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

/// Of one listener, or of all that have it.
fn backend_set(
    server: &Server,
    action: BackendAction,
    listener: Option<&str>,
    backend: &str,
) -> anyhow::Result<Vec<String>> {
    let admin_state = match action {
        BackendAction::Up => AdminState::Up,
        BackendAction::Down => AdminState::Down,
        BackendAction::Auto => AdminState::Auto,
    };
    let of =
        || server.listeners().iter().filter(|active| listener.is_none_or(|name| active.config.name == name));
    let set: Vec<_> = of()
        .filter(|active| active.backends.set_admin_state(backend, admin_state))
        .map(|active| active.config.name.clone())
        .collect();
    if set.is_empty() {
        let mut all: Vec<_> =
            of().flat_map(|active| active.backends.all()).map(|it| it.configured().to_string()).collect();
        all.sort_unstable();
        all.dedup();
        let which = listener.map_or(String::new(), |name| format!(" of listener {name:?}"));
        anyhow::bail!("no backend is named {backend:?}{which}; configured backends: {}", all.join(", "));
    }
    Ok(set)
}

/// Seconds.
fn since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
