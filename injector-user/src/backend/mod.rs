//! Reaching a backend: names resolved again as they change, backends chosen by their health and weight, addresses tried in
//! order.

mod balance;
mod checker;
mod health;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use thiserror::Error;
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

pub use self::health::{Forced, Standing};
use self::{
    balance::{Candidate, Turns},
    health::Health,
};
use crate::{
    config::{self, Check, Host, Listener},
    net::{socket::Endpoint, syn::ObserveSyn},
    telemetry::{
        log::target,
        metrics::{BackendSample, BackendSource},
    },
};

/// The backends of one listener.
#[derive(Debug)]
pub struct Backends {
    listener: String,
    health: config::Health,
    resolve_interval: Duration,
    all: Vec<Backend>,
    turns: Mutex<Turns>,
    /// Rings when those whose turn it is may have changed, but for ejections.
    changed: Arc<Notify>,
}

/// One of them. What is known of it stays when the configuration is read again.
#[derive(Clone, Debug)]
pub struct Backend {
    configured: config::Backend,
    known: Arc<Known>,
}

/// What is known of a backend.
#[derive(Debug, Default)]
struct Known {
    /// What it resolved to last.
    addresses: RwLock<Vec<SocketAddr>>,
    health: Mutex<Health>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    active: AtomicU64,
    sessions: AtomicU64,
    passed: AtomicU64,
    failed: AtomicU64,
    ejections: AtomicU64,
}

/// What has become of a backend so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Account {
    /// Sessions with it now. None of engine inline's, which the kernel sends on.
    pub active: u64,
    /// Sessions with it so far.
    pub sessions: u64,
    /// Checks that it passed.
    pub passed: u64,
    /// Checks that it failed.
    pub failed: u64,
    /// How often it was left out because connections failed.
    pub ejections: u64,
}

/// A connection to a backend.
#[derive(Debug)]
pub struct Reached {
    /// It.
    pub endpoint: Endpoint,
    /// Where it is.
    pub address: SocketAddr,
    /// To be kept until its end.
    pub session: Session,
}

/// Counts as one of the backend's sessions until it is dropped.
#[derive(Debug)]
pub struct Session(Arc<Known>);

impl Drop for Session {
    fn drop(&mut self) {
        self.0.counts.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Why no backend could be reached; the most telling of the errors of all addresses.
#[derive(Debug, Error)]
pub enum Unreachable {
    /// No name has an address.
    #[error("no name of a backend resolves to an address")]
    Unresolved,
    /// The operator has taken out every one.
    #[error("all backends are disabled by the operator; `injector backend auto` enables one again")]
    AllDisabled,
    /// Refused, and no other address timed out.
    #[error("{address}: {error}")]
    Refused {
        /// The last that refused.
        address: SocketAddr,
        /// Connection refused.
        error: io::Error,
    },
    /// No answer in time.
    #[error("{address}: no answer within {within:?}")]
    Timeout {
        /// The last that did not answer.
        address: SocketAddr,
        /// What it was given.
        within: Duration,
    },
    /// Anything else, such as no route.
    #[error("{address}: {error}")]
    Other {
        /// The last that failed.
        address: SocketAddr,
        /// How.
        error: io::Error,
    },
}

impl Known {
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.addresses.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Backend {
    /// As configured.
    #[must_use]
    pub fn configured(&self) -> &config::Backend {
        &self.configured
    }

    /// What it resolved to last.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.known.addresses()
    }

    /// Whether it gets connections, and why not.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.known.health().standing(std::time::Instant::now())
    }

    /// What has become of it so far.
    #[must_use]
    pub fn account(&self) -> Account {
        let Counts { active, sessions, passed, failed, ejections } = &self.known.counts;
        let [active, sessions, passed, failed, ejections] =
            [active, sessions, passed, failed, ejections].map(|count| count.load(Ordering::Relaxed));
        Account { active, sessions, passed, failed, ejections }
    }

    fn candidate(&self) -> Candidate {
        let standing = self.standing();
        Candidate {
            weight: self.configured.weight,
            backup: self.configured.backup,
            up: standing.is_up(),
            out: standing == Standing::ForcedDown,
        }
    }
}

impl BackendSource for Backends {
    fn sample(&self) -> Vec<BackendSample> {
        let sample = |backend: &Backend| {
            let Account { active, sessions, passed, failed, ejections } = backend.account();
            BackendSample {
                name: backend.configured().to_string(),
                up: backend.standing().is_up(),
                active,
                sessions,
                checks_passed: passed,
                checks_failed: failed,
                ejections,
            }
        };
        self.all.iter().map(sample).collect()
    }
}

impl Backends {
    /// The backends of `listener`; addresses are known at once, names after [`Backends::keep_up_to_date`] started. What was
    /// known `before` of the same backends stays known.
    #[must_use]
    pub fn new(listener: &Listener, before: Option<&Self>, changed: Arc<Notify>) -> Self {
        let backend = |configured: &config::Backend| {
            let same = |other: &&Backend| {
                (&other.configured.host, other.configured.port) == (&configured.host, configured.port)
            };
            let known =
                before.and_then(|before| before.all.iter().find(same)).map(|same| Arc::clone(&same.known));
            let known = known.unwrap_or_else(|| {
                let addresses = match configured.host {
                    Host::Ip(ip) => vec![SocketAddr::new(ip, configured.port)],
                    Host::Name(_) => Vec::new(),
                };
                Arc::new(Known { addresses: RwLock::new(addresses), ..Known::default() })
            });
            if listener.health.check.is_none() {
                known.health().unchecked();
            }
            Backend { configured: configured.clone(), known }
        };
        Self {
            listener: listener.name.clone(),
            health: listener.health,
            resolve_interval: listener.resolve_interval,
            all: listener.backends.iter().map(backend).collect(),
            turns: Mutex::default(),
            changed,
        }
    }

