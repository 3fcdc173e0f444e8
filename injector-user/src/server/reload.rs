//! Replaces the configuration while sessions continue.
//!
//! [`Server::prepare`] does everything that can fail and changes nothing. [`Server::apply`] cannot
//! fail.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};

use super::{
    active_listener::{ActiveListener, ListenSockets, ListenerSetup},
    listen_sockets::{connection_capacity, serves},
    startup::overall,
    state::Server,
};
use crate::{
    config::{Config, Guard, Listener},
    engine::select::{self, EngineSelection},
    listener::{self, SourceRules},
    net::source,
    telemetry::log::target,
};

/// A new configuration after every step that can fail.
#[derive(Debug)]
pub struct Prepared {
    max_connections: usize,
    guard: Option<Guard>,
    stop_deadline: Duration,
    listeners: Vec<ListenerSetup>,
    capacity: usize,
    requires_restart: Vec<&'static str>,
}

/// What a reload changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// New listeners.
    pub added: Vec<String>,
    /// Listeners with other settings.
    pub changed: Vec<String>,
    /// Listeners that are no longer configured.
    pub removed: Vec<String>,
    /// Sections whose changes need a restart.
    pub requires_restart: Vec<&'static str>,
}

/// What [`Server::prepare`] would do with a configuration.
#[derive(Debug)]
pub struct Rehearsal {
    /// The listeners, each with its engines or with why the configuration would be rejected.
    pub listeners: Vec<(Listener, anyhow::Result<EngineSelection>)>,
    /// Listeners that are no longer configured.
    pub removed: Vec<String>,
    /// Sections whose changes need a restart.
    pub requires_restart: Vec<&'static str>,
}

impl Server {
    /// Selects engines and binds addresses for a new configuration.
    ///
    /// # Errors
    /// When the server cannot serve it. Nothing has changed then.
    pub fn prepare(&self, config: Config) -> anyhow::Result<Prepared> {
        let requires_restart = self.settings.changed_sections(&config);
        let Config { limits, guard, stop, listeners, .. } = config;
        let capacity = self.capacity_for(&listeners)?;
        // First, because binding changes something.
        let selections: anyhow::Result<Vec<_>> =
            listeners.iter().map(|settings| self.select_engines(settings)).collect();
        let setup = |(settings, selection): (Listener, _)| {
            let sockets = source::check(&settings.source_addresses)
                .map_err(anyhow::Error::from)
                .and_then(|()| self.bind_new_addresses(&settings))
                .with_context(|| format!("listener {:?}", settings.name))?;
            Ok(ListenerSetup { settings, selection, sockets })
        };
        let listeners: anyhow::Result<Vec<_>> = listeners.into_iter().zip(selections?).map(setup).collect();
        let listeners = listeners?;
        // Last, because the sockets get clients from here on.
        for ListenerSetup { settings, sockets, .. } in &listeners {
            let listened =
                sockets.iter().try_for_each(|(address, sockets)| listener::listen(*address, sockets));
            listened.with_context(|| format!("listener {:?}", settings.name))?;
        }
        Ok(Prepared {
            max_connections: limits.max_connections,
            guard,
            stop_deadline: stop.deadline,
            listeners,
            capacity,
            requires_restart,
        })
    }

    /// Finds out what [`Self::prepare`] would do, for every listener, and changes nothing: the
    /// sockets that it binds are closed again, and never listen.
    ///
    /// # Errors
    /// When the server can serve none of the listeners.
    pub fn rehearse(&self, config: Config) -> anyhow::Result<Rehearsal> {
        let requires_restart = self.settings.changed_sections(&config);
        self.capacity_for(&config.listeners)?;
        let mut bound = Vec::new();
        let mut rehearse = |settings: &Listener| {
            let (selection, _) = self.decide_engines(settings)?;
            source::check(&settings.source_addresses)?;
            bound.push(self.bind_new_addresses(settings)?);
            Ok(selection)
        };
        let listeners: Vec<_> = config
            .listeners
            .into_iter()
            .map(|settings| {
                let result = rehearse(&settings);
                (settings, result)
            })
            .collect();
        let stays = |name: &str| listeners.iter().any(|(settings, _)| settings.name == name);
        let names = self.listeners.iter().map(|active| active.settings.name.as_str());
        let removed = names.filter(|name| !stays(name)).map(str::to_owned).collect();
        Ok(Rehearsal { listeners, removed, requires_restart })
    }

    /// How many connections the open-file limit allows with these listeners.
    fn capacity_for(&self, listeners: &[Listener]) -> anyhow::Result<usize> {
        let capacity = connection_capacity(self.settings.workers, listeners, self.nofile);
        ensure!(
            capacity > 0,
            "the open-file limit ({}) is too low for even one connection with this many addresses: raise it \
             (LimitNOFILE= in systemd, ulimit -n)",
            self.nofile
        );
        Ok(capacity)
    }

