//! The listeners that are open, and how that changes while the daemon runs: another configuration, a drain, the stop.
//!
//! What a change may fail of is done first ([`Serving::prepare`]); what follows ([`Serving::apply`]) cannot fail. Sessions
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
    net::{splice_pipe as pipe, splice_pipe::Pipes},
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
const AFTER_THE_CUT: Duration = Duration::from_secs(3);

/// Sockets by the address of the configuration: for each, one for each worker.
pub type Sockets = Vec<(SocketAddr, Vec<Socket>)>;

/// What the daemon was started with, and keeps.
#[derive(Debug)]
pub struct Outset {
    /// As it runs: what `auto` came to is in [`Listener::engine`].
    pub config: Config,
    /// For each listener.
    pub selections: Vec<EngineSelection>,
    /// For each listener; none for those whose packets never reach a socket.
    pub sockets: Vec<Sockets>,
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
pub struct Serving {
    config: Config,
    probes: EngineProbes,
    inherited: Vec<(SocketAddr, Socket)>,
    nofile: u64,
    shared: Shared,
    /// In the order of the configuration.
    listeners: Vec<Open>,
    /// No longer configured, and not yet without sessions.
    leaving: Vec<Leaving>,
    workers: Vec<Worker>,
    /// Rings when the backends whose turn it is have changed.
    changed: Arc<Notify>,
    /// What engine inline is to serve.
    inline: watch::Sender<Vec<ServedListener>>,
}

/// What all listeners share.
#[derive(Debug)]
struct Shared {
    /// Nobody more is let in.
    stop: CancellationToken,
    /// Who is still there is cut.
    cut: CancellationToken,
    /// The threads end.
    ended: CancellationToken,
    doors: TaskTracker,
    sessions: TaskTracker,
    limits: Limits,
    pipes: Pipes,
    backlog_total: BacklogTotal,
    metrics: Metrics,
    run_id: u64,
}

/// A listener that is served.
#[derive(Debug)]
pub struct Open {
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
    pub drained: Option<Drained>,
    /// Ends checks and resolving.
    background: CancellationToken,
    /// One for each worker.
    policies: Vec<Arc<Policy>>,
    own: Arc<Room>,
    /// What cuts all of its sessions.
    cut: CancellationToken,
    /// What cuts those that come from now on.
    cut_next: CancellationToken,
    /// What cuts those that came before a drain.
    cut_drained: Vec<CancellationToken>,
    /// By the addresses of the configuration.
    doors: BTreeMap<SocketAddr, Doors>,
}

/// The doors of one address.
#[derive(Debug)]
struct Doors {
    /// Closes them.
    stop: CancellationToken,
    /// One for each worker.
    owners: Vec<Arc<Owner>>,
}

/// A drain under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// When sessions are cut; `None`: never.
    pub until: Option<Instant>,
}

/// A listener that is no longer configured.
#[derive(Debug)]
pub struct Leaving {
    /// Its name.
    pub name: String,
    /// When its sessions are cut.
    pub until: Instant,
    metrics: ListenerMetrics,
}

/// Another configuration, with all that could have failed.
#[derive(Debug)]
pub struct Prepared {
    config: Config,
    selections: Vec<EngineChoice>,
    engines: Vec<Option<Arc<dyn Engine>>>,
    /// For each listener, the sockets for addresses that it did not have.
    sockets: Vec<Sockets>,
    carried: usize,
    later: Vec<&'static str>,
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
    pub later: Vec<&'static str>,
}

