//! Carries out the commands of the operator.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex as StdMutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, ensure};
use tokio::sync::{Mutex, watch};

use super::{
    bans, dry_run,
    status::{end_sessions, sessions, status},
    wire::{Answer, BackendAction, ConfigStatus, DryRun, GuardStatus, Reloaded, Reply, Request, Status},
};
use crate::{
    backend::AdminState,
    config::{self, Config, ConfigError, Listener, LogLevel},
    guard,
    os::systemd,
    server::{ActiveListener, Changes, Server},
    telemetry::{
        log::{LevelChange, Logging, target},
        metrics::{Metrics, Readiness},
    },
};

/// Loads the configuration again, with the same overrides as at startup.
pub type ConfigSource = Box<dyn Fn() -> Result<Config, ConfigError> + Send + Sync>;

/// Carries out commands on the server. Clones share one server.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

struct Shared {
    /// `None` once the daemon shuts down.
    server: Mutex<Option<Server>>,
    guard: Option<guard::Service>,
    source: ConfigSource,
    file: PathBuf,
    metrics: Metrics,
    logging: Logging,
    /// The configured level of the log.
    log_level: StdMutex<LogLevel>,
    ready: watch::Sender<Readiness>,
    started: Instant,
    config_status: StdMutex<ConfigStatus>,
}

impl Control {
    /// `source` loads `file`, from which the configuration of `server` came, and the log with its
    /// configured level.
    #[must_use]
    pub fn new(
        (server, guard): (Server, Option<guard::Service>),
        file: PathBuf,
        source: ConfigSource,
        metrics: Metrics,
        (logging, log_level): (Logging, LogLevel),
        ready: watch::Sender<Readiness>,
    ) -> Self {
        let config_status =
            ConfigStatus { file: file.clone(), loaded_at: unix_seconds(), reload_error: None };
        Self(Arc::new(Shared {
            server: Mutex::new(Some(server)),
            guard,
            source,
            file,
            metrics,
            logging,
            log_level: StdMutex::new(log_level),
            ready,
            started: Instant::now(),
            config_status: StdMutex::new(config_status),
        }))
    }

    /// Carries out a request.
    pub async fn answer(&self, request: Request) -> Reply {
        reply(self.carry_out(request).await)
    }

    async fn carry_out(&self, request: Request) -> anyhow::Result<Answer> {
        match request {
            // Without the server: a change of bans may wait long for another one.
            Request::Ban { network, duration_ms, reason, force } => {
                let end = self.end_banned_sessions();
                bans::ban(self.guard(), &network, duration_ms, reason, force, end).await
            }
            Request::Unban { network } => bans::unban(self.guard(), &network).await,
            Request::Bans { origin, limit } => bans::list(self.guard(), origin, limit),
            Request::LogLevel { levels } => self.set_log_level(&levels),
            Request::Status => {
                self.with_server(|server| Ok(Answer::Status(Box::new(self.status(server))))).await
            }
            Request::Sessions { listener, limit } => {
                let list = |server: &mut Server| Ok(sessions(server, listener.as_deref(), limit));
                self.with_server(list).await.map(Answer::Sessions)
            }
            Request::EndSessions { target, listener } => {
                let end = |server: &mut Server| end_sessions(server, &target, listener.as_deref());
                self.with_server(end).await.map(|count| Answer::SessionsEnded { count })
            }
            Request::Drain { listener, deadline_ms } => {
                let deadline = deadline_ms.map(Duration::from_millis);
                let drain = |server: &mut Server| server.drain(listener.as_deref(), deadline);
                self.with_server(drain).await.map(|listeners| Answer::Drained { listeners })
            }
            Request::Resume { listener } => {
                let resume = |server: &mut Server| server.resume(listener.as_deref());
                self.with_server(resume).await.map(|listeners| Answer::Resumed { listeners })
            }
            Request::Backend { action, listener, backend } => {
                let set =
                    |server: &mut Server| set_backend_state(server, action, listener.as_deref(), &backend);
                self.with_server(set).await.map(|listeners| Answer::BackendSet { listeners })
            }
            Request::BackendWeight { weight, listener, backend } => {
                let set =
                    |server: &mut Server| set_backend_weight(server, weight, listener.as_deref(), &backend);
                self.with_server(set).await.map(|listeners| Answer::BackendWeightSet { listeners, weight })
            }
            Request::Reload => {
                self.with_server(|server| self.reload(server)).await.map(|it| Answer::Reloaded(reloaded(it)))
            }
            Request::DryRun => {
                let rehearse = |server: &mut Server| Ok((self.rehearse(server), server.watcher().clone()));
                let ((mut dry_run, to_try), watcher) = self.with_server(rehearse).await?;
                // Without the server: backends answer when they like.
                dry_run::try_backends(&mut dry_run, &to_try, &watcher).await;
                Ok(Answer::DryRun(dry_run))
            }
        }
    }

