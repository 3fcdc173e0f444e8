//! Starts, updates and removes single listeners.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use super::{
    active_listener::{ActiveListener, RemovedListener},
    listen_sockets::BoundSockets,
    state::Server,
    worker::Worker,
};
use crate::{
    backend::Backends,
    config::{EngineChoice, Listener},
    engine::Engine,
    listener::{AdmissionPolicy, ConnectionLimit},
    protocol::FirstSpeaker,
    session::Context,
    telemetry::log::target,
};

impl Server {
    pub(super) fn start_listener(
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
            connection_limit: ConnectionLimit::new(listener.max_connections),
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
            .map(|it| Arc::new(AdmissionPolicy::new(it, Arc::clone(&active.connection_limit))))
            .collect();
        self.start_sockets(&mut active, sockets);
        active
    }

    /// What is known of its backends is kept up to date, and published.
    fn spawn_health_tasks(&self, active: &ActiveListener) {
        tokio::spawn(Arc::clone(&active.backends).run(active.stop_health_tasks.clone()));
        self.shared.metrics.watch_backends(&active.config.name, active.backends.clone());
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
                expects_banner: listener.protocol.speaks_first() != FirstSpeaker::Unknown,
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
    pub(super) fn replace_contexts(&self, active: &ActiveListener) {
        for (policy, context) in active.policies.iter().zip(self.session_contexts(active)) {
            policy.replace_context(context);
        }
    }

    pub(super) fn update_listener(
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

    pub(super) fn remove_listener(&mut self, active: ActiveListener) {
        active.sockets.values().for_each(|sockets| sockets.stop_accepting.cancel());
        active.stop_health_tasks.cancel();
        let name = active.config.name;
        let deadline = Instant::now() + active.config.timeouts.drain;
        tracing::info!(target: target::LISTENER, listener = name, deadline = ?active.config.timeouts.drain, "listener removed; its sessions may finish until the deadline");
        self.abort_at(deadline, active.abort);
        self.shared.metrics.forget_listener(&name);
        self.removed.push(RemovedListener { name, deadline, metrics: active.metrics });
    }
}
