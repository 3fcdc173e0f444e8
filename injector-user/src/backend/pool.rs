//! The backends of a listener, and which of them get connections.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    addresses::Addresses,
    balance::{self, SmoothWeightedRoundRobin},
    checker::{self, CheckError},
    health::AdminState,
    lookup::lookup,
    queue::Queue,
    source::SourceAddresses,
    state::{Backend, BackendState, BackendStats},
};
use crate::{
    config::{self, Balance, Check, Destination, Listener},
    kubernetes::Watcher,
    telemetry::{
        log::target,
        metrics::{BackendSample, BackendSource},
        rate_limit::RateLimit,
    },
};

/// How long [`try_once`] waits for the Kubernetes API.
const API_TIMEOUT: Duration = Duration::from_secs(10);

/// The backends of one listener.
#[derive(Debug)]
pub struct Backends {
    pub(super) listener: String,
    pub(super) health: config::Health,
    pub(super) resolve_interval: Duration,
    pub(super) all: Vec<Backend>,
    balance: Balance,
    round_robin: Mutex<SmoothWeightedRoundRobin>,
    /// Asks the resolver for addresses now.
    pub(super) resolve_now: Notify,
    /// Notified when the resolver has tried.
    pub(super) resolved: Notify,
    pub(super) queue: Queue,
    /// Notified when the eligible backends may have changed, except by an ejection.
    pub(super) changed: Arc<Notify>,
    pub(super) sources: SourceAddresses,
    pub(super) source_ports_warning: RateLimit,
    pub(super) misread_warning: RateLimit,
}

impl BackendSource for Backends {
    fn sample(&self) -> Vec<BackendSample> {
        let sample = |backend: &Backend| {
            let BackendStats { active, sessions, passed, failed, ejections, misread } = backend.stats();
            BackendSample {
                name: backend.configured().to_string(),
                up: backend.health_state().is_up(),
                active,
                sessions,
                checks_passed: passed,
                checks_failed: failed,
                ejections,
                misread,
                misreads_header: backend.misreads_header(),
            }
        };
        self.all.iter().map(sample).collect()
    }

    fn queued(&self) -> usize {
        self.queue.len()
    }
}

impl Backends {
    /// The backends of `listener`. IP addresses are known at once, names after [`Backends::run`]
    /// started. The state of backends that are also in `before` is kept.
    #[must_use]
    pub fn new(listener: &Listener, before: Option<&Self>, changed: Arc<Notify>) -> Self {
        let backend = |configured: &config::Backend| {
            let same = |other: &&Backend| other.configured.destination == configured.destination;
            let state =
                before.and_then(|before| before.all.iter().find(same)).map(|same| Arc::clone(&same.state));
            let state = state.unwrap_or_else(|| {
                let addresses = match configured.destination {
                    Destination::Address(address) => vec![address],
                    Destination::Name { .. } | Destination::Service { .. } => Vec::new(),
                };
                let addresses = Mutex::new(Addresses::new(addresses));
                Arc::new(BackendState { addresses, ..BackendState::default() })
            });
            if listener.health.check.is_none() {
                state.health().unchecked();
                state.addresses().unchecked();
            }
            let hash = balance::stable_hash(configured.to_string().as_bytes(), 0);
            let weight = Arc::new(configured.weight.into());
            Backend { configured: configured.clone(), weight, hash, state }
        };
        Self {
            listener: listener.name.clone(),
            health: listener.health,
            resolve_interval: listener.resolve_interval,
            all: listener.backends.iter().map(backend).collect(),
            balance: listener.balance,
            round_robin: Mutex::default(),
            resolve_now: Notify::new(),
            resolved: Notify::new(),
            queue: Queue::new(listener, before.map(|before| &before.queue)),
            changed,
            sources: SourceAddresses::new(&listener.source_addresses),
            source_ports_warning: RateLimit::default(),
            misread_warning: RateLimit::default(),
        }
    }

