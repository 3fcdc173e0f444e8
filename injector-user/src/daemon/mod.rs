//! `injector run`: everything that needs rights first, then without them until the stop.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context as _, bail, ensure};
use caps::Capability;
use socket2::Socket;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, EngineChoice, Listener},
    control::{self, Control, Request},
    engine::{
        kernel::{self, InlineEngine, LoadedSplice},
        registry::EngineProbes,
        select,
    },
    listener,
    os::{capabilities, rlimit, systemd},
    server::{self, BoundSockets, Server, StartupState},
    telemetry::{
        backlog::BacklogTotal,
        log::target,
        metrics::{Metrics, Readiness, http},
    },
};

/// Runs what `source` reads from `file`, until it is told to stop.
///
/// # Errors
/// When it cannot start; each says what to do.
pub fn run(mut config: Config, file: PathBuf, source: control::ConfigSource) -> anyhow::Result<()> {
    let nofile = rlimit::raise_nofile();
    let capacity = server::connection_capacity(&config, nofile);
    if capacity == 0 {
        bail!(
            "the open-file limit ({nofile}) is too low for even one connection: raise it (LimitNOFILE= in systemd, \
             ulimit -n)"
        );
    }
    let wanted = config.limits.max_connections;
    if capacity < wanted {
        tracing::warn!(target: target::DAEMON,
            nofile,
            connections = capacity,
            wanted,
            "the open-file limit allows fewer connections than limits.max_connections; connections above it are \
             rejected: raise it to {} (LimitNOFILE= in systemd, ulimit -n)",
            listener::required_fds(wanted, server::listen_socket_count(&config), config.limits.workers)
        );
    }

    // With all rights: sockets, programs. Listeners that become inline have no sockets.
    let mut probes = EngineProbes::not_run("no listener asks for it");
    let selections = select::select_inline(&mut config, &mut probes)?;
    let inherited = systemd::listen_sockets().context("taking over systemd's sockets")?;
    let sockets = bind_all(&config, &inherited)?;
    let exporter = match config.metrics {
        Some(metrics) => Some(listener::bind(metrics.listen).context("metrics.listen")?),
        None => None,
    };
    let admin = match &config.admin {
        Some(admin) => Some(control::ControlSocket::open(&admin.socket)?),
        None => None,
    };
    if config.listeners.iter().any(|listener| select::may_splice(listener.engine)) {
        probes
            .probe_splice(u32::try_from(wanted.min(capacity)).unwrap_or(u32::MAX), &config.splice.watermarks);
        probes.splice.log("splice");
    }
    let engines = select::select_engines(&config, &selections, &probes)?;
    let inline = kernel::start_inline(&config)?;

    // Without.
    drop_capabilities(&probes, inline.as_ref());
    // For all but the connections; see `worker`.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let startup = StartupState { config, selections, sockets, inherited, engines, probes, nofile };
    let operator = Operator { exporter, admin, file, source };
    runtime.context("starting the runtime")?.block_on(serve(startup, operator, inline))
}

/// How the operator sees the daemon, and is heard.
struct Operator {
    exporter: Option<Socket>,
    admin: Option<control::ControlSocket>,
    file: PathBuf,
    source: control::ConfigSource,
}

/// The sockets of each listener.
fn bind_all(config: &Config, inherited: &[(SocketAddr, Socket)]) -> anyhow::Result<Vec<BoundSockets>> {
    let bind = |listener: &Listener| {
        // Its packets never reach a socket.
        if listener.engine == EngineChoice::Inline {
            return Ok(Vec::new());
        }
        let bind = |address: &SocketAddr| {
            let sockets = server::bind(*address, inherited, config.limits.workers, listener)?;
            Ok((*address, sockets))
        };
        let sockets: anyhow::Result<BoundSockets> = listener.bind.iter().map(bind).collect();
        sockets.with_context(|| format!("listener {:?}", listener.name))
    };
    let used = |address: &SocketAddr| config.listeners.iter().any(|listener| listener.bind.contains(address));
    for (address, _) in inherited.iter().filter(|(address, _)| !used(address)) {
        tracing::warn!(target: target::DAEMON, %address, "systemd passed a socket for this address, but no listener binds it; its clients are never accepted: \
             add the address to a listener or remove it from the .socket unit");
    }
    config.listeners.iter().map(bind).collect()
}

