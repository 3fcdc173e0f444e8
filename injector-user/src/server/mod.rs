//! The listeners that are open, and how that changes while the daemon runs: another configuration, a drain, the stop.
//!
//! What a change may fail of is done first ([`Server::prepare`]); what follows ([`Server::apply`]) cannot fail. Sessions
//! keep what they began with: a change is for those that come after it.

pub mod worker;

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, RandomState},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use socket2::Socket;
use tokio::sync::{Notify, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    backend::Backends,
    config::{Config, EngineChoice, Listener},
    engine::{
        Engine, kernel, registry::EngineProbes, select::EngineSelection, served_listener::ServedListener,
    },
    listener::{self, Door, Limits, Owner, Policy, connection_limit::Room},
    net::splice_pipe::{MAX_PIPES, Pipes},
    protocol::Speaker,
    server::worker::Worker,
    session::{
        Context,
        registry::{SessionRegistry, Snapshot},
    },
    telemetry::{
        backlog::BacklogTotal,
        log::target,
        metrics::{ListenerMetrics, Metrics},
    },
};

/// How long sessions may take to end after they were cut.
const ABORT_GRACE: Duration = Duration::from_secs(3);

/// Sockets by the address of the configuration: for each, one for each worker.
pub type BoundSockets = Vec<(SocketAddr, Vec<Socket>)>;

/// What the daemon was started with, and keeps.
#[derive(Debug)]
pub struct StartupState {
    /// As it runs: what `auto` came to is in [`Listener::engine`].
    pub config: Config,
    /// For each listener.
    pub selections: Vec<EngineSelection>,
    /// For each listener; none for those whose packets never reach a socket.
    pub sockets: Vec<BoundSockets>,
    /// Listening sockets of systemd's, which stay open as long as the daemon runs.
    pub inherited: Vec<(SocketAddr, Socket)>,
    /// For each listener; `None`: inline.
    pub engines: Vec<Option<Arc<dyn Engine>>>,
    /// What was found out about the engines.
    pub probes: EngineProbes,
    /// The limit of open files.
    pub nofile: u64,
}

/// The threads that serve connections, what they serve, and how they are told to stop.
#[derive(Debug)]
pub struct Server {
    config: Config,
    probes: EngineProbes,
    inherited: Vec<(SocketAddr, Socket)>,
    nofile: u64,
    shared: Shared,
    /// In the order of the configuration.
    listeners: Vec<ActiveListener>,
    /// No longer configured, and not yet without sessions.
    removed: Vec<RemovedListener>,
    workers: Vec<Worker>,
    /// Rings when the backends whose turn it is have changed.
    backends_changed: Arc<Notify>,
    /// What engine inline is to serve.
    inline_listeners: watch::Sender<Vec<ServedListener>>,
}

/// What all listeners share.
#[derive(Debug)]
struct Shared {
    /// Nobody more is let in.
    stop_accepting: CancellationToken,
    /// Who is still there is cut.
    abort_sessions: CancellationToken,
    /// The threads end.
    stop_workers: CancellationToken,
    acceptors: TaskTracker,
    sessions: TaskTracker,
    limits: Limits,
    pipes: Pipes,
    backlog_total: BacklogTotal,
    metrics: Metrics,
    run_id: u64,
}

/// A listener that is served.
#[derive(Debug)]
pub struct ActiveListener {
    /// As it runs.
    pub config: Listener,
    /// What the file asks for.
    pub requested: EngineChoice,
    /// `None`: inline.
    pub engine: Option<Arc<dyn Engine>>,
    /// Where its connections go.
    pub backends: Arc<Backends>,
    /// Its counters.
    pub metrics: ListenerMetrics,
    /// Since when it is drained, and until when sessions may go on.
    pub drain: Option<DrainState>,
    /// Ends checks and resolving.
    stop_health_tasks: CancellationToken,
    /// One for each worker.
    policies: Vec<Arc<Policy>>,
    connection_limit: Arc<Room>,
    /// What cuts all of its sessions.
    abort: CancellationToken,
    /// What cuts those that come from now on.
    abort_new: CancellationToken,
    /// What cuts those that came before a drain.
    abort_drained: Vec<CancellationToken>,
    /// By the addresses of the configuration.
    sockets: BTreeMap<SocketAddr, ListenSockets>,
}