    pub(super) fn notify_changed(&self) {
        self.changed.notify_one();
    }

    /// All backends, in the order of the configuration.
    #[must_use]
    pub fn all(&self) -> &[Backend] {
        &self.all
    }

    /// The backends among `which` that get new connections.
    #[must_use]
    pub fn eligible(&self, which: impl Fn(&Backend) -> bool) -> Vec<&Backend> {
        let of: Vec<_> = self.all.iter().filter(|backend| which(backend)).collect();
        let candidates: Vec<_> = of.iter().map(|backend| backend.candidate()).collect();
        balance::eligible(&candidates).into_iter().filter_map(|index| of.get(index).copied()).collect()
    }

    /// Sets the operator's state of a backend, by its name in the configuration. `false` if no
    /// backend has that name.
    #[must_use]
    pub fn set_admin_state(&self, name: &str, forced: AdminState) -> bool {
        let Some(backend) = self.all.iter().find(|backend| backend.configured.to_string() == name) else {
            return false;
        };
        backend.state.health().set_admin_state(forced);
        tracing::info!(target: target::HEALTH, listener = self.listener, backend = name, ?forced, "backend state set by the operator");
        self.changed.notify_one();
        true
    }

    /// Whether a backend may have this weight while the others keep theirs, by the rule of the
    /// configuration ([`config::PRIMARY_REQUIRED`]).
    #[must_use]
    pub fn may_have_weight(&self, name: &str, weight: u32) -> bool {
        let weight = |backend: &Backend| match backend.configured.to_string() == name {
            true => weight,
            false => backend.weight(),
        };
        config::has_primary(self.all.iter().map(|backend| (backend.configured.backup, weight(backend))))
    }

    /// Sets the weight of a backend until the next reload, by its name in the configuration. `false` if
    /// no backend has that name.
    #[must_use]
    pub fn set_weight(&self, name: &str, weight: u32) -> bool {
        let Some(backend) = self.all.iter().find(|backend| backend.configured.to_string() == name) else {
            return false;
        };
        backend.weight.store(weight, Ordering::Relaxed);
        self.reset_round_robin();
        tracing::info!(target: target::HEALTH, listener = self.listener, backend = name, weight, configured = backend.configured.weight, "weight of the backend set by the operator, until the next reload");
        self.changed.notify_one();
        true
    }

    /// Gives all backends their configured weights again.
    pub fn reset_weights(&self) {
        for backend in &self.all {
            let configured = backend.configured.weight;
            if backend.weight.swap(configured, Ordering::Relaxed) != configured {
                self.reset_round_robin();
                tracing::info!(target: target::HEALTH, listener = self.listener, backend = %backend.configured, weight = configured, "the backend has its configured weight again");
                self.changed.notify_one();
            }
        }
    }

    /// Forgets who had how much of its share: with other weights this would keep one backend in front,
    /// or behind, for as many connections as the former weights were high.
    fn reset_round_robin(&self) {
        *self.round_robin() = SmoothWeightedRoundRobin::default();
    }

    fn round_robin(&self) -> MutexGuard<'_, SmoothWeightedRoundRobin> {
        self.round_robin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves names at each interval, follows Services, and runs the health checks, until `stop`. If
    /// resolving fails, the last addresses stay in use.
    pub async fn run(self: Arc<Self>, watcher: Watcher, stop: CancellationToken) {
        let checks = (0..self.all.len()).map(|index| {
            let backends = Arc::clone(&self);
            tokio::spawn(
                stop.clone().run_until_cancelled_owned(async move { backends.run_checks(index).await }),
            )
        });
        // The tasks end by themselves.
        checks.for_each(drop);
        let addresses = async { tokio::join!(self.run_resolver(), self.follow_services(&watcher)) };
        stop.run_until_cancelled(addresses).await;
    }