/// Drops every capability that is not needed any more: a reload may add ports below 1024, and a kernel engine says what it
/// needs.
fn drop_capabilities(probes: &EngineProbes, inline: Option<&InlineEngine>) {
    let mut keep = vec![Capability::CAP_NET_BIND_SERVICE];
    keep.extend(inline.map(InlineEngine::capabilities).unwrap_or_default());
    keep.extend(probes.splice_engine().map(LoadedSplice::capabilities).unwrap_or_default());
    match capabilities::drop_all_except(&keep) {
        Ok(kept) => tracing::info!(target: target::DAEMON, ?kept, "capabilities dropped"),
        Err(error) => {
            tracing::warn!(target: target::DAEMON, %error, "dropping capabilities failed; the daemon keeps all of them");
        }
    }
}

async fn serve(
    startup: StartupState,
    operator: Operator,
    inline: Option<InlineEngine>,
) -> anyhow::Result<()> {
    // First, so that no signal ends the process unheard.
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("listening for SIGHUP")?;

    let metrics = Metrics::new();
    let (ready, readiness) = watch::channel(Readiness::Starting);
    let backlog_total = BacklogTotal::default();
    observe(&metrics, &startup.probes);
    metrics.watch_backlog(backlog_total.clone());
    let exporting = CancellationToken::new();
    let Operator { exporter, admin, file, source } = operator;
    if let Some(exporter) = exporter {
        let exporter = tokio::net::TcpListener::from_std(exporter.into()).context("metrics.listen")?;
        tokio::spawn(http::serve(exporter, metrics.clone(), readiness, exporting.clone()));
    }

    let server = Server::start(startup, &metrics, &backlog_total)?;
    if let Some(inline) = inline {
        let (listeners, health) = server.inline_updates();
        inline.spawn_tasks(server.config(), &metrics, listeners, health);
    }
    // Not before each of its threads has opened its doors.
    ensure!(server.check_liveness().await, "a worker thread exited during startup");
    ready.send_replace(Readiness::Ready);
    metrics.config_loaded();
    let control = Control::new(server, file, source, metrics, ready);
    if let Some(socket) = admin {
        let control = control.clone();
        tokio::spawn(async move {
            if let Err(error) = socket.serve(control).await {
                tracing::error!(target: target::CONTROL, %error, "control socket failed; status, drain and reload are unavailable until a restart, mail is not affected");
            }
        });
    }
    tokio::spawn(feed_watchdog(control.clone()));
    systemd::ready("serving");

    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            // What becomes of it is in the log.
            _ = hangup.recv() => drop(control.answer(Request::Reload).await),
        }
    }
    let second_signal = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    if let Some(server) = control.take_server().await {
        // As it was last read.
        let deadline = server.config().stop.deadline;
        systemd::stopping(deadline);
        server.shutdown(deadline, second_signal).await;
    }
    exporting.cancel();
    Ok(())
}

/// Tells systemd that the daemon does its work, as long as every thread does.
async fn feed_watchdog(control: Control) {
    let Some(every) = systemd::watchdog_interval() else { return };
    let every = every / 2;
    loop {
        let next = Instant::now() + every;
        match tokio::time::timeout(every, control.check_liveness()).await {
            Ok(true) => systemd::notify_watchdog(),
            Ok(false) => {
                tracing::error!(target: target::DAEMON, "a worker thread exited; withholding the systemd watchdog ping, so systemd restarts the service")
            }
            Err(_) => {
                tracing::error!(target: target::DAEMON, "a worker thread is unresponsive; withholding the systemd watchdog ping, so systemd restarts the service")
            }
        }
        tokio::time::sleep_until(next).await;
    }
}

/// What the metrics and the log take from the programs.
fn observe(metrics: &Metrics, probes: &EngineProbes) {
    metrics.set_engine("relay", true);
    for (engine, tested) in [("inline", &probes.inline), ("splice", &probes.splice)] {
        metrics.set_engine(engine, tested.failure().is_none());
        for check in &tested.checks {
            metrics.set_check(engine, check.name, check.result.is_ok(), check.took);
        }
    }
    if let Some(splice) = probes.splice_engine() {
        splice.spawn_tasks(metrics);
    }
}