    /// Acts on the server, and publishes whether it is ready then.
    async fn with_server<T>(&self, act: impl FnOnce(&mut Server) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let mut locked = self.0.server.lock().await;
        let server = locked.as_mut().context("the injector is stopping")?;
        let result = act(server);
        let readiness = if server.is_drained() { Readiness::Draining } else { Readiness::Ready };
        self.0.ready.send_if_modified(|now| std::mem::replace(now, readiness) != readiness);
        result
    }

    /// Ends the sessions of sources that are banned now, and returns their number.
    pub async fn end_banned_sessions(&self) -> usize {
        match (self.0.server.lock().await.as_ref(), self.guard()) {
            (Some(server), Some(guard)) => bans::end_sessions(server, guard.guard()),
            _ => 0,
        }
    }

    /// The addresses of all backends, as last resolved.
    pub async fn backend_addresses(&self) -> BTreeSet<IpAddr> {
        let server = self.0.server.lock().await;
        server.as_ref().map(Server::backend_addresses).unwrap_or_default()
    }

    fn guard(&self) -> Option<&guard::Service> {
        self.0.guard.as_ref()
    }

    /// Takes the server, to shut it down. Requests are rejected from here on.
    pub async fn take_server(&self) -> Option<Server> {
        let server = self.0.server.lock().await.take();
        self.0.ready.send_replace(Readiness::Stopping);
        server
    }

    /// Whether every worker thread responds.
    pub async fn check_liveness(&self) -> bool {
        let liveness = match self.0.server.lock().await.as_ref() {
            Some(server) => server.check_liveness(),
            None => return true,
        };
        liveness.await
    }

    fn status(&self, server: &mut Server) -> Status {
        let config = self.0.config_status.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let readiness = self.0.ready.borrow().to_string();
        let guard = self.guard().map(GuardStatus::of);
        Status {
            guard,
            ..status(server, config, self.0.logging.levels(), readiness, self.0.started.elapsed())
        }
    }

    fn set_log_level(&self, levels: &[String]) -> anyhow::Result<Answer> {
        let changes: Result<Vec<LevelChange>, _> = levels.iter().map(|level| level.parse()).collect();
        let configured = *self.0.log_level.lock().unwrap_or_else(PoisonError::into_inner);
        let levels = self.0.logging.set_levels(configured, &changes?);
        tracing::info!(target: target::CONTROL, levels, "log level changed by the operator, until the next reload");
        Ok(Answer::LogLevelSet { levels })
    }

    /// What a reload would do, and the listeners whose backends are still to be tried.
    fn rehearse(&self, server: &Server) -> (DryRun, Vec<Listener>) {
        match (self.0.source)() {
            Ok(config) => dry_run::rehearse(server, config),
            Err(error) => (DryRun { error: Some(error.to_string()), ..DryRun::default() }, Vec::new()),
        }
    }

