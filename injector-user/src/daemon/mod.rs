//! `injector run`: the order of startup, service and shutdown.
//!
//! Opening sockets and loading programs needs capabilities. Serving connections does not.

mod bans;
mod engine_metrics;
mod listen_sockets;
mod open_files;
mod privileges;
mod signals;
mod watchdog;

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use socket2::Socket;
use tokio::{runtime, sync::watch};
use tokio_util::sync::CancellationToken;

use self::signals::{Event, Signals};
use crate::{
    config::{Config, LogLevel},
    control::{self, ConfigSource, Control, ControlSocket, Request},
    engine::{
        kernel::{self, InlineEngine, KernelGuard},
        registry::EngineProbes,
        select,
    },
    guard,
    kubernetes::{Followed, Watcher},
    listener,
    os::{allocator, systemd},
    server::{ListenerSetup, Server, StartupSettings, StartupState},
    telemetry::{
        backlog::BacklogTotal,
        log::{Logging, target},
        metrics::{Metrics, Readiness, http},
    },
};

/// How long tasks may take to end once no session is left.
const EXIT_GRACE: Duration = Duration::from_secs(1);

/// Runs the daemon until a signal stops it. `source` reads `file` again for a reload.
///
/// # Errors
/// When the daemon cannot start; the message states what to do.
pub fn run(config: Config, file: PathBuf, source: ConfigSource, logging: &Logging) -> anyhow::Result<()> {
    control::log_remarks(&config);
    let Config { metrics, health, admin, limits, splice, inline, kubernetes, guard, stop, log, listeners } =
        config;
    let open_files = open_files::raise_limit(limits, &listeners)?;

    // First, because its error names the process if another daemon runs with this configuration.
    let control_socket = admin.as_ref().map(|it| ControlSocket::open(&it.socket)).transpose()?;
    let inherited = systemd::listen_sockets().context("taking over systemd's sockets")?;
    let sockets = listen_sockets::bind_all(&listeners, limits.workers, &inherited)?;
    let metrics_socket = metrics.map(|it| listener::bind(it.listen)).transpose().context("metrics.listen")?;
    let health_socket = health.map(|it| listener::bind(it.listen)).transpose().context("health.listen")?;
    let mut probes = EngineProbes::not_run("not used by any listener");
    let connections = limits.max_connections.min(open_files.capacity);
    select::test_splice(&splice.watermarks, connections, &listeners, &mut probes);
    // After the sockets, because they get what the inline engine does not take.
    let mut kernel_guard = kernel::start_guard(guard.as_ref(), inline.attachment)?;
    let inline_engine = select::start_inline(&inline, &listeners, kernel_guard.as_ref(), &mut probes)?;
    if let Some(guard) = &mut kernel_guard {
        guard.attach();
    }
    let selections: anyhow::Result<Vec<_>> =
        listeners.iter().map(|listener| select::select(listener, &probes)).collect();
    privileges::drop_privileges(
        &probes,
        inline_engine.as_ref(),
        kernel_guard.as_ref(),
        &file,
        &kubernetes,
        admin.as_ref(),
        guard.as_ref(),
    );
    let _log_thread = logging.start_thread().context("starting the thread that writes the log")?;
    let bans = guard
        .as_ref()
        .map(|guard| bans::start(guard, kernel_guard.as_ref(), &inline.peers.listed))
        .transpose()?;

    let listeners = listeners.into_iter().zip(selections?).zip(sockets);
    let setup = |((settings, selection), sockets)| ListenerSetup { settings, selection, sockets };
    let startup = StartupState {
        settings: StartupSettings {
            metrics,
            health,
            admin,
            workers: limits.workers,
            splice,
            inline,
            kubernetes: kubernetes.clone(),
            guard: guard.clone(),
            log_format: log.format,
        },
        max_connections: limits.max_connections,
        guard,
        bans: bans.as_ref().map(|bans| bans.guard().clone()),
        watcher: Watcher::new(kubernetes),
        stop_deadline: stop.deadline,
        listeners: listeners.map(setup).collect(),
        inherited,
        probes,
        inline_usage: inline_engine.as_ref().map(InlineEngine::usage),
        nofile: open_files.nofile,
        capacity: open_files.capacity,
    };
    let operator =
        OperatorSockets { metrics: metrics_socket, health: health_socket, control: control_socket };
    // One thread for everything except connections, which the worker threads serve.
    let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.context("starting the runtime")?;
    let configured = (file, source, (logging.clone(), log.level));
    let engines = (inline_engine, kernel_guard);
    let result = runtime.block_on(serve(startup, engines, bans.clone(), operator, configured));
    if let Some(bans) = bans {
        bans.stop();
    }
    // Not by dropping it: that waits for a name that is being resolved, however long this takes.
    runtime.shutdown_timeout(EXIT_GRACE);
    result
}