    /// All of them, in the order of the configuration.
    #[must_use]
    pub fn all(&self) -> &[Backend] {
        &self.all
    }

    /// Those of `which` that get new connections now.
    #[must_use]
    pub fn in_turn(&self, which: impl Fn(&config::Backend) -> bool) -> Vec<&Backend> {
        let of: Vec<_> = self.all.iter().filter(|backend| which(&backend.configured)).collect();
        let candidates: Vec<_> = of.iter().map(|backend| backend.candidate()).collect();
        balance::in_turn(&candidates).into_iter().filter_map(|index| of.get(index).copied()).collect()
    }

    /// Takes a backend out of service or puts it back, by its name in the configuration. `false` if there is none of that
    /// name.
    #[must_use]
    pub fn force(&self, name: &str, forced: Forced) -> bool {
        let Some(backend) = self.all.iter().find(|backend| backend.configured.to_string() == name) else {
            return false;
        };
        backend.known.health().force(forced);
        tracing::info!(target: target::HEALTH, listener = self.listener, backend = name, ?forced, "backend state set by the operator");
        self.changed.notify_one();
        true
    }

    /// Resolves the names now and then every interval, and checks the backends, until `stop`. The last good answer is kept
    /// when resolving fails.
    pub async fn keep_up_to_date(self: Arc<Self>, stop: CancellationToken) {
        let checks = (0..self.all.len()).map(|index| {
            let backends = Arc::clone(&self);
            tokio::spawn(
                stop.clone().run_until_cancelled_owned(async move { backends.keep_checking(index).await }),
            )
        });
        // They end by themselves.
        checks.for_each(drop);
        stop.run_until_cancelled(self.keep_resolving()).await;
    }

    async fn keep_resolving(&self) {
        if self.all.iter().all(|backend| matches!(backend.configured.host, Host::Ip(_))) {
            return;
        }
        loop {
            self.resolve().await;
            tokio::time::sleep(self.resolve_interval).await;
        }
    }

    async fn keep_checking(&self, index: usize) {
        let (Some(plan), Some(backend)) = (&self.health.check, self.all.get(index)) else { return };
        // The checks of many listeners, edges and backends must not fall on the same moment.
        tokio::time::sleep(plan.interval.min(Duration::from_secs(1)).mul_f64(fastrand::f64())).await;
        loop {
            let next = Instant::now() + plan.interval.mul_f64(0.9 + 0.2 * fastrand::f64());
            self.check(backend, plan).await;
            tokio::time::sleep_until(next).await;
        }
    }