    fn reload(&self, server: &mut Server) -> anyhow::Result<Changes> {
        systemd::reloading();
        let config = (self.0.source)().map_err(anyhow::Error::from);
        let result = config.inspect(log_remarks).and_then(|config| {
            let (level, guard) = (config.log.level, config.guard.clone());
            Ok((server.prepare(config)?, level, guard))
        });
        let result = result.map(|(prepared, level, lists)| {
            *self.0.log_level.lock().unwrap_or_else(PoisonError::into_inner) = level;
            self.0.logging.reset_levels(level);
            if let (Some(guard), Some(lists)) = (self.guard(), lists) {
                guard.set_lists(&lists);
            }
            server.apply(prepared)
        });
        systemd::ready("serving");
        self.0.metrics.config_reloaded(result.is_ok());
        let mut config_status = self.0.config_status.lock().unwrap_or_else(PoisonError::into_inner);
        match &result {
            Ok(Changes { added, changed, removed, requires_restart }) => {
                *config_status =
                    ConfigStatus { file: self.0.file.clone(), loaded_at: unix_seconds(), reload_error: None };
                tracing::info!(target: target::CONFIG, ?added, ?changed, ?removed, "configuration reloaded");
                if !requires_restart.is_empty() {
                    tracing::warn!(target: target::CONFIG, sections = ?requires_restart, "changes in these sections need a restart");
                }
            }
            Err(error) => {
                config_status.reload_error = Some(format!("{error:#}"));
                tracing::error!(target: target::CONFIG, error = format!("{error:#}"), "reload failed; the previous configuration stays in effect");
            }
        }
        result
    }
}

fn reply(answer: anyhow::Result<Answer>) -> Reply {
    match answer {
        Ok(answer) => Reply::Ok(answer),
        Err(error) => Reply::Error(format!("{error:#}")),
    }
}

/// Logs what in the configuration is valid and probably a mistake.
pub fn log_remarks(config: &Config) {
    for remark in config::remarks(config) {
        tracing::warn!(target: target::CONFIG, remark, "the configuration is valid, and this is probably a mistake");
    }
}

fn reloaded(changes: Changes) -> Reloaded {
    let Changes { added, changed, removed, requires_restart } = changes;
    let restart_needed_for = requires_restart.into_iter().map(str::to_owned).collect();
    Reloaded { added, changed, removed, restart_needed_for }
}

/// Sets the state of a backend in one listener, or in all listeners that have it.
fn set_backend_state(
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
    let listeners = listeners_with(server, listener, backend)?;
    let set = listeners.iter().filter(|active| active.backends.set_admin_state(backend, admin_state));
    Ok(set.map(|active| active.settings.name.clone()).collect())
}

/// Sets the weight of a backend in one listener, or in all listeners that have it; in none if one
/// of them would have no primary backend left.
fn set_backend_weight(
    server: &Server,
    weight: u32,
    listener: Option<&str>,
    backend: &str,
) -> anyhow::Result<Vec<String>> {
    let max = config::Backend::MAX_WEIGHT;
    ensure!(weight <= max, "weight {weight}: must be 0 to {max}");
    let listeners = listeners_with(server, listener, backend)?;
    for active in &listeners {
        let name = &active.settings.name;
        ensure!(
            active.backends.may_have_weight(backend, weight),
            "listener {name:?}: {}; `injector drain` rejects new clients, and `injector backend down` \
             disables a backend",
            config::PRIMARY_REQUIRED
        );
    }
    let set = listeners.iter().filter(|active| active.backends.set_weight(backend, weight));
    Ok(set.map(|active| active.settings.name.clone()).collect())
}

/// The listeners that have this backend, of one name or of all.
///
/// # Errors
/// When there is none.
fn listeners_with<'a>(
    server: &'a Server,
    listener: Option<&str>,
    backend: &str,
) -> anyhow::Result<Vec<&'a ActiveListener>> {
    let of = || {
        server.listeners().iter().filter(|active| listener.is_none_or(|name| active.settings.name == name))
    };
    let names = |active: &ActiveListener| {
        active.backends.all().iter().map(|it| it.configured().to_string()).collect::<Vec<_>>()
    };
    let with: Vec<_> = of().filter(|active| names(active).iter().any(|name| name == backend)).collect();
    if with.is_empty() {
        let mut all: Vec<_> = of().flat_map(names).collect();
        all.sort_unstable();
        all.dedup();
        let which = listener.map_or(String::new(), |name| format!(" of listener {name:?}"));
        anyhow::bail!("no backend is named {backend:?}{which}; configured backends: {}", all.join(", "));
    }
    Ok(with)
}

/// Seconds since 1970.
fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