    async fn run_checks(&self, index: usize) {
        let (Some(plan), Some(backend)) = (&self.health.check, self.all.get(index)) else { return };
        // A random start spreads the checks of many listeners, edge hosts and backends.
        tokio::time::sleep(plan.interval.min(Duration::from_secs(1)).mul_f64(fastrand::f64())).await;
        loop {
            let next = Instant::now() + plan.interval.mul_f64(0.9 + 0.2 * fastrand::f64());
            self.check(backend, plan).await;
            tokio::time::sleep_until(next).await;
        }
    }

    /// Checks all addresses of a name. It is healthy if one of them is, and connections avoid the
    /// others.
    async fn check(&self, backend: &Backend, plan: &Check) {
        if !backend.has_address() && matches!(backend.configured.destination, Destination::Name { .. }) {
            self.resolve_now().await;
        }
        let checks = backend.addresses().into_iter().map(|address| check_address(address, plan));
        let results = join_all(checks).await;
        for (address, result) in &results {
            self.note_checked(backend, *address, result);
            match result {
                Err(CheckError::HeaderMisread { reply }) => self.note_misread(*address, reply),
                Ok(()) if plan.tries_the_header() => self.note_greeted(*address),
                _ => {}
            }
        }
        let outcome = outcome(&results);
        let counters = &backend.state.counters;
        let count = if outcome.is_ok() { &counters.passed } else { &counters.failed };
        count.fetch_add(1, Ordering::Relaxed);
        let changed = backend.state.health().checked(outcome.is_ok(), plan.rise, plan.fall);
        let (listener, name) = (&self.listener, &backend.configured);
        match (&outcome, changed) {
            (Ok(()), Some(_)) => {
                tracing::info!(target: target::HEALTH, listener, backend = %name, "backend is up: health checks pass; it receives new connections")
            }
            (Err(error), Some(_)) => {
                tracing::warn!(target: target::HEALTH, listener, backend = %name, error, "backend is down: health checks fail; it receives new connections only while no other backend is up");
            }
            (Err(error), None) => {
                tracing::debug!(target: target::HEALTH, listener, backend = %name, error, "health check failed")
            }
            (Ok(()), None) => {}
        }
        if changed.is_some() {
            self.changed.notify_one();
        }
    }

    fn note_checked(&self, backend: &Backend, address: SocketAddr, result: &Result<(), CheckError>) {
        let changed = backend.state.addresses().checked(address, result.is_ok());
        let several = backend.addresses().len() > 1;
        let (listener, name) = (&self.listener, &backend.configured);
        match result {
            Err(error) if changed && several => {
                tracing::warn!(target: target::HEALTH, listener, backend = %name, %address, %error, "a health check of one of the backend's addresses failed; new connections go to its other addresses first");
            }
            Ok(()) if changed && several => {
                tracing::info!(target: target::HEALTH, listener, backend = %name, %address, "health checks of the backend's address pass again");
            }
            _ => return,
        }
        self.changed.notify_one();
    }

    /// The backends to try for this client, in order.
    pub(super) fn order(&self, client: IpAddr) -> Vec<&Backend> {
        let candidates: Vec<_> = self.all.iter().map(Backend::candidate).collect();
        let mut order = balance::eligible(&candidates);
        let reserve = balance::fallbacks(&candidates, &order);
        self.round_robin().rotate(&candidates, &mut order);
        match self.balance {
            Balance::Weighted => {}
            Balance::LeastConnections => balance::by_load(&candidates, &mut order),
            Balance::Source => balance::by_source(&candidates, &mut order, client),
        }
        order.extend(reserve);
        order.into_iter().filter_map(|index| self.all.get(index)).collect()
    }
}