/// The doors of one address.
#[derive(Debug)]
struct ListenSockets {
    /// Closes them.
    stop_accepting: CancellationToken,
    /// One for each worker.
    owners: Vec<Arc<Owner>>,
}

/// A drain under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainState {
    /// When sessions are cut; `None`: never.
    pub deadline: Option<Instant>,
}

/// A listener that is no longer configured.
#[derive(Debug)]
pub struct RemovedListener {
    /// Its name.
    pub name: String,
    /// When its sessions are cut.
    pub deadline: Instant,
    metrics: ListenerMetrics,
}

/// Another configuration, with all that could have failed.
#[derive(Debug)]
pub struct Prepared {
    config: Config,
    selections: Vec<EngineChoice>,
    engines: Vec<Option<Arc<dyn Engine>>>,
    /// For each listener, the sockets for addresses that it did not have.
    sockets: Vec<BoundSockets>,
    capacity: usize,
    requires_restart: Vec<&'static str>,
}

/// What a change has come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Listeners that are new.
    pub added: Vec<String>,
    /// Listeners that are different.
    pub changed: Vec<String>,
    /// Listeners that are gone.
    pub removed: Vec<String>,
    /// Sections of the file that take effect with a restart only.
    pub requires_restart: Vec<&'static str>,
}

impl Server {
    /// Opens the doors of all listeners that have an engine.
    ///
    /// # Errors
    /// When there can be no further thread or epoll instance.
    pub fn start(
        startup: StartupState,
        metrics: &Metrics,
        backlog_total: &BacklogTotal,
    ) -> anyhow::Result<Self> {
        let StartupState { config, selections, sockets, inherited, engines, probes, nofile } = startup;
        let (acceptors, stop_workers) = (TaskTracker::new(), CancellationToken::new());
        let worker = |number| Worker::start(number, &acceptors, stop_workers.clone());
        let workers: Result<Vec<_>, _> = (0..config.limits.workers).map(worker).collect();
        let workers = workers.context("starting a worker thread")?;
        let shared = Shared {
            stop_accepting: CancellationToken::new(),
            abort_sessions: CancellationToken::new(),
            stop_workers,
            acceptors,
            sessions: TaskTracker::new(),
            limits: Limits::new(config.limits.max_connections, connection_capacity(&config, nofile)),
            pipes: Pipes::new(MAX_PIPES),
            backlog_total: backlog_total.clone(),
            metrics: metrics.clone(),
            run_id: RandomState::new().hash_one(std::process::id()),
        };
        let mut server = Self {
            config: config.clone(),
            probes,
            inherited,
            nofile,
            shared,
            listeners: Vec::new(),
            removed: Vec::new(),
            workers,
            backends_changed: Arc::default(),
            inline_listeners: watch::Sender::default(),
        };
        for (((listener, choice), sockets), engine) in
            config.listeners.into_iter().zip(selections).zip(sockets).zip(engines)
        {
            let active = server.start_listener(listener, choice.requested, engine, sockets);
            server.listeners.push(active);
        }
        server.publish_limits();
        server.publish_to_inline();
        Ok(server)
    }

    /// Finds out whether another configuration can be served, and opens what it needs to be.
    ///
    /// # Errors
    /// Why not. Everything is as before.
    pub fn prepare(&self, mut config: Config) -> anyhow::Result<Prepared> {
        let requires_restart = retain_startup_settings(&self.config, &mut config);
        let mut prepared = Prepared {
            selections: config.listeners.iter().map(|listener| listener.engine).collect(),
            engines: Vec::new(),
            sockets: Vec::new(),
            capacity: connection_capacity(&config, self.nofile),
            requires_restart,
            config,
        };
        if prepared.capacity == 0 {
            bail!(
                "the open-file limit ({}) is too low for even one connection with this many addresses: raise it \
                 (LimitNOFILE= in systemd, ulimit -n)",
                self.nofile
            );
        }
        for listener in &mut prepared.config.listeners {
            let engine =
                self.resolve_engine(listener).with_context(|| format!("listener {:?}", listener.name))?;
            prepared.engines.push(engine);
        }
        self.refuse_gone_inline(&prepared.config)?;
        for listener in &prepared.config.listeners {
            let sockets =
                self.bind_new_addresses(listener).with_context(|| format!("listener {:?}", listener.name))?;
            prepared.sockets.push(sockets);
        }
        Ok(prepared)
    }

