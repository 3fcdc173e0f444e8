//! `injector run`: everything that needs rights first, then without them until the stop.

use std::{
    hash::{BuildHasher as _, RandomState},
    io,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use socket2::Socket;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, watch},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    backend::Backends,
    choice,
    config::{Config, EngineChoice, Listener},
    engine::Engine,
    listener::{self, Door, Limits},
    metrics::{Metrics, Readiness, http},
    pipe::{self, Pipes},
    protocol::Speaker,
    rights,
    selftest::Findings,
    session::{Context, Ledger},
    sys,
    watch::Watch,
    worker::Worker,
};

/// How long sessions may take to end after they were cut.
const AFTER_THE_CUT: Duration = Duration::from_secs(3);

/// Runs until it is told to stop.
///
/// # Errors
/// When it cannot start; each says what to do.
pub fn run(mut config: Config) -> anyhow::Result<()> {
    let nofile = sys::raise_nofile().context("reading the limit of open files")?;
    let workers = config.limits.workers;
    let doors = workers * config.listeners.iter().map(|listener| listener.bind.len()).sum::<usize>();
    let carried = listener::connections_for(nofile, doors, workers);
    if carried == 0 {
        bail!(
            "a limit of {nofile} open files carries no connection: raise it (LimitNOFILE= in systemd, ulimit -n)"
        );
    }
    let wanted = config.limits.max_connections;
    if carried < wanted {
        tracing::warn!(
            nofile,
            connections = carried,
            wanted,
            "the limit of open files carries fewer connections than limits.max_connections: raise it to {}",
            listener::nofile_for(wanted, doors, workers)
        );
    }

    // With all rights: sockets, programs. Listeners that become inline have no sockets.
    let mut findings = Findings::untried("no listener asks for it");
    let choices = choice::inline(&mut config, &mut findings)?;
    let listening = bind_all(&config)?;
    let exporter = match config.metrics {
        Some(metrics) => Some(listener::bind(metrics.listen).context("metrics.listen")?),
        None => None,
    };
    if config.listeners.iter().any(|listener| choice::splices(listener.engine)) {
        findings.try_splice(u32::try_from(wanted.min(carried)).unwrap_or(u32::MAX), &config.splice.marks);
        findings.splice.log("splice");
    }
    let engines = choice::engines(&config, &choices, &findings)?;
    #[cfg(feature = "bpf")]
    let inline = crate::inline::start::start(&config)?;

    // Without.
    #[cfg(feature = "bpf")]
    let attaches = inline.is_some();
    #[cfg(not(feature = "bpf"))]
    let attaches = false;
    give_up_rights(&findings, attaches);
    // For all but the connections; see `worker`.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.context("starting the runtime")?.block_on(serve(
        config,
        carried,
        listening,
        exporter,
        engines,
        findings,
        #[cfg(feature = "bpf")]
        inline,
    ))
}

/// For each listener, for each of its addresses, a socket for each worker.
fn bind_all(config: &Config) -> anyhow::Result<Vec<Vec<Vec<Socket>>>> {
    let bind = |listener: &Listener| {
        // Its packets never reach a socket.
        if listener.engine == EngineChoice::Inline {
            return Ok(Vec::new());
        }
        let bind = |address: &SocketAddr| {
            listener::bind_for_workers(*address, config.limits.workers, &listener.timeouts)
        };
        let sockets: Result<Vec<_>, _> = listener.bind.iter().map(bind).collect();
        sockets.with_context(|| format!("listener {:?}", listener.name))
    };
    config.listeners.iter().map(bind).collect()
}

/// Maps stay usable by their descriptors; see [`crate::splice::Splice::works_without_rights`] for the exception. Whoever
/// `attaches` programs to devices that come later needs the rights for it then.
fn give_up_rights(findings: &Findings, attaches: bool) {
    #[cfg(feature = "bpf")]
    let keep: &[_] = match findings.splice_engine() {
        _ if attaches => &[caps::Capability::CAP_BPF, caps::Capability::CAP_NET_ADMIN],
        Some(splice) if !splice.works_without_rights() => &[caps::Capability::CAP_BPF],
        _ => &[],
    };
    #[cfg(not(feature = "bpf"))]
    let keep: &[_] = {
        let _ = (findings, attaches);
        &[]
    };
    match rights::drop_all_but(keep) {
        Ok(kept) => tracing::info!(?kept, "capabilities given up"),
        Err(error) => tracing::warn!(%error, "capabilities could not be given up"),
    }
}