impl Serving {
    /// Opens the doors of all listeners that have an engine.
    ///
    /// # Errors
    /// When there can be no further thread or epoll instance.
    pub fn begin(outset: Outset, metrics: &Metrics, backlog_total: &BacklogTotal) -> anyhow::Result<Self> {
        let Outset { config, selections, sockets, inherited, engines, probes, nofile } = outset;
        let (doors, ended) = (TaskTracker::new(), CancellationToken::new());
        let worker = |number| Worker::start(number, &doors, ended.clone());
        let workers: Result<Vec<_>, _> = (0..config.limits.workers).map(worker).collect();
        let workers = workers.context("starting a worker thread")?;
        let shared = Shared {
            stop: CancellationToken::new(),
            cut: CancellationToken::new(),
            ended,
            doors,
            sessions: TaskTracker::new(),
            limits: Limits::new(config.limits.max_connections, carried(&config, nofile)),
            pipes: Pipes::new(pipe::MAX_PIPES),
            backlog_total: backlog_total.clone(),
            metrics: metrics.clone(),
            run_id: RandomState::new().hash_one(std::process::id()),
        };
        let mut serving = Self {
            config: config.clone(),
            probes,
            inherited,
            nofile,
            shared,
            listeners: Vec::new(),
            leaving: Vec::new(),
            workers,
            changed: Arc::default(),
            inline: watch::Sender::default(),
        };
        for (((listener, choice), sockets), engine) in
            config.listeners.into_iter().zip(selections).zip(sockets).zip(engines)
        {
            let open = serving.open(listener, choice.requested, engine, sockets);
            serving.listeners.push(open);
        }
        serving.say_limits();
        serving.tell_inline();
        Ok(serving)
    }

    /// Finds out whether another configuration can be served, and opens what it needs to be.
    ///
    /// # Errors
    /// Why not. Everything is as before.
    pub fn prepare(&self, mut config: Config) -> anyhow::Result<Prepared> {
        let later = keep_what_stays(&self.config, &mut config);
        let mut prepared = Prepared {
            selections: config.listeners.iter().map(|listener| listener.engine).collect(),
            engines: Vec::new(),
            sockets: Vec::new(),
            carried: carried(&config, self.nofile),
            later,
            config,
        };
        if prepared.carried == 0 {
            bail!(
                "the open-file limit ({}) is too low for even one connection with this many addresses: raise it \
                 (LimitNOFILE= in systemd, ulimit -n)",
                self.nofile
            );
        }
        for listener in &mut prepared.config.listeners {
            let engine =
                self.engine_for(listener).with_context(|| format!("listener {:?}", listener.name))?;
            prepared.engines.push(engine);
        }
        self.refuse_gone_inline(&prepared.config)?;
        for listener in &prepared.config.listeners {
            let sockets =
                self.sockets_for(listener).with_context(|| format!("listener {:?}", listener.name))?;
            prepared.sockets.push(sockets);
        }
        Ok(prepared)
    }

    /// Serves it from here on.
    pub fn apply(&mut self, prepared: Prepared) -> Changes {
        let Prepared { config, selections, engines, sockets, carried, later } = prepared;
        let mut changes = Changes { later, ..Changes::default() };
        let before = std::mem::take(&mut self.listeners);
        let mut before: BTreeMap<_, _> =
            before.into_iter().map(|open| (open.config.name.clone(), open)).collect();
        let mut handed_over = take_doors(&mut before, &config);
        self.config = config.clone();
        self.shared.limits.resize(config.limits.max_connections, carried);
        for (((listener, requested), engine), sockets) in
            config.listeners.into_iter().zip(selections).zip(engines).zip(sockets)
        {
            let name = listener.name.clone();
            let open = match before.remove(&name) {
                None => {
                    changes.added.push(name);
                    self.open(listener, requested, engine, sockets)
                }
                Some(mut open) => {
                    if open.config != listener || open.requested != requested {
                        changes.changed.push(name);
                        self.change(&mut open, listener, requested, engine, sockets);
                    }
                    open
                }
            };
            self.listeners.push(open);
        }
        for open in &mut self.listeners {
            receive_doors(open, &mut handed_over);
        }
        for (name, open) in before {
            self.close(open);
            changes.removed.push(name);
        }
        self.say_limits();
        self.tell_inline();
        changes
    }

