//! Replaces the configuration while sessions continue.
//!
//! [`Server::prepare`] does everything that can fail and changes nothing; [`Server::apply`] cannot fail.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use anyhow::{Context as _, bail};

use super::{
    active_listener::{ActiveListener, ListenSockets},
    listen_sockets::{BoundSockets, connection_capacity},
    state::Server,
};
use crate::{
    config::{Config, EngineChoice, Listener},
    engine::{Engine, kernel},
    telemetry::log::target,
};

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
            owner.replace_policy(Arc::clone(policy));
        }
        tracing::info!(target: target::LISTENER, listener = active.config.name, %address, "listening (socket taken over from the listener that had this address)");
        active.sockets.insert(address, sockets);
    }
}