async fn serve(
    config: Config,
    carried: usize,
    listening: Vec<Vec<Vec<Socket>>>,
    exporter: Option<Socket>,
    engines: Vec<Option<Arc<dyn Engine>>>,
    findings: Findings,
    #[cfg(feature = "bpf")] inline: Option<crate::inline::start::Running>,
) -> anyhow::Result<()> {
    // First, so that no signal ends the process unheard.
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;

    let metrics = Metrics::new();
    let (ready, readiness) = watch::channel(Readiness::Starting);
    let ledger = Ledger::default();
    observe(&metrics, &findings, &config, carried);
    metrics.watch_backlog(ledger.clone());
    #[cfg(feature = "bpf")]
    if let Some(running) = inline {
        watch_inline(running, &config, &metrics);
    }
    let exporting = CancellationToken::new();
    if let Some(exporter) = exporter {
        let exporter = tokio::net::TcpListener::from_std(exporter.into()).context("metrics.listen")?;
        tokio::spawn(http::serve(exporter, metrics.clone(), readiness, exporting.clone()));
    }

    let serving = Serving::begin(&config, carried, listening, engines, &metrics, &ledger)?;
    ready.send_replace(Readiness::Ready);

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    ready.send_replace(Readiness::Stopping);
    let again = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    serving.end(config.stop.deadline, again).await;
    exporting.cancel();
    Ok(())
}

/// The threads that serve connections, and how they are told to stop.
struct Serving {
    /// Nobody more is let in.
    stop: CancellationToken,
    /// Who is still there is cut.
    cut: CancellationToken,
    /// The threads end.
    ended: CancellationToken,
    doors: TaskTracker,
    sessions: TaskTracker,
    workers: Vec<Worker>,
}

impl Serving {
    /// Opens the doors of all listeners that have an engine.
    fn begin(
        config: &Config,
        carried: usize,
        listening: Vec<Vec<Vec<Socket>>>,
        engines: Vec<Option<Arc<dyn Engine>>>,
        metrics: &Metrics,
        ledger: &Ledger,
    ) -> anyhow::Result<Self> {
        let mut serving = Self {
            stop: CancellationToken::new(),
            cut: CancellationToken::new(),
            ended: CancellationToken::new(),
            doors: TaskTracker::new(),
            sessions: TaskTracker::new(),
            workers: Vec::new(),
        };
        let watches: io::Result<Vec<_>> = (0..config.limits.workers).map(|_| Watch::new()).collect();
        let watches = watches.context("watching for hang-ups")?;
        let mut open: Vec<_> = watches.iter().map(|_| Vec::new()).collect();
        let limits = Limits::new(config.limits.max_connections, carried);
        let pipes = Pipes::new(pipe::MOST);
        let run_id = RandomState::new().hash_one(std::process::id());
        for ((listener, sockets), engine) in config.listeners.iter().zip(listening).zip(engines) {
            let Some(engine) = engine else { continue };
            let backends = Arc::new(Backends::new(listener));
            tokio::spawn(Arc::clone(&backends).keep_resolving(serving.stop.clone()));
            let metrics = metrics.listener(&listener.name, engine.name());
            let own = listener.max_connections.map(|most| Arc::new(Semaphore::new(most)));
            let door = |watch: &Watch| Door {
                context: Arc::new(Context {
                    listener: listener.name.clone(),
                    protocol: listener.protocol,
                    expects_banner: listener.protocol.speaks_first() != Speaker::Unknown,
                    backends: Arc::clone(&backends),
                    metrics: metrics.clone(),
                    engine: Arc::clone(&engine),
                    timeouts: listener.timeouts,
                    receiver: listener.receiver.clone(),
                    pays: config.splice.pays,
                    pipes: pipes.clone(),
                    marks: config.splice.marks,
                    ledger: ledger.clone(),
                    watch: watch.clone(),
                    cut: serving.cut.clone(),
                    run_id,
                }),
                limits: limits.clone(),
                own: own.clone(),
                sessions: serving.sessions.clone(),
                stop: serving.stop.clone(),
            };
            let own_doors: Vec<_> = watches.iter().map(door).collect();
            for sockets in sockets {
                let address = sockets.first().and_then(|socket| socket.local_addr().ok()?.as_socket());
                tracing::info!(
                    listener = listener.name,
                    address = address.map(tracing::field::display),
                    "listening"
                );
                for ((open, door), socket) in open.iter_mut().zip(&own_doors).zip(sockets) {
                    open.push((door.clone(), socket));
                }
            }
        }
        for ((number, watch), open) in (0..).zip(watches).zip(open) {
            let worker = Worker::start(number, watch, open, &serving.doors, serving.ended.clone());
            serving.workers.push(worker.context("starting a thread for connections")?);
        }
        Ok(serving)
    }