    /// Turns new clients of a listener away, of all listeners without a name, and cuts who is there after `within`, or after
    /// what the configuration says. Returns the names.
    ///
    /// # Errors
    /// When there is no such listener.
    pub fn drain(&mut self, name: Option<&str>, within: Option<Duration>) -> anyhow::Result<Vec<String>> {
        let named = self.named(name)?;
        let mut drained = Vec::new();
        let mut listeners = std::mem::take(&mut self.listeners);
        for index in named {
            let Some(open) = listeners.get_mut(index) else { continue };
            open.policies.iter().for_each(|policy| policy.drain(true));
            let within = within.unwrap_or(open.config.timeouts.drain);
            // Packets are not ours to cut.
            let until = open.engine.is_some().then(|| Instant::now() + within);
            open.drained = Some(Drained { until });
            self.shared.metrics.set_draining(&open.config.name, true);
            tracing::info!(target: target::LISTENER, listener = open.config.name, deadline = ?within, "draining: new connections are rejected, sessions may finish until the deadline");
            let before = std::mem::replace(&mut open.cut_next, open.cut.child_token());
            self.renew_contexts(open);
            open.cut_drained.retain(|cut| !cut.is_cancelled());
            open.cut_drained.push(before);
            if let Some(until) = until {
                // Of two drains, the one that ends sooner holds.
                open.cut_drained.iter().for_each(|cut| self.cut_at(until, cut.clone()));
            }
            drained.push(open.config.name.clone());
        }
        self.listeners = listeners;
        self.tell_inline();
        Ok(drained)
    }

    /// Lets clients in again. Sessions from before the drain are still cut when their time is over. Returns the names of those
    /// that were drained.
    ///
    /// # Errors
    /// When there is no such listener.
    pub fn resume(&mut self, name: Option<&str>) -> anyhow::Result<Vec<String>> {
        let mut resumed = Vec::new();
        for index in self.named(name)? {
            let Some(open) = self.listeners.get_mut(index).filter(|open| open.drained.is_some()) else {
                continue;
            };
            open.policies.iter().for_each(|policy| policy.drain(false));
            open.drained = None;
            self.shared.metrics.set_draining(&open.config.name, false);
            tracing::info!(target: target::LISTENER, listener = open.config.name, "draining ended: new connections are accepted again");
            resumed.push(open.config.name.clone());
        }
        self.tell_inline();
        Ok(resumed)
    }

    /// The listeners, in the order of the configuration.
    #[must_use]
    pub fn listeners(&self) -> &[Open] {
        &self.listeners
    }

    /// Those that are no longer configured and still have sessions, with how many.
    pub fn leaving(&mut self) -> Vec<(&Leaving, u64)> {
        self.leaving.retain(|leaving| leaving.metrics.snapshot().active > 0);
        self.leaving.iter().map(|leaving| (leaving, leaving.metrics.snapshot().active)).collect()
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
        let most = self.config.limits.max_connections.min(carried(&self.config, self.nofile));
        (self.shared.limits.taken(), most)
    }

