//! `injector run`: everything that needs rights first, then without them until the stop.

#[cfg(feature = "bpf")]
use std::sync::Arc;
use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context as _, bail, ensure};
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
    engine::{registry::Findings, select as choice},
    listener,
    os::{capabilities as rights, rlimit, systemd},
    server as serving,
    server::{Outset, Serving, Sockets},
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
pub fn run(mut config: Config, file: PathBuf, source: control::Source) -> anyhow::Result<()> {
    let nofile = rlimit::raise_nofile();
    let carried = serving::carried(&config, nofile);
    if carried == 0 {
        bail!(
            "the open-file limit ({nofile}) is too low for even one connection: raise it (LimitNOFILE= in systemd, \
             ulimit -n)"
        );
    }
    let wanted = config.limits.max_connections;
    if carried < wanted {
        tracing::warn!(target: target::DAEMON,
            nofile,
            connections = carried,
            wanted,
            "the open-file limit allows fewer connections than limits.max_connections; connections above it are \
             rejected: raise it to {} (LimitNOFILE= in systemd, ulimit -n)",
            listener::nofile_for(wanted, serving::doors(&config), config.limits.workers)
        );
    }

    // With all rights: sockets, programs. Listeners that become inline have no sockets.
    let mut findings = Findings::untried("no listener asks for it");
    let choices = choice::inline(&mut config, &mut findings)?;
    let inherited = systemd::listen_sockets().context("taking over systemd's sockets")?;
    let sockets = bind_all(&config, &inherited)?;
    let exporter = match config.metrics {
        Some(metrics) => Some(listener::bind(metrics.listen).context("metrics.listen")?),
        None => None,
    };
    let admin = match &config.admin {
        Some(admin) => Some(control::Door::open(&admin.socket)?),
        None => None,
    };
    if config.listeners.iter().any(|listener| choice::splices(listener.engine)) {
        findings
            .try_splice(u32::try_from(wanted.min(carried)).unwrap_or(u32::MAX), &config.splice.watermarks);
        findings.splice.log("splice");
    }
    let engines = choice::engines(&config, &choices, &findings)?;
    #[cfg(feature = "bpf")]
    let inline = crate::engine::inline::runner::start(&config)?;

    // Without.
    #[cfg(feature = "bpf")]
    let attaches = inline.is_some();
    #[cfg(not(feature = "bpf"))]
    let attaches = false;
    give_up_rights(&findings, attaches);
    // For all but the connections; see `worker`.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let outset = Outset { config, choices, sockets, inherited, engines, findings, nofile };
    let operator = Operator { exporter, admin, file, source };
    runtime.context("starting the runtime")?.block_on(serve(
        outset,
        operator,
        #[cfg(feature = "bpf")]
        inline,
    ))
}

/// How the operator sees the daemon, and is heard.
struct Operator {
    exporter: Option<Socket>,
    admin: Option<control::Door>,
    file: PathBuf,
    source: control::Source,
}

/// The sockets of each listener.
fn bind_all(config: &Config, inherited: &[(SocketAddr, Socket)]) -> anyhow::Result<Vec<Sockets>> {
    let bind = |listener: &Listener| {
        // Its packets never reach a socket.
        if listener.engine == EngineChoice::Inline {
            return Ok(Vec::new());
        }
        let bind = |address: &SocketAddr| {
            let sockets = serving::bind(*address, inherited, config.limits.workers, listener)?;
            Ok((*address, sockets))
        };
        let sockets: anyhow::Result<Sockets> = listener.bind.iter().map(bind).collect();
        sockets.with_context(|| format!("listener {:?}", listener.name))
    };
    let used = |address: &SocketAddr| config.listeners.iter().any(|listener| listener.bind.contains(address));
    for (address, _) in inherited.iter().filter(|(address, _)| !used(address)) {
        tracing::warn!(target: target::DAEMON, %address, "systemd passed a socket for this address, but no listener binds it; its clients are never accepted: \
             add the address to a listener or remove it from the .socket unit");
    }
    config.listeners.iter().map(bind).collect()
}

/// Maps stay usable by their descriptors; see [`crate::engine::splice::Splice::works_without_rights`] for the exception. Whoever
/// `attaches` programs to devices that come later needs the rights for it then, and a configuration that is read again may
/// have other ports below 1024.
fn give_up_rights(findings: &Findings, attaches: bool) {
    #[cfg_attr(not(feature = "bpf"), expect(unused_mut, reason = "only programs need more"))]
    let mut keep = vec![caps::Capability::CAP_NET_BIND_SERVICE];
    #[cfg(feature = "bpf")]
    match findings.splice_engine() {
        _ if attaches => keep.extend([caps::Capability::CAP_BPF, caps::Capability::CAP_NET_ADMIN]),
        Some(splice) if !splice.works_without_rights() => keep.push(caps::Capability::CAP_BPF),
        _ => {}
    }
    #[cfg(not(feature = "bpf"))]
    let _ = (findings, attaches);
    match rights::drop_all_except(&keep) {
        Ok(kept) => tracing::info!(target: target::DAEMON, ?kept, "capabilities dropped"),
        Err(error) => {
            tracing::warn!(target: target::DAEMON, %error, "dropping capabilities failed; the daemon keeps all of them")
        }
    }
}