    /// Closes the doors, and cuts who has not finished at the deadline, or when it is asked for `again`.
    async fn end(self, deadline: Duration, again: impl Future<Output = ()>) {
        let Self { stop, cut, ended, doors, sessions, workers } = self;
        stop.cancel();
        doors.close();
        doors.wait().await;
        sessions.close();
        let left = sessions.len();
        tracing::info!(
            sessions = left,
            ?deadline,
            "stopping: no new connections; a second signal cuts what is left"
        );
        let finished = tokio::select! {
            () = sessions.wait() => true,
            () = tokio::time::sleep(deadline) => false,
            () = again => false,
        };
        let mut count = 0;
        if !finished {
            count = sessions.len();
            cut.cancel();
            if tokio::time::timeout(AFTER_THE_CUT, sessions.wait()).await.is_err() {
                tracing::warn!(sessions = sessions.len(), "sessions that did not end");
            }
        }
        ended.cancel();
        workers.into_iter().for_each(Worker::join);
        let by_themselves = left.saturating_sub(count);
        tracing::info!(
            cut = count,
            "stopped: {by_themselves} sessions finished by themselves, {count} were cut"
        );
    }
}

/// Packets need nobody; the operator wants to know what becomes of them.
#[cfg(feature = "bpf")]
fn watch_inline(running: crate::inline::start::Running, config: &Config, metrics: &Metrics) {
    metrics.watch_programs(Arc::clone(&running.inline) as Arc<dyn crate::metrics::BpfCounters>);
    let books = crate::inline::start::books(config, metrics);
    let inline = Arc::clone(&running.inline);
    tokio::spawn(async move {
        if let Err(error) = books.keep(&inline).await {
            tracing::error!(%error, "nobody hears what becomes of the connections");
        }
    });
    tokio::spawn(async move {
        if let Err(error) = running.follow().await {
            tracing::error!(error = format!("{error:#}"), "devices that come later are not served");
        }
    });
}

/// What the metrics and the log take from the programs and the configuration.
fn observe(metrics: &Metrics, findings: &Findings, config: &Config, carried: usize) {
    metrics.set_max_connections(config.limits.max_connections.min(carried));
    metrics.set_engine("relay", true);
    for (engine, tested) in [("inline", &findings.inline), ("splice", &findings.splice)] {
        metrics.set_engine(engine, tested.fault().is_none());
        tested.checks.iter().for_each(|check| metrics.set_check(engine, check));
    }
    #[cfg(feature = "bpf")]
    if let Some(splice) = findings.splice_engine() {
        let alarms = Arc::clone(splice);
        tokio::spawn(async move {
            if let Err(error) = alarms.follow_alarms().await {
                tracing::error!(%error, "nobody hears the programs' alarms: slow readers are not held back");
            }
        });
        metrics.watch_programs(Arc::clone(splice) as Arc<dyn crate::metrics::BpfCounters>);
        match splice.logger() {
            Ok(logger) => drop(tokio::spawn(follow(logger))),
            Err(error) => tracing::warn!(%error, "the programs' log cannot be read"),
        }
    }
}

/// Passes on what the programs log, until the daemon ends.
#[cfg(feature = "bpf")]
async fn follow(logger: aya_log::EbpfLogger<&'static dyn log::Log>) {
    let Ok(mut logger) = sys::poll(logger, tokio::io::Interest::READABLE) else {
        return;
    };
    while let Ok(mut ready) = logger.readable_mut().await {
        ready.get_inner_mut().flush();
        ready.clear_ready();
    }
}
