//! Setting the engine to work for the listeners that ask for it, and following the devices as they come and go.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use anyhow::{Context as _, anyhow, bail};
use tokio::sync::{Notify, watch};

use super::{
    attach::{self, Role},
    flow_tracker::{FlowTracker, ListenerInfo},
    nat::{self, TableName},
    programs::{self, InlinePrograms, addresses},
    routes::{Changes, Interface, LinkKind, RouteError, Routes},
    sysctl::{self, Finding, Paths, Severity},
};
use crate::{
    backend::Backends,
    config::{Config, EngineChoice, Host, Inline as Settings, Listener, Nat},
    protocol::Speaker,
    telemetry::{log::target, metrics::Metrics},
};

/// The engine at work.
#[derive(Debug)]
pub struct InlineEngine {
    /// The programs.
    pub inline: Arc<InlinePrograms>,
    settings: Settings,
    backends: Vec<SocketAddr>,
    attached: BTreeSet<(Interface, Role)>,
}

/// A listener, and which of its backends get its connections.
#[derive(Clone, Debug)]
pub struct ServedListener {
    /// As configured.
    pub listener: Listener,
    /// Its backends.
    pub backends: Arc<Backends>,
    /// Nobody new is sent on.
    pub draining: bool,
}

/// The listeners that the engine serves, in the order of their ids.
#[must_use]
pub fn listeners(config: &Config) -> Vec<&Listener> {
    config.listeners.iter().filter(|listener| listener.engine == EngineChoice::Inline).collect()
}

/// Loads the programs, tells them whom to serve, attaches them, and sets up NAT. `None` if no listener asks for it.
///
/// # Errors
/// When it cannot run here; each says what to do. What was attached before stays as it was.
pub fn start(config: &Config) -> anyhow::Result<Option<InlineEngine>> {
    let listeners = listeners(config);
    if listeners.is_empty() {
        remove_stale_nat(&config.inline);
        return Ok(None);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(start_engine(config, &listeners)).context("engine \"inline\"").map(Some)
}

/// Why the engine cannot serve each of these listeners; `None` where it can. All that [`start`] would refuse, without
/// changing anything.
#[must_use]
pub fn ineligible_reasons(config: &Config, listeners: &[&Listener]) -> Vec<Option<String>> {
    let check = |listener: &&Listener| -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(check_eligible(&config.inline, listener))
    };
    listeners.iter().map(|listener| Some(format!("{:#}", check(listener).err()?))).collect()
}

async fn check_eligible(settings: &Settings, listener: &Listener) -> anyhow::Result<()> {
    let backends = checked_backends(listener).map_err(anyhow::Error::msg)?;
    let routes = Routes::open().context("opening rtnetlink to read routes")?;
    for backend in &backends {
        let device = routes.towards(backend.ip()).await?;
        if let LinkKind::Other(number) = device.kind {
            let name = device.name;
            bail!(
                "{backend} is reached through {name}, whose packet format (ARPHRD {number}) is not supported"
            );
        }
    }
    programs::pins(settings)?;
    let points = attach_points(settings, &backends).await?;
    forwarding_findings(settings, &[listener], &points)?;
    if settings.nat == Nat::Managed {
        // It needs nft and its rights, and what the rules cannot express is refused.
        ruleset(settings, &[fresh(listener)])?.is_applied()?;
    }
    Ok(())
}

/// Where a listener's backends are, if it asks for nothing that this engine cannot do.
fn checked_backends(listener: &Listener) -> Result<Vec<SocketAddr>, String> {
    for ipv6 in [false, true] {
        programs::template(&listener.receiver, ipv6, listener.waits_for_first_bytes())?;
    }
    addresses(listener)
}

