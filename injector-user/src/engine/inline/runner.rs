//! Starts the inline engine for the listeners that use it, and follows changes of devices, routes,
//! configuration and backend health.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use anyhow::{Context as _, anyhow};
use tokio::sync::{Notify, watch};

use super::{
    attach::{self, Role},
    attach_points::attach_points,
    eligibility::{check_forwarding, checked_backends},
    flow_tracker::{FlowTracker, ListenerInfo},
    nat::{self, TableName},
    nat_sync::{apply_dnat, fresh, remove_stale_nat, ruleset},
    programs::{InlinePrograms, addresses},
    routes::{Changes, Interface},
};
use crate::{
    config::{EngineChoice, Inline as Settings, Listener, Nat},
    engine::served_listener::ServedListener,
    protocol::FirstSpeaker,
    telemetry::{log::target, metrics::Metrics},
};

/// The running engine.
#[derive(Debug)]
pub struct InlineEngine {
    /// The programs.
    pub inline: Arc<InlinePrograms>,
    /// Its configuration.
    pub settings: Settings,
    backends: Vec<SocketAddr>,
    attached: BTreeSet<(Interface, Role)>,
}

/// The listeners that the engine serves, in the order of their ids.
fn inline_listeners(listeners: &[Listener]) -> Vec<&Listener> {
    listeners.iter().filter(|listener| listener.engine == EngineChoice::Inline).collect()
}

