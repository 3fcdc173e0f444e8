//! Starts, updates and removes single listeners.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Instant};

use super::{
    active_listener::{ActiveListener, ListenerSetup, RemovedListener},
    listen_sockets::serves,
    state::Server,
    worker::Worker,
};
use crate::{
    backend::Backends,
    engine::usage::UsageCounts,
    kubernetes::Followed,
    listener::{AdmissionPolicy, ConnectionLimit, SourceLimit, SourceRules},
    protocol::FirstSpeaker,
    session::Context,
    telemetry::{log::target, metrics::ConnectionCounts},
};

impl Server {
    /// Starts the listener's health tasks and acceptors.
    pub(super) fn start_listener(&self, setup: ListenerSetup) -> ActiveListener {
        let ListenerSetup { settings, selection, sockets } = setup;
        let metrics = self.shared.metrics.listener(&settings.name, selection.engine.name());
        let inline_counts = self.inline_counts(&settings.name);
        self.shared.metrics.set_draining(&settings.name, false);
        let abort = self.shared.abort_sessions.child_token();
        let mut active = ActiveListener {
            virtual_addresses: Followed::load_balancers(&settings.virtual_addresses, &self.watcher),
            backends: Arc::new(Backends::new(&settings, None, Arc::clone(&self.backends_changed))),
            connection_limit: ConnectionLimit::new(settings.max_connections, inline_counts.clone()),
            source_limit: SourceLimit::new(
                SourceRules::new(self.guard.as_ref(), settings.per_source),
                inline_counts.clone(),
            ),
            inline_counts,
            inline_metrics: None,
            drain: None,
            stop_health_tasks: self.shared.stop_accepting.child_token(),
            policies: Vec::new(),
            abort_new: abort.child_token(),
            abort_drained: Vec::new(),
            abort,
            sockets: BTreeMap::new(),
            settings,
            selection,
            metrics,
        };
        self.spawn_health_tasks(&active);
        self.watch_inline(&mut active);
        active.policies = self
            .session_contexts(&active)
            .into_iter()
            .map(|it| {
                let limits = (Arc::clone(&active.connection_limit), Arc::clone(&active.source_limit));
                Arc::new(AdmissionPolicy::new(it, limits.0, limits.1))
            })
            .collect();
        self.start_sockets(&mut active, sockets);
        active
    }

    /// The listener's place among the counts of the inline engine.
    fn inline_counts(&self, listener: &str) -> Option<Arc<dyn UsageCounts>> {
        let counts = self.inline_usage.as_ref()?.listener(listener);
        if counts.is_none() {
            tracing::warn!(target: target::ENGINE_INLINE, listener, "too many listeners for the inline engine; all connections of this one go to its sockets");
        }
        counts
    }

    /// Exports the counts of its inline connections as metrics.
    fn watch_inline(&self, active: &mut ActiveListener) {
        let Some(counts) = active.inline_counts.clone().filter(|_| active.selection.inline) else { return };
        let read =
            move || ConnectionCounts { active: counts.established().into(), accepted: counts.accepted() };
        active.inline_metrics = Some(self.shared.metrics.listener(&active.settings.name, "inline"));
        self.shared.metrics.watch_connections(&active.settings.name, "inline", read);
    }

    /// Keeps its backends' health and addresses up to date, and exports them as metrics.
    fn spawn_health_tasks(&self, active: &ActiveListener) {
        tokio::spawn(
            Arc::clone(&active.backends).run(self.watcher.clone(), active.stop_health_tasks.clone()),
        );
        self.shared.metrics.watch_backends(&active.settings.name, active.backends.clone());
    }

    /// What the sessions that start from now on share, for each worker.
    fn session_contexts(&self, active: &ActiveListener) -> Vec<Arc<Context>> {
        let listener = &active.settings;
        let name: Arc<str> = listener.name.as_str().into();
        let context = |worker: &Worker| {
            Arc::new(Context {
                listener: Arc::clone(&name),
                translated_sources: listener.translated_sources.clone(),
                protocol: listener.protocol,
                expects_banner: listener.protocol.speaks_first() != FirstSpeaker::Unknown,
                backends: Arc::clone(&active.backends),
                metrics: active.metrics.clone(),
                engine: Arc::clone(&active.selection.engine),
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

    /// Replaces the settings of a listener for new sessions; existing sessions keep theirs. `binds`
    /// are the addresses of all listeners.
    pub(super) fn update_listener(
        &mut self,
        active: &mut ActiveListener,
        setup: ListenerSetup,
        binds: &[SocketAddr],
    ) {
        let ListenerSetup { settings, selection, sockets } = setup;
        active.metrics = self.shared.metrics.listener(&settings.name, selection.engine.name());
        active.stop_health_tasks.cancel();
        active.stop_health_tasks = self.shared.stop_accepting.child_token();
        active.backends =
            Arc::new(Backends::new(&settings, Some(&active.backends), Arc::clone(&self.backends_changed)));
        active.connection_limit.resize(settings.max_connections);
        active.virtual_addresses = Followed::load_balancers(&settings.virtual_addresses, &self.watcher);
        (active.settings, active.selection) = (settings, selection);
        self.spawn_health_tasks(active);
        self.watch_inline(active);
        self.replace_contexts(active);
        // New sockets first: an address that is bound again always has a listening socket.
        self.start_sockets(active, sockets);
        let bind = &active.settings.bind;
        let unused: Vec<_> = active.sockets.extract_if(.., |address, _| !serves(bind, *address)).collect();
        for (address, sockets) in unused {
            self.close_sockets(&active.settings.name, address, sockets, binds);
        }
    }

    /// Closes the sockets of a listener; its sessions may continue until the drain deadline. `binds`
    /// are the addresses of all other listeners.
    pub(super) fn remove_listener(&mut self, active: ActiveListener, binds: &[SocketAddr]) {
        let name = active.settings.name;
        for (address, sockets) in active.sockets {
            self.close_sockets(&name, address, sockets, binds);
        }
        active.stop_health_tasks.cancel();
        let deadline = Instant::now() + active.settings.timeouts.drain;
        tracing::info!(target: target::LISTENER, listener = name, deadline = ?active.settings.timeouts.drain, "listener removed; its sessions may finish until the deadline");
        self.abort_at(deadline, active.abort);
        self.reset_inline_at(deadline, &name);
        self.shared.metrics.forget_listener(&name);
        let (metrics, inline_counts) = (active.metrics, active.inline_counts);
        self.removed.push(RemovedListener { name, deadline, metrics, inline_counts });
    }
}