    /// A name with several addresses is as well as the best of them.
    async fn check(&self, backend: &Backend, plan: &Check) {
        if backend.addresses().is_empty() {
            self.resolve().await;
        }
        let mut outcome = Err("the name has no address".to_owned());
        for address in backend.addresses() {
            outcome = checker::check(address, plan).await.map_err(|error| format!("{address}: {error}"));
            if outcome.is_ok() {
                break;
            }
        }
        let counts = &backend.known.counts;
        let count = if outcome.is_ok() { &counts.passed } else { &counts.failed };
        count.fetch_add(1, Ordering::Relaxed);
        let changed = backend.known.health().checked(outcome.is_ok(), plan.rise, plan.fall);
        let (listener, name) = (&self.listener, &backend.configured);
        match (&outcome, changed) {
            (Ok(()), Some(_)) => {
                tracing::info!(target: target::HEALTH, listener, backend = %name, "backend is up: health checks pass; it receives new connections")
            }
            (Err(error), Some(_)) => {
                tracing::warn!(target: target::HEALTH, listener, backend = %name, error, "backend is down: health checks fail; new connections go to the other backends");
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

    /// Connects to the first that answers, while `observe` reads its SYN. All addresses together get `within`, each its share of what
    /// is left.
    ///
    /// # Errors
    /// [`Unreachable`], after all that may be tried was.
    pub async fn connect(&self, within: Duration, observe: &ObserveSyn<'_>) -> Result<Reached, Unreachable> {
        let deadline = Instant::now() + within;
        let order = self.order();
        if order.is_empty() {
            return Err(Unreachable::AllDisabled);
        }
        let mut addresses = addresses(&order);
        if addresses.is_empty() {
            // The name had no address when last asked.
            let _ = timeout(within, self.resolve()).await;
            addresses = self::addresses(&order);
        }
        let mut worst = Unreachable::Unresolved;
        let mut failing: Option<&Backend> = None;
        for (left, (backend, address)) in
            (1..=u32::try_from(addresses.len()).unwrap_or(1)).rev().zip(addresses)
        {
            // All addresses of the one before have failed.
            if let Some(failing) = failing.filter(|failing| !Arc::ptr_eq(&failing.known, &backend.known)) {
                self.failed(failing);
            }
            let share = deadline.saturating_duration_since(Instant::now()) / left;
            let failed = match timeout(share, Endpoint::connect(address, observe)).await {
                Ok(Ok(endpoint)) => return Ok(Reached { endpoint, address, session: self.reached(backend) }),
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    Unreachable::Refused { address, error }
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => {
                    Unreachable::Timeout { address, within: share }
                }
                Ok(Err(error)) => Unreachable::Other { address, error },
                Err(_) => Unreachable::Timeout { address, within: share },
            };
            tracing::debug!(target: target::BACKEND, listener = self.listener, error = %failed, "connecting to a backend address failed; trying the next");
            failing = failed.blames_backend().then_some(backend);
            worst = worse(worst, failed);
        }
        if let Some(failing) = failing {
            self.failed(failing);
        }
        Err(worst)
    }

    /// Whom to try, first to last.
    fn order(&self) -> Vec<&Backend> {
        let candidates: Vec<_> = self.all.iter().map(Backend::candidate).collect();
        let mut order = balance::in_turn(&candidates);
        let reserve = balance::in_reserve(&candidates, &order);
        self.turns.lock().unwrap_or_else(PoisonError::into_inner).rotate(&candidates, &mut order);
        order.extend(reserve);
        order.into_iter().filter_map(|index| self.all.get(index)).collect()
    }

    fn reached(&self, backend: &Backend) -> Session {
        let known = &backend.known;
        known.health().connected();
        known.counts.active.fetch_add(1, Ordering::Relaxed);
        known.counts.sessions.fetch_add(1, Ordering::Relaxed);
        Session(Arc::clone(known))
    }

    fn failed(&self, backend: &Backend) {
        let ejected = backend.known.health().failed(std::time::Instant::now(), &self.health.ejection);
        if let Some(time) = ejected {
            backend.known.counts.ejections.fetch_add(1, Ordering::Relaxed);
            let name = &backend.configured;
            tracing::warn!(target: target::HEALTH, listener = self.listener, backend = %name, duration = ?time, "backend ejected after failed connections; it receives none until the time is over");
        }
    }

    async fn resolve(&self) {
        for backend in &self.all {
            let config::Backend { host: Host::Name(name), port, .. } = &backend.configured else { continue };
            let addresses: Vec<_> = match tokio::net::lookup_host((name.as_str(), *port)).await {
                Ok(addresses) => addresses.collect(),
                Err(error) => {
                    tracing::warn!(target: target::RESOLVER, listener = self.listener, backend = name, %error, "resolving the backend's name failed; the last known addresses stay in use");
                    continue;
                }
            };
            let mut known = backend.known.addresses.write().unwrap_or_else(PoisonError::into_inner);
            if *known != addresses {
                tracing::info!(target: target::RESOLVER, listener = self.listener, backend = name, ?addresses, "backend name resolved");
                *known = addresses;
            }
        }
    }
}

fn addresses<'a>(order: &[&'a Backend]) -> Vec<(&'a Backend, SocketAddr)> {
    let of = |backend: &&'a Backend| {
        let backend = *backend;
        backend.addresses().into_iter().map(move |address| (backend, address))
    };
    order.iter().flat_map(of).collect()
}

impl Unreachable {
    /// Whether it says something of the backend; what the daemon itself lacks does not.
    fn blames_backend(&self) -> bool {
        use io::ErrorKind::{ConnectionReset, HostUnreachable, NetworkUnreachable};
        match self {
            Self::Refused { .. } | Self::Timeout { .. } => true,
            Self::Other { error, .. } => {
                matches!(error.kind(), HostUnreachable | NetworkUnreachable | ConnectionReset)
            }
            Self::Unresolved | Self::AllDisabled => false,
        }
    }
}

/// The more telling of two failures: a timeout says more of a network in trouble than a refusal does.
fn worse(one: Unreachable, other: Unreachable) -> Unreachable {
    let rank = |error: &Unreachable| match error {
        Unreachable::Unresolved | Unreachable::AllDisabled => 0,
        Unreachable::Other { .. } => 1,
        Unreachable::Refused { .. } => 2,
        Unreachable::Timeout { .. } => 3,
    };
    if rank(&other) >= rank(&one) { other } else { one }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Config, net::syn::no_observer};

