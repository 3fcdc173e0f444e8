//! Starts, updates and removes single listeners.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use super::{
    active_listener::{ActiveListener, ListenerSetup, RemovedListener},
    state::Server,
    worker::Worker,
};
use crate::{
    backend::Backends,
    listener::{AdmissionPolicy, ConnectionLimit},
    protocol::FirstSpeaker,
    session::Context,
    telemetry::log::target,
};

impl Server {
    /// Starts the listener's health tasks and acceptors.
    pub(super) fn start_listener(&self, setup: ListenerSetup) -> ActiveListener {
        let ListenerSetup { settings, requested, engine, sockets } = setup;
        let name = engine.as_ref().map_or("inline", |engine| engine.name());
        let metrics = self.shared.metrics.listener(&settings.name, name);
        self.shared.metrics.set_draining(&settings.name, false);
        let abort = self.shared.abort_sessions.child_token();
        let mut active = ActiveListener {
            backends: Arc::new(Backends::new(&settings, None, Arc::clone(&self.backends_changed))),
            connection_limit: ConnectionLimit::new(settings.max_connections),
            drain: None,
            stop_health_tasks: self.shared.stop_accepting.child_token(),
            policies: Vec::new(),
            abort_new: abort.child_token(),
            abort_drained: Vec::new(),
            abort,
            sockets: BTreeMap::new(),
            settings,
            requested,
            engine,
            metrics,
        };
        self.spawn_health_tasks(&active);
        active.policies = self
            .session_contexts(&active)
            .into_iter()
            .map(|it| Arc::new(AdmissionPolicy::new(it, Arc::clone(&active.connection_limit))))
            .collect();
        self.start_sockets(&mut active, sockets);
        active
    }

    /// Keeps its backends' health and addresses up to date, and exports them as metrics.
    fn spawn_health_tasks(&self, active: &ActiveListener) {
        tokio::spawn(Arc::clone(&active.backends).run(active.stop_health_tasks.clone()));
        self.shared.metrics.watch_backends(&active.settings.name, active.backends.clone());
    }

    /// What the sessions that start from now on share, for each worker.
    fn session_contexts(&self, active: &ActiveListener) -> Vec<Arc<Context>> {
        let Some(engine) = &active.engine else { return Vec::new() };
        let listener = &active.settings;
        let name: Arc<str> = listener.name.as_str().into();
        let context = |worker: &Worker| {
            Arc::new(Context {
                listener: Arc::clone(&name),
                protocol: listener.protocol,
                expects_banner: listener.protocol.speaks_first() != FirstSpeaker::Unknown,
                backends: Arc::clone(&active.backends),
                metrics: active.metrics.clone(),
                engine: Arc::clone(engine),
                timeouts: listener.timeouts,
                receiver: listener.receiver.clone(),
                header: self.settings.splice.header,
                enrolment: self.settings.splice.enrolment,
                pipes: self.shared.pipes.clone(),
                watermarks: self.settings.splice.watermarks,
                backlog_total: self.shared.backlog_total.clone(),
                hangups: worker.hangups().clone(),
                abort: active.abort_new.clone(),
                sessions: worker.sessions().clone(),
                run_id: self.shared.run_id,
            })
        };
        self.workers.iter().map(context).collect()
    }

    /// Makes the acceptors use new contexts, for the sessions that start from now on.
    pub(super) fn replace_contexts(&self, active: &ActiveListener) {
        for (policy, context) in active.policies.iter().zip(self.session_contexts(active)) {
            policy.replace_context(context);
        }
    }

    /// Replaces the settings of a listener for new sessions; existing sessions keep theirs.
    pub(super) fn update_listener(&self, active: &mut ActiveListener, setup: ListenerSetup) {
        let ListenerSetup { settings, requested, engine, sockets } = setup;
        let name = engine.as_ref().map_or("inline", |engine| engine.name());
        active.metrics = self.shared.metrics.listener(&settings.name, name);
        active.stop_health_tasks.cancel();
        active.stop_health_tasks = self.shared.stop_accepting.child_token();
        active.backends =
            Arc::new(Backends::new(&settings, Some(&active.backends), Arc::clone(&self.backends_changed)));
        active.connection_limit.resize(settings.max_connections);
        (active.settings, active.requested, active.engine) = (settings, requested, engine);
        self.spawn_health_tasks(active);
        self.replace_contexts(active);
        // New sockets first: an address that is bound again always has a listening socket.
        self.start_sockets(active, sockets);
        active.sockets.retain(|address, sockets| {
            let keep = active.settings.bind.contains(address);
            if !keep {
                tracing::info!(target: target::LISTENER, listener = active.settings.name, %address, "no longer listening");
                sockets.stop_accepting.cancel();
            }
            keep
        });
    }

    /// Closes the sockets of a listener; its sessions may continue until the drain deadline.
    pub(super) fn remove_listener(&mut self, active: ActiveListener) {
        active.sockets.values().for_each(|sockets| sockets.stop_accepting.cancel());
        active.stop_health_tasks.cancel();
        let name = active.settings.name;
        let deadline = Instant::now() + active.settings.timeouts.drain;
        tracing::info!(target: target::LISTENER, listener = name, deadline = ?active.settings.timeouts.drain, "listener removed; its sessions may finish until the deadline");
        self.abort_at(deadline, active.abort);
        self.shared.metrics.forget_listener(&name);
        self.removed.push(RemovedListener { name, deadline, metrics: active.metrics });
    }
}
