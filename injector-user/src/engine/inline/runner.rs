//! Starts the inline engine, and follows changes of devices, routes, configuration and backend
//! health.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::Context as _;
use tokio::{
    sync::{
        Notify,
        mpsc::{self, UnboundedReceiver, UnboundedSender},
        watch,
    },
    time::MissedTickBehavior,
};

use super::{
    attach::SET,
    flow_tracker::FlowTracker,
    migrate::{self, Migration},
    netfilter::Firewall,
    pins::{self, PinPaths},
    programs::{self, InlinePrograms},
    route_lookups,
    sources::Sources,
    usage::{EngineUsage, ResetRequest},
};
use crate::{
    backend::Backend,
    config::{Inline as Settings, Listener, Network},
    engine::{
        attach::{self, Attached, routes::Changes},
        bpf::lock,
        served_listener::ServedListener,
        usage::InlineUsage,
    },
    kubernetes::Followed,
    telemetry::{log::target, metrics::Metrics},
};

/// How often everything is looked at again that no notification announces: a backend's ejection
/// that is over, another name of a backend, ports that the host uses.
const REFRESH: Duration = attach::CHECK_INTERVAL;
/// After how many of these the places of listeners that are gone are released, and an upgrade
/// advances.
const EVERY_FEW_TICKS: u32 = 2;
/// After how many of these the host's firewall is looked at.
const FIREWALL_TICKS: u32 = 5;

/// The running engine.
#[derive(Debug)]
pub struct InlineEngine {
    /// The programs.
    pub inline: Arc<InlinePrograms>,
    /// Its configuration.
    pub settings: Settings,
    attached: Attached,
    migration: Migration,
    sources: Sources,
    /// Locked as long as the engine runs.
    _pins: PinPaths,
    /// What it serves now.
    served: Arc<Mutex<Vec<ServedListener>>>,
    ejected: Arc<Notify>,
    resets: UnboundedSender<ResetRequest>,
    reset_requests: Mutex<Option<UnboundedReceiver<ResetRequest>>>,
}

/// The folders of the guard's pins.
#[derive(Clone, Copy, Debug)]
pub struct GuardPins<'a> {
    /// Of its maps.
    pub maps: &'a Path,
    /// Of its links.
    pub links: &'a Path,
}

/// Why the engine cannot serve this listener on any host; `None` if it can.
#[must_use]
pub fn ineligibility(listener: &Listener) -> Option<String> {
    programs::templates(listener).err()
}

/// Loads the programs and attaches them to the devices. `None` if there are no listeners: then, and
/// on an error, the connections of an earlier daemon go on, and its programs open no new ones.
///
/// # Errors
/// When it cannot run here; each says what to do.
pub fn start(
    settings: &Settings,
    listeners: &[&Listener],
    guard: Option<GuardPins<'_>>,
) -> anyhow::Result<Option<InlineEngine>> {
    let links = guard.as_ref().map(|guard| guard.links);
    if listeners.is_empty() {
        stop_opening(settings, links);
        return Ok(None);
    }
    let started = start_engine(settings, guard.map(|guard| guard.maps)).context("engine \"inline\"");
    if started.is_err() {
        stop_opening(settings, links);
    }
    started.map(Some)
}

fn start_engine(settings: &Settings, bans: Option<&Path>) -> anyhow::Result<InlineEngine> {
    route_lookups::allow()?;
    let mut pins = pins::prepare(settings)?;
    let inline = Arc::new(InlinePrograms::load(settings, &pins.maps, bans)?);
    let migration = migrate::begin(&mut pins)?;
    let devices = (settings.attachment, settings.devices.as_slice());
    let mut attached = Attached::new(&SET, devices, pins.links.clone(), migration.programs())
        .context("identifying the network namespace")?;
    // Each failure was logged; the other devices are served.
    let _ = attached.update(&mut lock(&inline.programs));
    let (resets, reset_requests) = mpsc::unbounded_channel();
    Ok(InlineEngine {
        inline,
        settings: settings.clone(),
        attached,
        migration,
        sources: Sources::new(settings),
        _pins: pins,
        served: Arc::default(),
        ejected: Arc::default(),
        resets,
        reset_requests: Mutex::new(Some(reset_requests)),
    })
}

/// Sends new connections to the sockets, if programs of an earlier daemon are still attached.
fn stop_opening(settings: &Settings, guard_links: Option<&Path>) {
    match migrate::stop_opening(&settings.pin, guard_links) {
        Ok(places) if places.is_empty() => {}
        Ok(places) => {
            let places = places.join(", ");
            tracing::info!(target: target::ENGINE_INLINE, places, "inline is not used: programs of an earlier daemon open no new connections, and serve those that they have. `injector inline detach` removes them");
        }
        Err(error) => {
            tracing::error!(target: target::ENGINE_INLINE, %error, "programs of an earlier daemon may still open connections; `injector inline detach` removes them");
        }
    }
}