async fn serve(
    outset: Outset,
    operator: Operator,
    #[cfg(feature = "bpf")] inline: Option<crate::engine::inline::runner::InlineEngine>,
) -> anyhow::Result<()> {
    // First, so that no signal ends the process unheard.
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("listening for SIGHUP")?;

    let metrics = Metrics::new();
    let (ready, readiness) = watch::channel(Readiness::Starting);
    let backlog_total = BacklogTotal::default();
    observe(&metrics, &outset.findings);
    metrics.watch_backlog(backlog_total.clone());
    let exporting = CancellationToken::new();
    let Operator { exporter, admin, file, source } = operator;
    if let Some(exporter) = exporter {
        let exporter = tokio::net::TcpListener::from_std(exporter.into()).context("metrics.listen")?;
        tokio::spawn(http::serve(exporter, metrics.clone(), readiness, exporting.clone()));
    }

    let serving = Serving::begin(outset, &metrics, &backlog_total)?;
    #[cfg(feature = "bpf")]
    if let Some(running) = inline {
        watch_inline(running, &serving, &metrics);
    }
    // Not before each of its threads has opened its doors.
    ensure!(serving.pulse().await, "a worker thread exited during startup");
    ready.send_replace(Readiness::Ready);
    metrics.config_loaded();
    let control = Control::new(serving, file, source, metrics, ready);
    if let Some(door) = admin {
        let control = control.clone();
        tokio::spawn(async move {
            if let Err(error) = door.answer(control).await {
                tracing::error!(target: target::CONTROL, %error, "control socket failed; status, drain and reload are unavailable until a restart, mail is not affected");
            }
        });
    }
    tokio::spawn(keep_alive(control.clone()));
    systemd::ready("serving");

    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            // What becomes of it is in the log.
            _ = hangup.recv() => drop(control.answer(Request::Reload).await),
        }
    }
    let again = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    if let Some(serving) = control.stop().await {
        // As it was last read.
        let deadline = serving.config().stop.deadline;
        systemd::stopping(deadline);
        serving.end(deadline, again).await;
    }
    exporting.cancel();
    Ok(())
}

/// Tells systemd that the daemon does its work, as long as every thread does.
async fn keep_alive(control: Control) {
    let Some(every) = systemd::watchdog_interval() else { return };
    let every = every / 2;
    loop {
        let next = Instant::now() + every;
        match tokio::time::timeout(every, control.pulse()).await {
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

/// Packets need nobody; the operator wants to know what becomes of them.
#[cfg(feature = "bpf")]
fn watch_inline(
    inline_engine: crate::engine::inline::runner::InlineEngine,
    serving: &Serving,
    metrics: &Metrics,
) {
    metrics.set_inline_max_flows(serving.config().inline.flows);
    metrics
        .watch_programs(Arc::clone(&inline_engine.inline) as Arc<dyn crate::telemetry::metrics::BpfCounters>);
    let flow_tracker = crate::engine::inline::runner::flow_tracker(serving.config(), metrics);
    let inline = Arc::clone(&inline_engine.inline);
    tokio::spawn(async move {
        if let Err(error) = flow_tracker.run(&inline).await {
            tracing::error!(target: target::ENGINE_INLINE, %error, "inline event reader failed; inline connections are carried but no longer logged or counted");
        }
    });
    let (served, health) = serving.inline();
    tokio::spawn(async move {
        if let Err(error) = inline_engine.run(served, health).await {
            tracing::error!(target: target::ENGINE_INLINE, error = format!("{error:#}"), "route monitor failed; programs are not attached to interfaces that appear from now on");
        }
    });
}

/// What the metrics and the log take from the programs.
fn observe(metrics: &Metrics, findings: &Findings) {
    metrics.set_engine("relay", true);
    for (engine, tested) in [("inline", &findings.inline), ("splice", &findings.splice)] {
        metrics.set_engine(engine, tested.fault().is_none());
        for check in &tested.checks {
            metrics.set_check(engine, check.name, check.result.is_ok(), check.took);
        }
    }
    #[cfg(feature = "bpf")]
    if let Some(splice) = findings.splice_engine() {
        let events = Arc::clone(splice);
        tokio::spawn(async move {
            if let Err(error) = events.follow_backlog_events().await {
                tracing::error!(target: target::ENGINE_SPLICE, %error, "BPF backlog events are not received; slow receivers are found only by the periodic check");
            }
        });
        metrics.watch_programs(Arc::clone(splice) as Arc<dyn crate::telemetry::metrics::BpfCounters>);
        match splice.logger() {
            Ok(logger) => drop(tokio::spawn(follow(logger))),
            Err(error) => {
                tracing::warn!(target: target::ENGINE_SPLICE, %error, "cannot read the log of the BPF programs; their warnings are missing here")
            }
        }
    }
}

/// Passes on what the programs log, until the daemon ends.
#[cfg(feature = "bpf")]
async fn follow(logger: aya_log::EbpfLogger<&'static dyn log::Log>) {
    let Ok(mut logger) = crate::os::poll::register(logger, tokio::io::Interest::READABLE) else {
        return;
    };
    while let Ok(mut ready) = logger.readable_mut().await {
        ready.get_inner_mut().flush();
        ready.clear_ready();
    }
}