/// No listener is inline any more: the NAT of an earlier run must not take new connections away from the sockets. Connections
/// that it has sent on go on.
fn remove_stale_nat(settings: &Settings) {
    if !settings.given || settings.nat != Nat::Managed {
        return;
    }
    let table: Result<TableName, _> = settings.table.parse();
    let Ok(table) = table else { return };
    // Without nft there is no NAT of ours either.
    if !nat::exists(&table).unwrap_or(false) {
        return;
    }
    match nat::ruleset(&table, &[]).map_err(anyhow::Error::from).and_then(|empty| Ok(empty.apply()?)) {
        Ok(change) => {
            tracing::info!(target: target::ENGINE_INLINE, table = settings.table, ?change, "no inline listener: NAT table emptied")
        }
        Err(error) => tracing::error!(target: target::ENGINE_INLINE,
            table = settings.table,
            error = format!("{error:#}"),
            "emptying the NAT table failed; it still forwards new connections: remove it (nft delete table inet {})",
            settings.table
        ),
    }
}

async fn start_engine(config: &Config, listeners: &[&Listener]) -> anyhow::Result<InlineEngine> {
    let settings = &config.inline;
    let mut backends = Vec::new();
    for listener in listeners {
        let checked =
            checked_backends(listener).map_err(|what| anyhow!("listener {:?}: {what}", listener.name))?;
        backends.extend(checked);
    }
    // All that may fail without a trace comes first.
    let ruleset = match settings.nat {
        Nat::Managed => {
            let served: Vec<_> = listeners.iter().map(|listener| fresh(listener)).collect();
            let ruleset = ruleset(settings, &served)?;
            // Whether there is nft, and may be used.
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
    // After it: between them packets pass by both, and by none never.
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
                "drops what is forwarded unless a rule of it accepts: let connections to the backends through"
            );
        }
        let change = ruleset.apply()?;
        tracing::info!(target: target::ENGINE_INLINE, table = settings.table, ?change, "NAT rules updated");
    }
    Ok(running)
}

/// As it is before anything is known of its backends.
fn fresh(listener: &Listener) -> ServedListener {
    let backends = Arc::new(Backends::new(listener, None, Arc::default()));
    ServedListener { listener: listener.clone(), backends, draining: false }
}

fn ruleset(settings: &Settings, served: &[ServedListener]) -> anyhow::Result<nat::Ruleset> {
    let mut services = Vec::new();
    for ServedListener { listener, backends, draining } in served {
        // What cannot be served at all is an error, not a listener without backends.
        addresses(listener).map_err(anyhow::Error::msg)?;
        let mut service = nat::Service {
            name: listener.name.clone(),
            listen: Vec::new(),
            backends: Vec::new(),
            masquerade: settings.masquerade,
        };
        for ipv6 in [false, true] {
            let of_family = |ip: IpAddr| ip.to_canonical().is_ipv6() == ipv6;
            let listen = || listener.bind.iter().filter(|address| of_family(address.ip()));
            let eligible = backends.in_turn(|it| matches!(it.host, Host::Ip(ip) if of_family(ip)));
            let none_is_left = eligible.is_empty()
                && listener.backends.iter().any(|it| matches!(it.host, Host::Ip(ip) if of_family(ip)));
            if *draining || none_is_left {
                // Clients are refused by the host, which has no socket there.
                continue;
            }
            service.listen.extend(listen());
            service.backends.extend(eligible.into_iter().flat_map(|backend| {
                let weight = backend.configured().weight;
                backend.addresses().into_iter().map(move |address| nat::Backend { address, weight })
            }));
        }
        if !service.listen.is_empty() {
            services.push(service);
        }
    }
    let table: TableName = settings.table.parse()?;
    Ok(nat::ruleset(&table, &services)?)
}

/// Whether the engine could serve a listener that it serves already with what is different now.
///
/// # Errors
/// Why not.
pub fn check_reload(settings: &Settings, listener: &Listener) -> anyhow::Result<()> {
    checked_backends(listener).map_err(anyhow::Error::msg)?;
    if settings.nat == Nat::Managed {
        ruleset(settings, &[fresh(listener)])?;
    }
    Ok(())
}