    /// Serves it from here on.
    pub fn apply(&mut self, prepared: Prepared) -> Changes {
        let Prepared { config, selections, engines, sockets, capacity, requires_restart } = prepared;
        let mut changes = Changes { requires_restart, ..Changes::default() };
        let before = std::mem::take(&mut self.listeners);
        let mut before: BTreeMap<_, _> =
            before.into_iter().map(|active| (active.config.name.clone(), active)).collect();
        let mut handed_over = detach_sockets(&mut before, &config);
        self.config = config.clone();
        self.shared.limits.resize(config.limits.max_connections, capacity);
        for (((listener, requested), engine), sockets) in
            config.listeners.into_iter().zip(selections).zip(engines).zip(sockets)
        {
            let name = listener.name.clone();
            let active = match before.remove(&name) {
                None => {
                    changes.added.push(name);
                    self.start_listener(listener, requested, engine, sockets)
                }
                Some(mut active) => {
                    if active.config != listener || active.requested != requested {
                        changes.changed.push(name);
                        self.update_listener(&mut active, listener, requested, engine, sockets);
                    }
                    active
                }
            };
            self.listeners.push(active);
        }
        for active in &mut self.listeners {
            adopt_sockets(active, &mut handed_over);
        }
        for (name, active) in before {
            self.remove_listener(active);
            changes.removed.push(name);
        }
        self.publish_limits();
        self.publish_to_inline();
        changes
    }

    /// Turns new clients of a listener away, of all listeners without a name, and cuts who is there after `within`, or after
    /// what the configuration says. Returns the names.
    ///
    /// # Errors
    /// When there is no such listener.
    pub fn drain(&mut self, name: Option<&str>, within: Option<Duration>) -> anyhow::Result<Vec<String>> {
        let named = self.find_listeners(name)?;
        let mut drained = Vec::new();
        let mut listeners = std::mem::take(&mut self.listeners);
        for index in named {
            let Some(active) = listeners.get_mut(index) else { continue };
            active.policies.iter().for_each(|policy| policy.drain(true));
            let within = within.unwrap_or(active.config.timeouts.drain);
            // Packets are not ours to cut.
            let deadline = active.engine.is_some().then(|| Instant::now() + within);
            active.drain = Some(DrainState { deadline });
            self.shared.metrics.set_draining(&active.config.name, true);
            tracing::info!(target: target::LISTENER, listener = active.config.name, deadline = ?within, "draining: new connections are rejected, sessions may finish until the deadline");
            let before = std::mem::replace(&mut active.abort_new, active.abort.child_token());
            self.replace_contexts(active);
            active.abort_drained.retain(|abort| !abort.is_cancelled());
            active.abort_drained.push(before);
            if let Some(deadline) = deadline {
                // Of two drains, the one that ends sooner holds.
                active.abort_drained.iter().for_each(|abort| self.abort_at(deadline, abort.clone()));
            }
            drained.push(active.config.name.clone());
        }
        self.listeners = listeners;
        self.publish_to_inline();
        Ok(drained)
    }

    /// Accepts clients again. Sessions from before the drain are still cut when their time is over. Returns the names of those
    /// that were drained.
    ///
    /// # Errors
    /// When there is no such listener.
    pub fn resume(&mut self, name: Option<&str>) -> anyhow::Result<Vec<String>> {
        let mut resumed = Vec::new();
        for index in self.find_listeners(name)? {
            let Some(active) = self.listeners.get_mut(index).filter(|active| active.drain.is_some()) else {
                continue;
            };
            active.policies.iter().for_each(|policy| policy.drain(false));
            active.drain = None;
            self.shared.metrics.set_draining(&active.config.name, false);
            tracing::info!(target: target::LISTENER, listener = active.config.name, "draining ended: new connections are accepted again");
            resumed.push(active.config.name.clone());
        }
        self.publish_to_inline();
        Ok(resumed)
    }

