//! Replaces the configuration while sessions continue.
//!
//! [`Server::prepare`] does everything that can fail and changes nothing. [`Server::apply`] cannot
//! fail.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};

use super::{
    active_listener::{ActiveListener, ListenSockets, ListenerSetup},
    listen_sockets::connection_capacity,
    state::Server,
};
use crate::{
    config::{Config, Listener},
    engine::select::{self, EngineSelection},
    telemetry::log::target,
};

/// A new configuration after every step that can fail.
#[derive(Debug)]
pub struct Prepared {
    max_connections: usize,
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

impl Server {
    /// Selects engines and binds addresses for a new configuration.
    ///
    /// # Errors
    /// When the server cannot serve it. Nothing has changed then.
    pub fn prepare(&self, config: Config) -> anyhow::Result<Prepared> {
        let requires_restart = self.settings.changed_sections(&config);
        let Config { limits, stop, listeners, .. } = config;
        let capacity = connection_capacity(self.settings.workers, &listeners, self.nofile);
        if capacity == 0 {
            bail!(
                "the open-file limit ({}) is too low for even one connection with this many addresses: raise it \
                 (LimitNOFILE= in systemd, ulimit -n)",
                self.nofile
            );
        }
        // First, because binding changes something.
        let selections: anyhow::Result<Vec<_>> =
            listeners.iter().map(|settings| self.select_engines(settings)).collect();
        let setup = |(settings, selection): (Listener, _)| {
            let sockets = self
                .bind_new_addresses(&settings)
                .with_context(|| format!("listener {:?}", settings.name))?;
            Ok(ListenerSetup { settings, selection, sockets })
        };
        let listeners: anyhow::Result<_> = listeners.into_iter().zip(selections?).map(setup).collect();
        Ok(Prepared {
            max_connections: limits.max_connections,
            stop_deadline: stop.deadline,
            listeners: listeners?,
            capacity,
            requires_restart,
        })
    }

    /// Makes a prepared configuration effective for new sessions.
    pub fn apply(&mut self, prepared: Prepared) -> Changes {
        let Prepared { max_connections, stop_deadline, listeners, capacity, requires_restart } = prepared;
        let mut changes = Changes { requires_restart, ..Changes::default() };
        // Releases the places of listeners that have ended.
        self.refresh_metrics();
        self.removed_listeners();
        let before = std::mem::take(&mut self.listeners);
        let mut before: BTreeMap<_, _> =
            before.into_iter().map(|active| (active.settings.name.clone(), active)).collect();
        let mut detached = detach_sockets(&mut before, &listeners);
        (self.max_connections, self.stop_deadline, self.capacity) =
            (max_connections, stop_deadline, capacity);
        self.shared.limits.resize(max_connections, capacity);
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
                        self.update_listener(&mut active, setup);
                    }
                    active
                }
            };
            self.listeners.push(active);
        }
        for active in &mut self.listeners {
            adopt_sockets(active, &mut detached);
        }
        for (name, active) in before {
            self.remove_listener(active);
            changes.removed.push(name);
        }
        self.publish_limits();
        self.publish_to_inline();
        changes
    }

    /// The engines of a listener: those that it has, unless the configuration asks for others.
    fn select_engines(&self, listener: &Listener) -> anyhow::Result<EngineSelection> {
        let before = self.listeners.iter().find(|active| active.settings.name == listener.name);
        let unchanged = |active: &&ActiveListener| {
            active.settings.engine == listener.engine && active.settings.receiver == listener.receiver
        };
        if let Some(active) = before.filter(unchanged) {
            return Ok(active.selection.clone());
        }
        select::select(listener, &self.probes)
            .context("an engine that was not loaded at startup needs a restart of the daemon")
    }
}

/// Takes the sockets whose addresses now belong to a listener of another name.
fn detach_sockets(
    before: &mut BTreeMap<String, ActiveListener>,
    listeners: &[ListenerSetup],
) -> BTreeMap<SocketAddr, ListenSockets> {
    let mut detached = BTreeMap::new();
    for ListenerSetup { settings, .. } in listeners {
        for active in before.values_mut().filter(|active| active.settings.name != settings.name) {
            detached.extend(settings.bind.iter().filter_map(|address| active.sockets.remove_entry(address)));
        }
    }
    detached
}

/// Gives a listener the detached sockets of its addresses.
fn adopt_sockets(active: &mut ActiveListener, detached: &mut BTreeMap<SocketAddr, ListenSockets>) {
    for address in &active.settings.bind {
        let Some((address, sockets)) = detached.remove_entry(address) else { continue };
        for (owner, policy) in sockets.owners.iter().zip(&active.policies) {
            owner.replace_policy(Arc::clone(policy));
        }
        tracing::info!(target: target::LISTENER, listener = active.settings.name, %address, "listening (socket taken over from the listener that had this address)");
        active.sockets.insert(address, sockets);
    }
}