    /// Bytes that wait in the kernel.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.shared.backlog_total.bytes()
    }

    /// Whether every listener is drained.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.listeners.iter().all(|open| open.drained.is_some())
    }

    /// What engine inline is to serve, now and whenever it changes, and what rings when other backends are to get its
    /// connections.
    #[must_use]
    pub fn inline(&self) -> (watch::Receiver<Vec<ServedListener>>, Arc<Notify>) {
        (self.inline.subscribe(), Arc::clone(&self.changed))
    }

    /// Whether every thread that serves connections does its work.
    pub fn pulse(&self) -> impl Future<Output = bool> + use<> {
        let beats: Vec<_> = self.workers.iter().map(Worker::pulse).collect();
        async move {
            for beat in beats {
                if beat.await.is_err() {
                    return false;
                }
            }
            true
        }
    }

    /// Closes the doors, and cuts who has not finished at the deadline, or when it is requested for `again`.
    pub async fn end(self, deadline: Duration, again: impl Future<Output = ()>) {
        let Shared { stop, cut, ended, doors, sessions, .. } = self.shared;
        stop.cancel();
        doors.close();
        doors.wait().await;
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
            () = again => false,
        };
        let mut count = 0;
        if !finished {
            count = sessions.len();
            cut_now(&cut, self.workers.iter().map(Worker::sessions));
            if tokio::time::timeout(AFTER_THE_CUT, sessions.wait()).await.is_err() {
                tracing::warn!(target: target::DAEMON, sessions = sessions.len(), "sessions are still open after they were aborted; they end with the process");
            }
        }
        ended.cancel();
        self.workers.into_iter().for_each(Worker::join);
        let by_themselves = left.saturating_sub(count);
        tracing::info!(target: target::DAEMON,
            completed = by_themselves,
            aborted = count,
            "stopped: {by_themselves} sessions completed, {count} aborted"
        );
    }

    fn open(
        &self,
        listener: Listener,
        requested: EngineChoice,
        engine: Option<Arc<dyn Engine>>,
        sockets: Sockets,
    ) -> Open {
        let name = engine.as_ref().map_or("inline", |engine| engine.name());
        let metrics = self.shared.metrics.listener(&listener.name, name);
        self.shared.metrics.set_draining(&listener.name, false);
        let cut = self.shared.cut.child_token();
        let mut open = Open {
            backends: Arc::new(Backends::new(&listener, None, Arc::clone(&self.changed))),
            own: Room::new(listener.max_connections),
            drained: None,
            background: self.shared.stop.child_token(),
            policies: Vec::new(),
            cut_next: cut.child_token(),
            cut_drained: Vec::new(),
            cut,
            doors: BTreeMap::new(),
            config: listener,
            requested,
            engine,
            metrics,
        };
        self.look_after(&open);
        open.policies = self
            .contexts(&open)
            .into_iter()
            .map(|it| Arc::new(Policy::new(it, Arc::clone(&open.own))))
            .collect();
        self.open_doors(&mut open, sockets);
        open
    }

    /// What is known of its backends is kept up to date, and published.
    fn look_after(&self, open: &Open) {
        tokio::spawn(Arc::clone(&open.backends).keep_up_to_date(open.background.clone()));
        self.shared.metrics.watch_backends(&open.config.name, open.backends.clone());
    }

    fn open_doors(&self, open: &mut Open, sockets: Sockets) {
        for (address, sockets) in sockets {
            let bound = sockets.first().and_then(|socket| socket.local_addr().ok()?.as_socket());
            tracing::info!(target: target::LISTENER,
                listener = open.config.name,
                address = bound.map(tracing::field::display),
                "listening"
            );
            let stop = self.shared.stop.child_token();
            let owners: Vec<_> =
                open.policies.iter().map(|policy| Arc::new(Owner::new(Arc::clone(policy)))).collect();
            for ((worker, owner), socket) in self.workers.iter().zip(&owners).zip(sockets) {
                let door = Door {
                    owner: Arc::clone(owner),
                    limits: self.shared.limits.clone(),
                    sessions: self.shared.sessions.clone(),
                    stop: stop.clone(),
                };
                worker.open(door, socket);
            }
            open.doors.insert(address, Doors { stop, owners });
        }
    }

    /// What the sessions of a listener share that come from now on, for each worker.
    fn contexts(&self, open: &Open) -> Vec<Arc<Context>> {
        let Some(engine) = &open.engine else { return Vec::new() };
        let listener = &open.config;
        let name: Arc<str> = listener.name.as_str().into();
        let context = |worker: &Worker| {
            Arc::new(Context {
                listener: Arc::clone(&name),
                protocol: listener.protocol,
                expects_banner: listener.protocol.speaks_first() != Speaker::Unknown,
                backends: Arc::clone(&open.backends),
                metrics: open.metrics.clone(),
                engine: Arc::clone(engine),
                timeouts: listener.timeouts,
                receiver: listener.receiver.clone(),
                header: self.config.splice.header,
                enrolment: self.config.splice.enrolment,
                pipes: self.shared.pipes.clone(),
                watermarks: self.config.splice.watermarks,
                backlog_total: self.shared.backlog_total.clone(),
                hangups: worker.hangups().clone(),
                abort: open.cut_next.clone(),
                sessions: worker.sessions().clone(),
                run_id: self.shared.run_id,
            })
        };
        self.workers.iter().map(context).collect()
    }

    /// Gives them to its doors.
    fn renew_contexts(&self, open: &Open) {
        for (policy, context) in open.policies.iter().zip(self.contexts(open)) {
            policy.change(context);
        }
    }

    fn change(
        &self,
        open: &mut Open,
        listener: Listener,
        requested: EngineChoice,
        engine: Option<Arc<dyn Engine>>,
        sockets: Sockets,
    ) {
        let name = engine.as_ref().map_or("inline", |engine| engine.name());
        open.metrics = self.shared.metrics.listener(&listener.name, name);
        open.background.cancel();
        open.background = self.shared.stop.child_token();
        open.backends = Arc::new(Backends::new(&listener, Some(&open.backends), Arc::clone(&self.changed)));
        open.own.resize(listener.max_connections);
        (open.config, open.requested, open.engine) = (listener, requested, engine);
        self.look_after(open);
        self.renew_contexts(open);
        // The new doors first: an address that only has to be opened anew is never without one.
        self.open_doors(open, sockets);
        open.doors.retain(|address, doors| {
            let stays = open.config.bind.contains(address);
            if !stays {
                tracing::info!(target: target::LISTENER, listener = open.config.name, %address, "no longer listening");
                doors.stop.cancel();
            }
            stays
        });
    }

    fn cut_at(&self, until: Instant, cut: CancellationToken) {
        let registries: Vec<_> = self.workers.iter().map(|worker| worker.sessions().clone()).collect();
        tokio::spawn(async move {
            tokio::time::sleep_until(until.into()).await;
            cut_now(&cut, &registries);
        });
    }

    fn close(&mut self, open: Open) {
        open.doors.values().for_each(|doors| doors.stop.cancel());
        open.background.cancel();
        let name = open.config.name;
        let until = Instant::now() + open.config.timeouts.drain;
        tracing::info!(target: target::LISTENER, listener = name, deadline = ?open.config.timeouts.drain, "listener removed; its sessions may finish until the deadline");
        self.cut_at(until, open.cut);
        self.shared.metrics.forget_listener(&name);
        self.leaving.push(Leaving { name, until, metrics: open.metrics });
    }

    fn named(&self, name: Option<&str>) -> anyhow::Result<Vec<usize>> {
        let Some(name) = name else { return Ok((0..self.listeners.len()).collect()) };
        match self.listeners.iter().position(|open| open.config.name == name) {
            Some(index) => Ok(vec![index]),
            None => {
                let all: Vec<_> = self.listeners.iter().map(|open| open.config.name.as_str()).collect();
                bail!("no listener is named {name:?}; configured listeners: {}", all.join(", "))
            }
        }
    }

    /// A listener goes on with its engine unless it asks for another. Packets and sockets do not change places while the daemon
    /// runs.
    fn engine_for(&self, listener: &mut Listener) -> anyhow::Result<Option<Arc<dyn Engine>>> {
        let before = self.listeners.iter().find(|open| open.config.name == listener.name);
        let was_inline = before.is_some_and(|open| open.engine.is_none());
        let stays = before.is_some_and(|open| open.requested == listener.engine);
        if was_inline && stays {
            listener.engine = EngineChoice::Inline;
            if let Some(open) = before
                && (open.config.bind != listener.bind || open.config.receiver != listener.receiver)
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
        if let Some(open) = before.filter(|_| stays) {
            return Ok(open.engine.clone());
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
        let gone = |open: &&Open| {
            open.engine.is_none()
                && !config.listeners.iter().any(|listener| listener.name == open.config.name)
        };
        match self.listeners.iter().find(gone) {
            Some(open) => {
                bail!("listener {:?}: removing an inline listener needs a restart", open.config.name)
            }
            None => Ok(()),
        }
    }

    /// Sockets for the addresses of a listener that nobody has open.
    fn sockets_for(&self, listener: &Listener) -> anyhow::Result<Sockets> {
        if listener.engine == EngineChoice::Inline {
            return Ok(Vec::new());
        }
        // Its own, or that of a listener that hands it over.
        let ours = |address: &&SocketAddr| self.listeners.iter().any(|open| open.doors.contains_key(address));
        let bind = |address: &SocketAddr| {
            let sockets = bind(*address, &self.inherited, self.config.limits.workers, listener)?;
            Ok((*address, sockets))
        };
        listener.bind.iter().filter(|address| !ours(address)).map(bind).collect()
    }

    fn say_limits(&self) {
        self.shared.metrics.set_max_connections(self.connections().1);
    }

    fn tell_inline(&self) {
        let served = |open: &Open| ServedListener {
            listener: open.config.clone(),
            backends: Arc::clone(&open.backends),
            draining: open.drained.is_some(),
        };
        self.inline
            .send_replace(self.listeners.iter().filter(|open| open.engine.is_none()).map(served).collect());
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
pub fn carried(config: &Config, nofile: u64) -> usize {
    listener::connections_for(nofile, doors(config), config.limits.workers)
}

/// How many listening sockets a configuration makes.
#[must_use]
pub fn doors(config: &Config) -> usize {
    config.limits.workers * config.listeners.iter().map(|listener| listener.bind.len()).sum::<usize>()
}

/// What takes a restart stays as it runs; says which sections would be different.
fn keep_what_stays(running: &Config, config: &mut Config) -> Vec<&'static str> {
    let mut later = Vec::new();
    let mut stay = |name, differs| {
        if differs {
            later.push(name);
        }
    };
    stay("metrics", config.metrics != running.metrics);
    stay("admin", config.admin != running.admin);
    stay("limits.workers", config.limits.workers != running.limits.workers);
    stay("splice", config.splice != running.splice);
    stay("inline", config.inline != running.inline);
    stay("log", config.log != running.log);
    config.metrics = running.metrics;
    config.admin.clone_from(&running.admin);
    config.limits.workers = running.limits.workers;
    config.splice = running.splice;
    config.inline = running.inline.clone();
    config.log = running.log;
    later
}

/// The doors whose addresses belong to a listener of another name from here on.
fn take_doors(before: &mut BTreeMap<String, Open>, config: &Config) -> BTreeMap<SocketAddr, Doors> {
    let mut taken = BTreeMap::new();
    for listener in &config.listeners {
        for open in before.values_mut().filter(|open| open.config.name != listener.name) {
            taken.extend(listener.bind.iter().filter_map(|address| open.doors.remove_entry(address)));
        }
    }
    taken
}

/// Gives a listener those that it has none of its own for.
fn receive_doors(open: &mut Open, handed_over: &mut BTreeMap<SocketAddr, Doors>) {
    for address in &open.config.bind {
        let Some((address, doors)) = handed_over.remove_entry(address) else { continue };
        for (owner, policy) in doors.owners.iter().zip(&open.policies) {
            owner.hand_over(Arc::clone(policy));
        }
        tracing::info!(target: target::LISTENER, listener = open.config.name, %address, "listening (socket taken over from the listener that had this address)");
        open.doors.insert(address, doors);
    }
}

/// Cuts connections, which look when they are called.
fn cut_now<'a>(cut: &CancellationToken, registries: impl IntoIterator<Item = &'a SessionRegistry>) {
    cut.cancel();
    registries.into_iter().for_each(SessionRegistry::wake_all);
}