    /// The listeners, in the order of the configuration.
    #[must_use]
    pub fn listeners(&self) -> &[ActiveListener] {
        &self.listeners
    }

    /// Those that are no longer configured and still have sessions, with how many.
    pub fn removed_listeners(&mut self) -> Vec<(&RemovedListener, u64)> {
        self.removed.retain(|removed| removed.metrics.snapshot().active > 0);
        self.removed.iter().map(|removed| (removed, removed.metrics.snapshot().active)).collect()
    }

    /// All sessions of the engines that end TCP.
    #[must_use]
    pub fn sessions(&self) -> Vec<Snapshot> {
        self.workers.iter().map(Worker::sessions).flat_map(SessionRegistry::snapshot).collect()
    }

    /// As it runs.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What was found out about the engines.
    #[must_use]
    pub fn probes(&self) -> &EngineProbes {
        &self.probes
    }

    /// Sessions, and how many there may be.
    #[must_use]
    pub fn connections(&self) -> (usize, usize) {
        let max = self.config.limits.max_connections.min(connection_capacity(&self.config, self.nofile));
        (self.shared.limits.taken(), max)
    }

    /// Bytes that wait in the kernel.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.shared.backlog_total.bytes()
    }

    /// Whether every listener is drained.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.listeners.iter().all(|active| active.drain.is_some())
    }

    /// What engine inline is to serve, now and whenever it changes, and what rings when other backends are to get its
    /// connections.
    #[must_use]
    pub fn inline_updates(&self) -> (watch::Receiver<Vec<ServedListener>>, Arc<Notify>) {
        (self.inline_listeners.subscribe(), Arc::clone(&self.backends_changed))
    }

    /// Whether every thread that serves connections does its work.
    pub fn check_liveness(&self) -> impl Future<Output = bool> + use<> {
        let beats: Vec<_> = self.workers.iter().map(Worker::check_liveness).collect();
        async move {
            for beat in beats {
                if beat.await.is_err() {
                    return false;
                }
            }
            true
        }
    }

    /// Closes the doors, and cuts who has not finished at the deadline, or on a second signal.
    pub async fn shutdown(self, deadline: Duration, second_signal: impl Future<Output = ()>) {
        let Shared { stop_accepting, abort_sessions: abort, stop_workers, acceptors, sessions, .. } =
            self.shared;
        stop_accepting.cancel();
        acceptors.close();
        acceptors.wait().await;
        sessions.close();
        let left = sessions.len();
        tracing::info!(target: target::DAEMON,
            sessions = left,
            ?deadline,
            "shutting down: no new connections; a second signal aborts the remaining sessions"
        );
        let finished = tokio::select! {
            () = sessions.wait() => true,
            () = tokio::time::sleep(deadline) => false,
            () = second_signal => false,
        };
        let mut count = 0;
        if !finished {
            count = sessions.len();
            abort_sessions(&abort, self.workers.iter().map(Worker::sessions));
            if tokio::time::timeout(ABORT_GRACE, sessions.wait()).await.is_err() {
                tracing::warn!(target: target::DAEMON, sessions = sessions.len(), "sessions are still open after they were aborted; they end with the process");
            }
        }
        stop_workers.cancel();
        self.workers.into_iter().for_each(Worker::join);
        let completed = left.saturating_sub(count);
        tracing::info!(target: target::DAEMON,
            completed,
            aborted = count,
            "stopped: {completed} sessions completed, {count} aborted"
        );
    }

    fn start_listener(
        &self,
        listener: Listener,
        requested: EngineChoice,
        engine: Option<Arc<dyn Engine>>,
        sockets: BoundSockets,
    ) -> ActiveListener {
        let name = engine.as_ref().map_or("inline", |engine| engine.name());
        let metrics = self.shared.metrics.listener(&listener.name, name);
        self.shared.metrics.set_draining(&listener.name, false);
        let abort = self.shared.abort_sessions.child_token();
        let mut active = ActiveListener {
            backends: Arc::new(Backends::new(&listener, None, Arc::clone(&self.backends_changed))),
            connection_limit: Room::new(listener.max_connections),
            drain: None,
            stop_health_tasks: self.shared.stop_accepting.child_token(),
            policies: Vec::new(),
            abort_new: abort.child_token(),
            abort_drained: Vec::new(),
            abort,
            sockets: BTreeMap::new(),
            config: listener,
            requested,
            engine,
            metrics,
        };
        self.spawn_health_tasks(&active);
        active.policies = self
            .session_contexts(&active)
            .into_iter()
            .map(|it| Arc::new(Policy::new(it, Arc::clone(&active.connection_limit))))
            .collect();
        self.start_sockets(&mut active, sockets);
        active
    }

    /// What is known of its backends is kept up to date, and published.
    fn spawn_health_tasks(&self, active: &ActiveListener) {
        tokio::spawn(Arc::clone(&active.backends).keep_up_to_date(active.stop_health_tasks.clone()));
        self.shared.metrics.watch_backends(&active.config.name, active.backends.clone());
    }

    fn start_sockets(&self, active: &mut ActiveListener, sockets: BoundSockets) {
        for (address, sockets) in sockets {
            let bound = sockets.first().and_then(|socket| socket.local_addr().ok()?.as_socket());
            tracing::info!(target: target::LISTENER,
                listener = active.config.name,
                address = bound.map(tracing::field::display),
                "listening"
            );
            let stop_accepting = self.shared.stop_accepting.child_token();
            let owners: Vec<_> =
                active.policies.iter().map(|policy| Arc::new(Owner::new(Arc::clone(policy)))).collect();
            for ((worker, owner), socket) in self.workers.iter().zip(&owners).zip(sockets) {
                let acceptor = Door {
                    owner: Arc::clone(owner),
                    limits: self.shared.limits.clone(),
                    sessions: self.shared.sessions.clone(),
                    stop: stop_accepting.clone(),
                };
                worker.spawn_acceptor(acceptor, socket);
            }
            active.sockets.insert(address, ListenSockets { stop_accepting, owners });
        }
    }

    /// What the sessions of a listener share that come from now on, for each worker.
    fn session_contexts(&self, active: &ActiveListener) -> Vec<Arc<Context>> {
        let Some(engine) = &active.engine else { return Vec::new() };
        let listener = &active.config;
        let name: Arc<str> = listener.name.as_str().into();
        let context = |worker: &Worker| {
            Arc::new(Context {
                listener: Arc::clone(&name),
                protocol: listener.protocol,
                expects_banner: listener.protocol.speaks_first() != Speaker::Unknown,
                backends: Arc::clone(&active.backends),
                metrics: active.metrics.clone(),
                engine: Arc::clone(engine),
                timeouts: listener.timeouts,
                receiver: listener.receiver.clone(),
                header: self.config.splice.header,
                enrolment: self.config.splice.enrolment,
                pipes: self.shared.pipes.clone(),
                watermarks: self.config.splice.watermarks,
                backlog_total: self.shared.backlog_total.clone(),
                hangups: worker.hangups().clone(),
                abort: active.abort_new.clone(),
                sessions: worker.sessions().clone(),
                run_id: self.shared.run_id,
            })
        };
        self.workers.iter().map(context).collect()
    }

    /// Gives them to its doors.
    fn replace_contexts(&self, active: &ActiveListener) {
        for (policy, context) in active.policies.iter().zip(self.session_contexts(active)) {
            policy.change(context);
        }
    }

    fn update_listener(
        &self,
        active: &mut ActiveListener,
        listener: Listener,
        requested: EngineChoice,
        engine: Option<Arc<dyn Engine>>,
        sockets: BoundSockets,
    ) {
        let name = engine.as_ref().map_or("inline", |engine| engine.name());
        active.metrics = self.shared.metrics.listener(&listener.name, name);
        active.stop_health_tasks.cancel();
        active.stop_health_tasks = self.shared.stop_accepting.child_token();
        active.backends =
            Arc::new(Backends::new(&listener, Some(&active.backends), Arc::clone(&self.backends_changed)));
        active.connection_limit.resize(listener.max_connections);
        (active.config, active.requested, active.engine) = (listener, requested, engine);
        self.spawn_health_tasks(active);
        self.replace_contexts(active);
        // The new doors first: an address that only has to be opened anew is never without one.
        self.start_sockets(active, sockets);
        active.sockets.retain(|address, sockets| {
            let unchanged = active.config.bind.contains(address);
            if !unchanged {
                tracing::info!(target: target::LISTENER, listener = active.config.name, %address, "no longer listening");
                sockets.stop_accepting.cancel();
            }
            unchanged
        });
    }

    fn abort_at(&self, deadline: Instant, abort: CancellationToken) {
        let registries: Vec<_> = self.workers.iter().map(|worker| worker.sessions().clone()).collect();
        tokio::spawn(async move {
            tokio::time::sleep_until(deadline.into()).await;
            abort_sessions(&abort, &registries);
        });
    }

    fn remove_listener(&mut self, active: ActiveListener) {
        active.sockets.values().for_each(|sockets| sockets.stop_accepting.cancel());
        active.stop_health_tasks.cancel();
        let name = active.config.name;
        let deadline = Instant::now() + active.config.timeouts.drain;
        tracing::info!(target: target::LISTENER, listener = name, deadline = ?active.config.timeouts.drain, "listener removed; its sessions may finish until the deadline");
        self.abort_at(deadline, active.abort);
        self.shared.metrics.forget_listener(&name);
        self.removed.push(RemovedListener { name, deadline, metrics: active.metrics });
    }

    fn find_listeners(&self, name: Option<&str>) -> anyhow::Result<Vec<usize>> {
        let Some(name) = name else { return Ok((0..self.listeners.len()).collect()) };
        match self.listeners.iter().position(|active| active.config.name == name) {
            Some(index) => Ok(vec![index]),
            None => {
                let all: Vec<_> = self.listeners.iter().map(|active| active.config.name.as_str()).collect();
                bail!("no listener is named {name:?}; configured listeners: {}", all.join(", "))
            }
        }
    }

    /// A listener goes on with its engine unless it asks for another. Packets and sockets do not change places while the daemon
    /// runs.
    fn resolve_engine(&self, listener: &mut Listener) -> anyhow::Result<Option<Arc<dyn Engine>>> {
        let before = self.listeners.iter().find(|active| active.config.name == listener.name);
        let was_inline = before.is_some_and(|active| active.engine.is_none());
        let unchanged = before.is_some_and(|active| active.requested == listener.engine);
        if was_inline && unchanged {
            listener.engine = EngineChoice::Inline;
            if let Some(active) = before
                && (active.config.bind != listener.bind || active.config.receiver != listener.receiver)
            {
                bail!(
                    "changing bind or receiver of an inline listener needs a restart (its connections survive it)"
                );
            }
            kernel::check_inline_listener(&self.config.inline, listener)?;
            return Ok(None);
        }
        if was_inline || listener.engine == EngineChoice::Inline {
            bail!("changing a listener to or from engine \"inline\" needs a restart");
        }
        if let Some(active) = before.filter(|_| unchanged) {
            return Ok(active.engine.clone());
        }
        match self.probes.engine(listener.engine) {
            Ok(engine) => Ok(Some(engine)),
            Err(fault) => {
                bail!(
                    "engine {} was not loaded at startup ({fault}): restart the daemon to use it",
                    listener.engine
                )
            }
        }
    }

    fn refuse_gone_inline(&self, config: &Config) -> anyhow::Result<()> {
        let gone = |active: &&ActiveListener| {
            active.engine.is_none()
                && !config.listeners.iter().any(|listener| listener.name == active.config.name)
        };
        match self.listeners.iter().find(gone) {
            Some(active) => {
                bail!("listener {:?}: removing an inline listener needs a restart", active.config.name)
            }
            None => Ok(()),
        }
    }

    /// Sockets for the addresses of a listener that nobody has open.
    fn bind_new_addresses(&self, listener: &Listener) -> anyhow::Result<BoundSockets> {
        if listener.engine == EngineChoice::Inline {
            return Ok(Vec::new());
        }
        // Its own, or that of a listener that hands it over.
        let ours =
            |address: &&SocketAddr| self.listeners.iter().any(|active| active.sockets.contains_key(address));
        let bind = |address: &SocketAddr| {
            let sockets = bind(*address, &self.inherited, self.config.limits.workers, listener)?;
            Ok((*address, sockets))
        };
        listener.bind.iter().filter(|address| !ours(address)).map(bind).collect()
    }

    fn publish_limits(&self) {
        self.shared.metrics.set_max_connections(self.connections().1);
    }

    fn publish_to_inline(&self) {
        let served = |active: &ActiveListener| ServedListener {
            listener: active.config.clone(),
            backends: Arc::clone(&active.backends),
            draining: active.drain.is_some(),
        };
        self.inline_listeners.send_replace(
            self.listeners.iter().filter(|active| active.engine.is_none()).map(served).collect(),
        );
    }
}