/// Removes everything that the engine left in the kernel, and returns what it removed.
///
/// # Errors
/// When a daemon uses it and `force` is not set. Otherwise what could not be removed.
pub fn detach(settings: &Settings, force: bool) -> anyhow::Result<Vec<String>> {
    Ok(super::detach::detach(&settings.pin, force)?)
}

impl InlineEngine {
    /// The counts that it shares with the other engines.
    #[must_use]
    pub fn usage(&self) -> Arc<dyn InlineUsage> {
        Arc::new(EngineUsage { inline: Arc::clone(&self.inline), resets: self.resets.clone() })
    }

    /// The directories in which it makes and removes files while it runs.
    #[must_use]
    pub fn directories(&self) -> Vec<PathBuf> {
        let own = std::iter::once(self.settings.pin.clone());
        own.chain(route_lookups::directories()).chain(self.migration.directories()).collect()
    }

    /// The tracker of the connections; there is one.
    #[must_use]
    pub fn flow_tracker(&self, served: &[ServedListener], metrics: &Metrics) -> FlowTracker {
        *lock(&self.served) = served.to_vec();
        let requests = lock(&self.reset_requests).take();
        let requests = requests.unwrap_or_else(|| mpsc::unbounded_channel().1);
        FlowTracker::new(Arc::clone(&self.served), metrics.clone(), Arc::clone(&self.ejected), requests)
    }

    /// Has the program serve these listeners now.
    ///
    /// # Errors
    /// When a map does not take it; [`Self::run`] tries again.
    pub fn serve(&mut self, served: &[ServedListener]) -> Result<(), String> {
        let backends = served.iter().flat_map(|served| served.backends.all()).flat_map(Backend::addresses);
        self.sources.refresh(backends);
        self.migration.serve(|| serve(&self.inline, served, &self.sources))
    }

    /// Tells the program the peers, if they are others than those that were written last. A failure is
    /// logged; the next call tries again.
    fn write_peers(&self, peers: &Followed<Network>, written: &mut Option<(Vec<Network>, bool)>) {
        let (networks, complete) = (peers.current(), peers.is_complete());
        if written.as_ref().is_some_and(|it| (&it.0, it.1) == (&networks, complete)) {
            return;
        }
        match self.inline.set_peers(&networks, complete) {
            Ok(()) => *written = Some((networks, complete)),
            Err(error) => {
                tracing::error!(target: target::ENGINE_INLINE, %error, count = networks.len(), "inline does not know all peers: it drops what those that are missing send to PROXY ports through this host; it is tried again every few seconds");
            }
        }
    }

    /// Follows devices, routes, the configuration, the backends' health and the peers until the runtime
    /// ends.
    ///
    /// # Errors
    /// When the kernel sends no notifications of changes any more.
    pub async fn run(
        mut self,
        mut served: watch::Receiver<Vec<ServedListener>>,
        health: Arc<Notify>,
        mut peers: Followed<Network>,
    ) -> anyhow::Result<()> {
        let mut written_peers = None;
        let mut changes = Changes::watch().context("listening to rtnetlink")?;
        let mut refresh = tokio::time::interval(REFRESH);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut failing, mut ticks) = (None, 0_u32);
        let mut firewall = Firewall::default();
        loop {
            let now = served.borrow_and_update().clone();
            let error = self.serve(&now).err();
            if let Some(error) = error.as_ref().filter(|error| failing.as_ref() != Some(*error)) {
                tracing::error!(target: target::ENGINE_INLINE, error, "inline does not follow a change of listeners or backends; it is tried again every few seconds");
            }
            failing = error;
            *lock(&self.served) = now;
            self.write_peers(&peers, &mut written_peers);
            tokio::select! {
                changed = changes.next() => {
                    changed?;
                    let _ = self.attached.update(&mut lock(&self.inline.programs));
                }
                _ = refresh.tick() => {
                    let _ = self.attached.update(&mut lock(&self.inline.programs));
                    route_lookups::allow_again();
                    if ticks.is_multiple_of(FIREWALL_TICKS) {
                        firewall.warn_of_new_chains();
                    }
                    ticks = ticks.wrapping_add(1);
                    if ticks.is_multiple_of(EVERY_FEW_TICKS) {
                        self.inline.release_places(&lock(&self.served));
                        self.migration.advance();
                    }
                }
                () = health.notified() => {}
                () = self.ejected.notified() => {}
                Ok(()) = served.changed() => {}
                () = peers.changed() => {}
            }
        }
    }
}

fn serve(inline: &InlinePrograms, served: &[ServedListener], sources: &Sources) -> Result<(), String> {
    inline.update_settings().map_err(|error| error.to_string())?;
    inline.serve(served, &|backend| sources.towards(backend)).map_err(|error| error.to_string())
}