/// The sockets on which the operator reaches the daemon.
struct OperatorSockets {
    metrics: Option<Socket>,
    health: Option<Socket>,
    control: Option<ControlSocket>,
}

async fn serve(
    startup: StartupState,
    (inline_engine, kernel_guard): (Option<InlineEngine>, Option<KernelGuard>),
    bans: Option<guard::Service>,
    operator: OperatorSockets,
    (file, source, log): (PathBuf, ConfigSource, (Logging, LogLevel)),
) -> anyhow::Result<()> {
    // First, because a signal during startup must not end the process without a shutdown.
    let mut signals = Signals::install()?;

    let metrics = Metrics::new();
    let (ready, readiness) = watch::channel(Readiness::Starting);
    let backlog_total = BacklogTotal::default();
    engine_metrics::observe(&metrics, &startup.probes);
    metrics.watch_backlog(backlog_total.clone());
    metrics.watch_log(log.0.clone());
    let stop_http = CancellationToken::new();
    let health = http::health(metrics.clone(), readiness);
    if let Some(socket) = operator.metrics {
        let socket = tokio::net::TcpListener::from_std(socket.into()).context("metrics.listen")?;
        tokio::spawn(http::serve(
            socket,
            http::with_metrics(health.clone(), metrics.clone()),
            stop_http.clone(),
        ));
    }
    if let Some(socket) = operator.health {
        let socket = tokio::net::TcpListener::from_std(socket.into()).context("health.listen")?;
        tokio::spawn(http::serve(socket, health, stop_http.clone()));
    }

    let guard_settings = startup.guard.clone();
    let peers = Followed::endpoints(&startup.settings.inline.peers, &startup.watcher);
    metrics.watch_services(Arc::new(startup.watcher.clone()));
    let server = Server::start(startup, &metrics, &backlog_total)?;
    if let Some(inline_engine) = inline_engine {
        let (listeners, health) = server.inline_updates();
        inline_engine.spawn_tasks(&metrics, listeners, health, peers.clone());
    }
    if let Some(guard) = kernel_guard {
        guard.spawn_tasks(server.listen_addresses());
    }
    if let (Some(bans), Some(settings)) = (&bans, &guard_settings) {
        metrics.watch_guard(Arc::new(bans.clone()));
        bans.start_crowdsec(settings, metrics.crowdsec()).context("guard.crowdsec")?;
    }
    // Ready means that each worker has started its acceptors.
    ensure!(server.check_liveness().await, "a worker thread exited during startup");
    ready.send_replace(Readiness::Ready);
    metrics.config_loaded();

    let control = Control::new((server, bans.clone()), file, source, metrics, log, ready);
    if let Some(bans) = bans {
        tokio::spawn(bans::follow(control.clone(), bans, peers));
    }
    if let Some(socket) = operator.control {
        tokio::spawn(serve_control(socket, control.clone()));
    }
    tokio::spawn(watchdog::feed_watchdog(control.clone()));
    // On the thread of the self-tests, which used much that nothing after them needs.
    allocator::release_unused();
    systemd::ready("serving");

    while signals.next().await == Event::Reload {
        // The reload logs its result.
        drop(control.answer(Request::Reload).await);
    }
    if let Some(server) = control.take_server().await {
        let deadline = server.stop_deadline();
        systemd::stopping(deadline);
        server.shutdown(deadline, signals.shutdown()).await;
    }
    stop_http.cancel();
    Ok(())
}

async fn serve_control(socket: ControlSocket, control: Control) {
    if let Err(error) = socket.serve(control).await {
        tracing::error!(target: target::CONTROL, %error, "control socket failed; status, drain and reload are unavailable until a restart, mail is not affected");
    }
}