/// Which programs belong where: those for backends on the devices that lead to them, those for clients everywhere, for a
/// client may come by any of them.
async fn attach_points(
    settings: &Settings,
    backends: &[SocketAddr],
) -> anyhow::Result<BTreeSet<(Interface, Role)>> {
    let routes = Routes::open().context("opening rtnetlink to read routes")?;
    let devices = routes.interfaces().await?;
    let named = |names: &[String]| -> anyhow::Result<Vec<Interface>> {
        let find = |name: &String| {
            let device = devices.iter().find(|device| device.name == *name).cloned();
            device.with_context(|| format!("device {name:?} does not exist or is down"))
        };
        names.iter().map(find).collect()
    };
    let mut points = BTreeSet::new();
    let clients = if settings.client_devices.is_empty() {
        devices.iter().filter(|device| !matches!(device.kind, LinkKind::Other(_))).cloned().collect()
    } else {
        named(&settings.client_devices)?
    };
    points.extend(clients.into_iter().map(|device| (device, Role::Client)));
    if !settings.backend_devices.is_empty() {
        points.extend(named(&settings.backend_devices)?.into_iter().map(|device| (device, Role::Backend)));
        return Ok(points);
    }
    for backend in backends {
        match routes.towards(backend.ip()).await {
            Ok(device) => drop(points.insert((device, Role::Backend))),
            // It may come back, and nothing reaches it meanwhile.
            Err(error @ RouteError::Unreachable { .. }) => {
                tracing::warn!(target: target::ENGINE_INLINE, %backend, %error, "no route to the backend; its packets pass a device without our programs until one appears");
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(points)
}

/// What there is to say about forwarding between these places; an error if nothing would get through and nobody may change it.
fn forwarding_findings(
    settings: &Settings,
    listeners: &[&Listener],
    points: &BTreeSet<(Interface, Role)>,
) -> anyhow::Result<Vec<Finding>> {
    let bound = || listeners.iter().flat_map(|listener| &listener.bind);
    let mut interfaces: Vec<_> = points.iter().map(|(device, _)| device.name.clone()).collect();
    interfaces.dedup();
    let paths =
        Paths { interfaces, ipv4: bound().any(SocketAddr::is_ipv4), ipv6: bound().any(SocketAddr::is_ipv6) };
    let findings = sysctl::check(&paths)?;
    let blocks = |finding: &&Finding| finding.severity == Severity::Blocks;
    match findings.iter().find(blocks) {
        Some(finding) if !settings.set_sysctls => {
            bail!("{finding}; or have inline.set_sysctls = true set it")
        }
        _ => Ok(findings),
    }
}

fn check_forwarding(
    settings: &Settings,
    listeners: &[&Listener],
    points: &BTreeSet<(Interface, Role)>,
) -> anyhow::Result<()> {
    let findings = forwarding_findings(settings, listeners, points)?;
    for finding in findings.iter().filter(|finding| finding.severity == Severity::MayBlock) {
        tracing::warn!(target: target::ENGINE_INLINE, "{finding}");
    }
    if settings.set_sysctls {
        for setting in sysctl::set(&findings)? {
            tracing::info!(target: target::ENGINE_INLINE, "set {setting}");
        }
    }
    Ok(())
}

impl InlineEngine {
    /// Attaches what is not attached yet, and forgets what is no longer there.
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
            // What changed since the start counts.
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
                self.apply_dnat(now).await;
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

    /// Tells the programs of other backends.
    fn reload(&mut self, served: &[ServedListener]) -> anyhow::Result<()> {
        let listeners: Vec<_> = served.iter().map(|served| &served.listener).collect();
        self.inline.serve(&listeners)?;
        let backends: Result<Vec<_>, _> = listeners.iter().map(|listener| addresses(listener)).collect();
        self.backends = backends.map_err(anyhow::Error::msg)?.into_iter().flatten().collect();
        Ok(())
    }

    /// Has NAT send new connections to the backends whose turn it is.
    async fn apply_dnat(&self, served: Vec<ServedListener>) {
        let settings = self.settings.clone();
        let apply = move || -> anyhow::Result<nat::Change> { Ok(ruleset(&settings, &served)?.apply()?) };
        match tokio::task::spawn_blocking(apply).await {
            Ok(Ok(nat::Change::Unchanged)) => {}
            Ok(Ok(change)) => {
                tracing::info!(target: target::ENGINE_INLINE, table = self.settings.table, ?change, "NAT rules updated")
            }
            Ok(Err(error)) => tracing::error!(target: target::ENGINE_INLINE,
                error = format!("{error:#}"),
                "updating NAT rules failed; new connections may reach backends that are down"
            ),
            Err(error) => {
                tracing::error!(target: target::ENGINE_INLINE, %error, "applying NAT rules failed; the previous rules stay in effect")
            }
        }
    }
}

/// The flow tracker for the inline listeners.
#[must_use]
pub fn flow_tracker(config: &Config, metrics: &Metrics) -> FlowTracker {
    let listener_info = |listener: &&Listener| ListenerInfo {
        name: listener.name.clone(),
        expects_banner: listener.protocol.speaks_first() != Speaker::Unknown,
        metrics: metrics.listener(&listener.name, "inline"),
    };
    let capacity = usize::try_from(config.inline.flows).unwrap_or(usize::MAX);
    FlowTracker::new(listeners(config).iter().map(listener_info).collect(), config.inline.idle, capacity)
}

/// Removes all that the engine has left in the kernel, and says what there was.
///
/// # Errors
/// When the NAT table cannot be removed; then the programs stay. Otherwise what could not be removed.
pub fn detach(settings: &Settings) -> anyhow::Result<Vec<String>> {
    let table: TableName = settings.table.parse()?;
    if settings.nat == Nat::Managed {
        nat::remove(&table)?;
    }
    attach::detach(&settings.pin).with_context(|| format!("{}", settings.pin.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Forced;

    fn config(backends: &str) -> Config {
        let text = format!(
            "[[listener]]\nname = \"a\"\nbind = [\"192.0.2.10:25\", \"[2001:db8::10]:25\"]\nprotocol = \"smtp\"\n\
             engine = \"inline\"\nbackends = [{backends}, \"[2001:db8::20]:2525\"]\n"
        );
        Config::parse(&text, "test.toml").unwrap()
    }

    fn rules(config: &Config, served: &ServedListener) -> String {
        format!("{:?}", ruleset(&config.inline, std::slice::from_ref(served)).unwrap())
    }

    #[test]
    fn weights_of_the_configuration_are_those_of_the_rules() {
        let of = |weights: [u32; 2]| {
            let [one, other] = weights.map(|weight| format!("weight = {weight}"));
            let backends = format!(
                "{{ address = \"10.0.0.1:2525\", {one} }}, {{ address = \"10.0.0.2:2525\", {other} }}"
            );
            let config = config(&backends);
            rules(&config, &fresh(&config.listeners[0]))
        };
        assert_eq!(of([1, 1]), of([7, 7]));
        assert_ne!(of([1, 1]), of([3, 1]));
    }

    #[test]
    fn rules_follow_the_health_of_each_family() {
        let config = config("\"10.0.0.1:2525\", { address = \"10.0.0.2:2525\", backup = true }");
        let served = fresh(&config.listeners[0]);
        let leads_to = |served: &ServedListener, backend: &str| rules(&config, served).contains(backend);
        assert!(leads_to(&served, "10.0.0.1") && !leads_to(&served, "10.0.0.2"));
        assert!(served.backends.force("10.0.0.1:2525", Forced::Down));
        assert!(!leads_to(&served, "10.0.0.1") && leads_to(&served, "10.0.0.2"));
        assert!(leads_to(&served, "2001:db8::20"));
        // Nobody is left for IPv4: the rules lead nowhere, and IPv6 goes on.
        assert!(served.backends.force("10.0.0.2:2525", Forced::Down));
        assert!(!leads_to(&served, "192.0.2.10") && leads_to(&served, "2001:db8::20"));
        let drained = ServedListener { draining: true, ..served };
        assert!(!leads_to(&drained, "2001:db8::"));
    }
}