    fn backends(list: &str) -> Backends {
        let text = format!(
            "[[listener]]\nname = \"a\"\nbind = [\"127.0.0.1:1\"]\nprotocol = \"smtp\"\nbackends = [{list}]\n"
        );
        Backends::new(&Config::parse(&text, "test.toml").unwrap().listeners[0], None, Arc::default())
    }

    async fn listening() -> (tokio::net::TcpListener, SocketAddr) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    async fn refusing() -> SocketAddr {
        listening().await.1
    }

    #[tokio::test]
    async fn the_next_address_is_tried_when_one_refuses() {
        let (_listener, good) = listening().await;
        let backends = backends(&format!("\"{}\", \"{good}\"", refusing().await));
        let backend = backends.connect(Duration::from_secs(5), &no_observer).await.unwrap();
        assert_eq!(backend.address, good);
    }

    #[tokio::test]
    async fn all_refusing_is_a_refusal() {
        let backends = backends(&format!("\"{}\"", refusing().await));
        let error = backends.connect(Duration::from_secs(5), &no_observer).await.unwrap_err();
        assert!(matches!(error, Unreachable::Refused { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_name_is_resolved_when_it_is_needed() {
        let (_listener, good) = listening().await;
        let backends = backends(&format!("\"localhost:{}\"", good.port()));
        assert_eq!(backends.all()[0].addresses(), []);
        let backend = backends.connect(Duration::from_secs(5), &no_observer).await.unwrap();
        assert_eq!(backend.address, good);
    }

    #[tokio::test]
    async fn a_name_without_address_says_so() {
        let error = backends("\"nowhere.invalid:25\"")
            .connect(Duration::from_secs(5), &no_observer)
            .await
            .unwrap_err();
        assert!(matches!(error, Unreachable::Unresolved), "{error}");
    }
}