/// The sockets of one address of a listener, one for each worker. Those that systemd holds are taken over.
///
/// # Errors
/// With what to do about it.
pub fn bind(
    address: SocketAddr,
    inherited: &[(SocketAddr, Socket)],
    workers: usize,
    listener: &Listener,
) -> anyhow::Result<Vec<Socket>> {
    let handed = inherited.iter().find(|(bound, _)| *bound == address);
    Ok(match handed {
        Some((_, socket)) => listener::take_over(address, socket, workers, &listener.timeouts)?,
        None => listener::bind_for_workers(address, workers, &listener.timeouts)?,
    })
}

/// How many connections the descriptors carry.
#[must_use]
pub fn connection_capacity(config: &Config, nofile: u64) -> usize {
    listener::connections_for(nofile, listen_socket_count(config), config.limits.workers)
}

/// How many listening sockets a configuration makes.
#[must_use]
pub fn listen_socket_count(config: &Config) -> usize {
    config.limits.workers * config.listeners.iter().map(|listener| listener.bind.len()).sum::<usize>()
}

/// What takes a restart stays as it runs; says which sections would be different.
fn retain_startup_settings(running: &Config, config: &mut Config) -> Vec<&'static str> {
    let mut requires_restart = Vec::new();
    let mut retain = |name, differs| {
        if differs {
            requires_restart.push(name);
        }
    };
    retain("metrics", config.metrics != running.metrics);
    retain("admin", config.admin != running.admin);
    retain("limits.workers", config.limits.workers != running.limits.workers);
    retain("splice", config.splice != running.splice);
    retain("inline", config.inline != running.inline);
    retain("log", config.log != running.log);
    config.metrics = running.metrics;
    config.admin.clone_from(&running.admin);
    config.limits.workers = running.limits.workers;
    config.splice = running.splice;
    config.inline = running.inline.clone();
    config.log = running.log;
    requires_restart
}