    /// Makes a prepared configuration effective for new sessions.
    pub fn apply(&mut self, prepared: Prepared) -> Changes {
        let Prepared { max_connections, guard, stop_deadline, listeners, capacity, requires_restart } =
            prepared;
        let mut changes = Changes { requires_restart, ..Changes::default() };
        // Releases the places of listeners that have ended.
        self.refresh_metrics();
        self.removed_listeners();
        let before = std::mem::take(&mut self.listeners);
        let mut before: BTreeMap<_, _> =
            before.into_iter().map(|active| (active.settings.name.clone(), active)).collect();
        let binds: Vec<_> = listeners.iter().flat_map(|setup| setup.settings.bind.iter().copied()).collect();
        let mut detached = detach_sockets(&mut before, &listeners);
        (self.max_connections, self.stop_deadline, self.capacity) =
            (max_connections, stop_deadline, capacity);
        self.shared.limits.resize(max_connections, capacity);
        self.shared.limits.set_source_rules(overall(guard.as_ref(), max_connections.min(capacity)));
        self.guard = guard;
        for setup in listeners {
            let name = setup.settings.name.clone();
            let active = match before.remove(&name) {
                None => {
                    changes.added.push(name);
                    // Its connections from before it was removed keep their deadline.
                    if let Some(reopened) = self.closed_to_inline.remove(&setup.settings.name) {
                        reopened.set();
                    }
                    self.start_listener(setup)
                }
                Some(mut active) => {
                    if active.settings != setup.settings {
                        changes.changed.push(name);
                        self.update_listener(&mut active, setup, &binds);
                    } else {
                        active.backends.reset_weights();
                    }
                    // `[guard]` may have changed, which is not the listener's own.
                    let per_source = active.settings.per_source;
                    active.source_limit.set_rules(SourceRules::new(self.guard.as_ref(), per_source));
                    active
                }
            };
            self.listeners.push(active);
        }
        for active in &mut self.listeners {
            adopt_sockets(active, &mut detached);
        }
        for (name, active) in before {
            self.remove_listener(active, &binds);
            changes.removed.push(name);
        }
        self.publish_limits();
        self.publish_to_inline();
        self.publish_addresses();
        changes
    }

    /// The engines of a listener, which are logged if they are new.
    fn select_engines(&self, listener: &Listener) -> anyhow::Result<EngineSelection> {
        let (selection, reason) = self.decide_engines(listener)?;
        if let Some(reason) = reason {
            select::log(listener, &selection, &reason);
        }
        Ok(selection)
    }

    /// The engines of a listener: those that it has, unless the configuration asks for others; then
    /// with the reason.
    fn decide_engines(&self, listener: &Listener) -> anyhow::Result<(EngineSelection, Option<String>)> {
        let before = self.listeners.iter().find(|active| active.settings.name == listener.name);
        let unchanged = |active: &&ActiveListener| {
            active.settings.engine == listener.engine && active.settings.receiver == listener.receiver
        };
        if let Some(active) = before.filter(unchanged) {
            return Ok((active.selection.clone(), None));
        }
        select::decide(listener, &self.probes)
            .map(|(selection, reason)| (selection, Some(reason)))
            .context("an engine that was not loaded at startup needs a restart of the daemon")
    }
}

/// Takes the sockets whose connections a listener of another name now serves.
fn detach_sockets(
    before: &mut BTreeMap<String, ActiveListener>,
    listeners: &[ListenerSetup],
) -> BTreeMap<SocketAddr, ListenSockets> {
    let mut detached = BTreeMap::new();
    for ListenerSetup { settings, .. } in listeners {
        for active in before.values_mut().filter(|active| active.settings.name != settings.name) {
            detached.extend(active.sockets.extract_if(.., |address, _| serves(&settings.bind, *address)));
        }
    }
    detached
}

/// Gives a listener the detached sockets whose connections it serves.
fn adopt_sockets(active: &mut ActiveListener, detached: &mut BTreeMap<SocketAddr, ListenSockets>) {
    let bind = &active.settings.bind;
    for (address, sockets) in detached.extract_if(.., |address, _| serves(bind, *address)) {
        for (owner, policy) in sockets.owners.iter().zip(&active.policies) {
            owner.replace_policy(Arc::clone(policy));
        }
        tracing::info!(target: target::LISTENER, listener = active.settings.name, %address, "listening (socket taken over from the listener that had this address)");
        active.sockets.insert(address, sockets);
    }
}