/// Loads the programs, gives them the listeners, attaches them and sets up NAT. `None` if no
/// listener is inline.
///
/// # Errors
/// When it cannot run here; each says what to do. What was attached before stays as it was.
pub fn start(settings: &Settings, listeners: &[Listener]) -> anyhow::Result<Option<InlineEngine>> {
    let listeners = inline_listeners(listeners);
    if listeners.is_empty() {
        remove_stale_nat(settings);
        return Ok(None);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(start_engine(settings, &listeners)).context("engine \"inline\"").map(Some)
}

async fn start_engine(settings: &Settings, listeners: &[&Listener]) -> anyhow::Result<InlineEngine> {
    let mut backends = Vec::new();
    for listener in listeners {
        let checked =
            checked_backends(listener).map_err(|what| anyhow!("listener {:?}: {what}", listener.name))?;
        backends.extend(checked);
    }
    // First everything that may fail and changes nothing.
    let ruleset = match settings.nat {
        Nat::Managed => {
            let served: Vec<_> = listeners.iter().map(|listener| fresh(listener)).collect();
            let ruleset = ruleset(settings, &served)?;
            // Checks that nft exists and may be used.
            ruleset.is_applied()?;
            Some(ruleset)
        }
        Nat::External => None,
    };
    let points = attach_points(settings, &backends).await?;
    check_forwarding(settings, listeners, &points)?;

    let count = u32::try_from(listeners.len()).unwrap_or(u32::MAX);
    let inline = Arc::new(InlinePrograms::load(settings, count)?);
    inline.serve(listeners)?;
    let mut running =
        InlineEngine { inline, settings: settings.clone(), backends, attached: BTreeSet::new() };
    running.attach(points)?;
    // After attaching, so that no packet passes without a program.
    let removed = attach::remove_other_versions(&settings.pin)
        .with_context(|| format!("removing another version's programs from {}", settings.pin.display()))?;
    if !removed.is_empty() {
        let what = removed.join(", ");
        tracing::warn!(target: target::ENGINE_INLINE,
            what,
            "programs and maps of another version were removed; connections through them have ended"
        );
    }
    if let Some(ruleset) = ruleset {
        for chain in nat::chains_that_drop_forwarded().unwrap_or_default() {
            tracing::warn!(target: target::ENGINE_INLINE,
                family = chain.family,
                table = chain.table,
                chain = chain.chain,
                "a firewall chain drops forwarded packets unless one of its rules accepts them: add a rule for connections to the backends"
            );
        }
        let change = ruleset.apply()?;
        tracing::info!(target: target::ENGINE_INLINE, table = settings.table, ?change, "NAT rules updated");
    }
    Ok(running)
}

impl InlineEngine {
    /// The tracker of the flows of these listeners.
    #[must_use]
    pub fn flow_tracker(&self, served: &[ServedListener], metrics: &Metrics) -> FlowTracker {
        let listener_info = |served: &ServedListener| ListenerInfo {
            name: served.listener.name.clone(),
            expects_banner: served.listener.protocol.speaks_first() != FirstSpeaker::Unknown,
            metrics: metrics.listener(&served.listener.name, "inline"),
        };
        let capacity = usize::try_from(self.settings.flows).unwrap_or(usize::MAX);
        FlowTracker::new(served.iter().map(listener_info).collect(), self.settings.idle, capacity)
    }

    /// Attaches the programs where they are missing, and forgets devices that are gone.
    fn attach(&mut self, points: BTreeSet<(Interface, Role)>) -> anyhow::Result<()> {
        for (device, role) in points.difference(&self.attached) {
            self.inline.attach(device, *role, self.settings.attachment)?;
            tracing::info!(target: target::ENGINE_INLINE, device = device.name, ?role, "programs attached");
        }
        self.attached = points;
        Ok(())
    }

    /// Follows devices, routes, the configuration and the backends' health until the runtime ends.
    ///
    /// # Errors
    /// When the kernel does not tell of changes any more.
    pub async fn run(
        mut self,
        mut served: watch::Receiver<Vec<ServedListener>>,
        health: Arc<Notify>,
    ) -> anyhow::Result<()> {
        let mut changes = Changes::watch().context("listening to rtnetlink")?;
        let mut routes_changed = true;
        loop {
            // Includes changes since the start.
            if routes_changed {
                match attach_points(&self.settings, &self.backends).await {
                    Ok(points) => {
                        if let Err(error) = self.attach(points) {
                            tracing::error!(target: target::ENGINE_INLINE, error = format!("{error:#}"), "attaching programs to new interfaces failed; connections through them are not served");
                        }
                    }
                    Err(error) => {
                        tracing::error!(target: target::ENGINE_INLINE, error = format!("{error:#}"), "reading interfaces and routes failed; programs stay where they are")
                    }
                }
            }
            let now = served.borrow_and_update().clone();
            if self.settings.nat == Nat::Managed && !now.is_empty() {
                apply_dnat(&self.settings, now).await;
            }
            tokio::select! {
                changed = changes.next() => {
                    changed?;
                    routes_changed = true;
                }
                () = health.notified() => routes_changed = false,
                Ok(()) = served.changed() => {
                    if let Err(error) = self.reload(&served.borrow().clone()) {
                        tracing::error!(target: target::ENGINE_INLINE, error = format!("{error:#}"), "inline reload failed; the previous settings stay in effect");
                    }
                    routes_changed = true;
                }
            }
        }
    }

    /// Gives the programs the new listeners and backends.
    fn reload(&mut self, served: &[ServedListener]) -> anyhow::Result<()> {
        let listeners: Vec<_> = served.iter().map(|served| &served.listener).collect();
        self.inline.serve(&listeners)?;
        let backends: Result<Vec<_>, _> = listeners.iter().map(|listener| addresses(listener)).collect();
        self.backends = backends.map_err(anyhow::Error::msg)?.into_iter().flatten().collect();
        Ok(())
    }
}

/// Removes everything that the engine left in the kernel, and returns what it removed.
///
/// # Errors
/// When the NAT table cannot be removed; then the programs stay. Otherwise what could not be
/// removed.
pub fn detach(settings: &Settings) -> anyhow::Result<Vec<String>> {
    let table: TableName = settings.table.parse()?;
    if settings.nat == Nat::Managed {
        nat::remove(&table)?;
    }
    attach::detach(&settings.pin).with_context(|| format!("{}", settings.pin.display()))
}