/// The doors whose addresses belong to a listener of another name from here on.
fn detach_sockets(
    before: &mut BTreeMap<String, ActiveListener>,
    config: &Config,
) -> BTreeMap<SocketAddr, ListenSockets> {
    let mut detached = BTreeMap::new();
    for listener in &config.listeners {
        for active in before.values_mut().filter(|active| active.config.name != listener.name) {
            detached.extend(listener.bind.iter().filter_map(|address| active.sockets.remove_entry(address)));
        }
    }
    detached
}

/// Gives a listener those that it has none of its own for.
fn adopt_sockets(active: &mut ActiveListener, handed_over: &mut BTreeMap<SocketAddr, ListenSockets>) {
    for address in &active.config.bind {
        let Some((address, sockets)) = handed_over.remove_entry(address) else { continue };
        for (owner, policy) in sockets.owners.iter().zip(&active.policies) {
            owner.hand_over(Arc::clone(policy));
        }
        tracing::info!(target: target::LISTENER, listener = active.config.name, %address, "listening (socket taken over from the listener that had this address)");
        active.sockets.insert(address, sockets);
    }
}

/// Cuts connections, which look when they are called.
fn abort_sessions<'a>(abort: &CancellationToken, registries: impl IntoIterator<Item = &'a SessionRegistry>) {
    abort.cancel();
    registries.into_iter().for_each(SessionRegistry::wake_all);
}