/// Finds the addresses of a backend that no listener may have, and checks each of them once, as the
/// listener says; without health checks, whether it accepts a connection.
///
/// # Errors
/// When its name cannot be resolved, or its Service has no endpoint for connections.
pub async fn try_once(
    listener: &Listener,
    configured: &config::Backend,
    watcher: &Watcher,
) -> io::Result<Vec<(SocketAddr, Result<(), CheckError>)>> {
    let plan = listener.health.check.unwrap_or(Check::connecting(listener.timeouts.connect));
    let addresses = match &configured.destination {
        Destination::Address(address) => vec![*address],
        Destination::Name { name, port } => lookup(name, *port).await?,
        Destination::Service { service, port } => {
            watcher.addresses_within(service, port, API_TIMEOUT).await.map_err(io::Error::other)?
        }
    };
    Ok(join_all(addresses.into_iter().map(|address| check_address(address, &plan))).await)
}

async fn check_address(address: SocketAddr, plan: &Check) -> (SocketAddr, Result<(), CheckError>) {
    (address, checker::check(address, plan).await)
}

/// The result of a check of all addresses of a backend: passed if one of them has passed.
fn outcome(results: &[(SocketAddr, Result<(), CheckError>)]) -> Result<(), String> {
    let mut outcome = Err("there is no address".to_owned());
    for (address, result) in results {
        match result {
            Ok(()) => return Ok(()),
            Err(error) => outcome = Err(format!("{address}: {error}")),
        }
    }
    outcome
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::Config;

    /// Those of a listener with this list.
    pub(in crate::backend) fn backends(list: &str) -> Backends {
        let text = format!(
            "[[listener]]\nname = \"a\"\nbind = [\"127.0.0.1:1\"]\nprotocol = \"smtp\"\nbackends = [{list}]\n"
        );
        Backends::new(&Config::parse(&text, "test.toml").unwrap().listeners[0], None, Arc::default())
    }

    const ONE: &str = "192.0.2.1:25";
    const TWO: &str = "192.0.2.2:25";

    /// How many of so many connections would go to the second backend.
    fn to_the_second(backends: &Backends, connections: usize) -> usize {
        let first = |_: &usize| backends.order([198, 51, 100, 7].into())[0].configured.to_string() == TWO;
        (0..connections).filter(first).count()
    }

    #[test]
    fn a_weight_of_the_operator_counts_at_once_and_until_the_reset() {
        let backends = backends(&format!("{{ address = \"{ONE}\", weight = 1000 }}, \"{TWO}\""));
        // In the middle of a round, in which the second backend has waited long.
        assert_eq!(to_the_second(&backends, 450), 0);
        assert!(backends.set_weight(ONE, 1) && !backends.set_weight("192.0.2.3:25", 1));
        assert_eq!(to_the_second(&backends, 10), 5);
        assert!(backends.set_weight(TWO, 3));
        assert_eq!(to_the_second(&backends, 40), 30);
        assert!(backends.set_weight(ONE, 0));
        assert_eq!(to_the_second(&backends, 10), 10);
        backends.reset_weights();
        assert_eq!(backends.all().iter().map(Backend::weight).collect::<Vec<_>>(), [1000, 1]);
        assert_eq!(to_the_second(&backends, 10), 0);
    }

    #[tokio::test]
    async fn a_changed_weight_is_announced() {
        let backends = backends(&format!("\"{ONE}\", \"{TWO}\""));
        let announced = async || {
            tokio::time::timeout(Duration::from_millis(10), backends.changed.notified()).await.is_ok()
        };
        assert!(backends.set_weight(ONE, 2) && announced().await);
        backends.reset_weights();
        assert!(announced().await);
        backends.reset_weights();
        assert!(!announced().await);
    }

    #[test]
    fn one_primary_keeps_a_weight() {
        let backends = backends(&format!("\"{ONE}\", {{ address = \"{TWO}\", backup = true }}"));
        assert!(!backends.may_have_weight(ONE, 0));
        assert!(backends.may_have_weight(ONE, 1) && backends.may_have_weight(TWO, 0));
        let backends = self::backends(&format!("\"{ONE}\", \"{TWO}\""));
        assert!(backends.may_have_weight(ONE, 0) && backends.set_weight(ONE, 0));
        assert!(!backends.may_have_weight(TWO, 0) && backends.may_have_weight(TWO, 1000));
    }
}
