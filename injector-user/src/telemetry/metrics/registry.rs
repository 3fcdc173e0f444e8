//! All metrics of the process.

use std::{
    fmt,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};

use super::{
    backends::{BackendCollector, BackendSource},
    bpf::{BpfCollector, BpfCounters},
    connections::{ConnectionCounts, ConnectionSources},
    crowdsec::CrowdSecMetrics,
    families::Families,
    guard::GuardSource,
    labels::{CheckLabels, EngineLabels, ListenerLabels, ResultLabels},
    listener::ListenerMetrics,
    log::LogCollector,
    services::ServiceSource,
    source::SourceCollector,
};
use crate::telemetry::{backlog::BacklogTotal, log::Logging};

/// All metrics of the process. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    families: Families,
    bpf: Arc<BpfCollector>,
    backends: Arc<BackendCollector>,
    log: Arc<LogCollector>,
    crowdsec: CrowdSecMetrics,
    guard: Arc<SourceCollector<dyn GuardSource>>,
    services: Arc<SourceCollector<dyn ServiceSource>>,
    connections: ConnectionSources,
    draining: Family<ListenerLabels, Gauge>,
    reloads: [(bool, Counter); 2],
    config_loaded: Gauge<f64, AtomicU64>,
    inline_max_flows: Gauge,
    max_connections: Gauge,
    engine_available: Family<EngineLabels, Gauge>,
    check: Family<CheckLabels, Gauge>,
    check_took: Family<CheckLabels, Gauge<f64, AtomicU64>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics, at zero. The process start time is set to now.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let started = Gauge::<f64, AtomicU64>::default();
        started.set(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        registry.register_with_unit(
            "process_start_time",
            "When the process started, in seconds since 1970",
            Unit::Seconds,
            started,
        );
        let families = Families::registered(&mut registry);
        let injector = registry.sub_registry_with_prefix("injector");
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        injector.register("build", "The running version", build);
        let max_connections = Gauge::default();
        injector.register(
            "max_connections",
            "Connection capacity: the configured limit, or the number that file descriptors allow",
            max_connections.clone(),
        );
        let engine_available = Family::default();
        injector.register(
            "engine_available",
            "1 if the engine passed its self-test on this machine, else 0",
            engine_available.clone(),
        );
        let check = Family::default();
        injector.register(
            "selftest_check",
            "1 if this check of the startup self-test passed, else 0",
            check.clone(),
        );
        let check_took = Family::default();
        injector.register_with_unit(
            "selftest_check",
            "Duration of this check of the startup self-test",
            Unit::Seconds,
            check_took.clone(),
        );
        let draining = Family::default();
        injector.register(
            "listener_draining",
            "1 if the operator drains the listener, else 0",
            draining.clone(),
        );
        let reloads = Family::<ResultLabels, Counter>::default();
        let result = |applied| {
            let result = if applied { "applied" } else { "rejected" };
            (applied, reloads.get_or_create_owned(&ResultLabels { result }))
        };
        let results = [true, false].map(result);
        injector.register("config_reloads", "Reloads of the configuration", reloads);
        let config_loaded = Gauge::<f64, AtomicU64>::default();
        injector.register_with_unit(
            "config_loaded_timestamp",
            "When the current configuration was loaded, in seconds since 1970",
            Unit::Seconds,
            config_loaded.clone(),
        );
        let inline_max_flows = Gauge::default();
        injector.register(
            "inline_max_flows",
            "Connection capacity of the inline engine; 0 if it does not run",
            inline_max_flows.clone(),
        );
        let backends = Arc::new(BackendCollector::default());
        injector.register_collector(Box::new(Arc::clone(&backends)));
        let log = Arc::new(LogCollector::default());
        injector.register_collector(Box::new(Arc::clone(&log)));
        let crowdsec = CrowdSecMetrics::default();
        injector.register_collector(Box::new(crowdsec.clone()));
        let guard = Arc::new(SourceCollector::default());
        injector.register_collector(Box::new(Arc::clone(&guard)));
        let services = Arc::new(SourceCollector::default());
        injector.register_collector(Box::new(Arc::clone(&services)));
        let bpf = Arc::new(BpfCollector::default());
        injector.register_collector(Box::new(Arc::clone(&bpf)));
        Self(Arc::new(Inner {
            registry,
            families,
            bpf,
            backends,
            log,
            crowdsec,
            guard,
            services,
            connections: ConnectionSources::default(),
            draining,
            reloads: results,
            config_loaded,
            inline_max_flows,
            max_connections,
            engine_available,
            check,
            check_took,
        }))
    }

    /// The series of a listener with `engine`. All of them exist from here on, at zero.
    #[must_use]
    pub fn listener(&self, name: &str, engine: &'static str) -> ListenerMetrics {
        ListenerMetrics::new(&self.0.families, name, engine)
    }

    /// Sets the backends of a listener, to be read at every scrape.
    pub fn watch_backends(&self, listener: &str, backends: Arc<dyn BackendSource>) {
        self.0.backends.watch(listener, backends);
    }

    /// The backends that read the header as commands, with their listeners.
    #[must_use]
    pub fn misreading_backends(&self) -> Vec<(String, String)> {
        self.0.backends.misreading()
    }

    /// Sets the log, whose dropped lines are counted at every scrape.
    pub fn watch_log(&self, logging: Logging) {
        self.0.log.watch(logging);
    }

    /// The metrics of the CrowdSec feed.
    #[must_use]
    pub fn crowdsec(&self) -> CrowdSecMetrics {
        self.0.crowdsec.clone()
    }

    /// Sets the guard, to be read at every scrape.
    pub fn watch_guard(&self, guard: Arc<dyn GuardSource>) {
        self.0.guard.watch(guard);
    }

    /// Sets what follows Services of Kubernetes, to be read at every scrape.
    pub fn watch_services(&self, services: Arc<dyn ServiceSource>) {
        self.0.services.watch(services);
    }

    /// The listeners of which no backend is up, by name.
    #[must_use]
    pub fn listeners_without_backend(&self) -> Vec<String> {
        self.0.backends.without_backend()
    }

    /// Sets the source of a listener's connections with `engine`, to be read at every scrape.
    /// Connections that were accepted before are not counted.
    pub fn watch_connections(
        &self,
        listener: &str,
        engine: &'static str,
        source: impl Fn() -> ConnectionCounts + Send + Sync + 'static,
    ) {
        self.refresh_connections();
        self.0.connections.watch(listener, engine, Box::new(source));
    }

    /// Reads the sources of [`Metrics::watch_connections`].
    pub fn refresh_connections(&self) {
        self.0.connections.refresh(&self.0.families);
    }

    /// Sets whether a listener is draining.
    pub fn set_draining(&self, listener: &str, draining: bool) {
        self.0.draining.get_or_create(&ListenerLabels { listener: listener.into() }).set(i64::from(draining));
    }

    /// Removes the gauges of a removed listener. Its counters stay.
    pub fn forget_listener(&self, listener: &str) {
        self.0.backends.forget(listener);
        self.0.connections.forget(listener);
        self.0.draining.remove(&ListenerLabels { listener: listener.into() });
    }

    /// Records that the configuration was loaded now.
    pub fn config_loaded(&self) {
        self.0
            .config_loaded
            .set(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
    }

    /// Counts a reload, `applied` or rejected.
    pub fn config_reloaded(&self, applied: bool) {
        if let Some((_, counter)) = self.0.reloads.iter().find(|(result, _)| *result == applied) {
            counter.inc();
        }
        if applied {
            self.config_loaded();
        }
    }

    /// Sets the capacity of the inline engine's flow table.
    pub fn set_inline_max_flows(&self, most: u32) {
        self.0.inline_max_flows.set(i64::from(most));
    }

    /// Sets the limit of concurrent connections.
    pub fn set_max_connections(&self, most: usize) {
        self.0.max_connections.set(i64::try_from(most).unwrap_or(i64::MAX));
    }

    /// Sets whether an engine passed its self-test.
    pub fn set_engine(&self, engine: &'static str, available: bool) {
        self.0.engine_available.get_or_create(&EngineLabels { engine }).set(i64::from(available));
    }

    /// Sets the result of one check of an engine's self-test.
    pub fn set_check(&self, engine: &'static str, check: &'static str, passed: bool, took: Duration) {
        let labels = CheckLabels { engine, check };
        self.0.check.get_or_create(&labels).set(i64::from(passed));
        self.0.check_took.get_or_create(&labels).set(took.as_secs_f64());
    }

    /// Sets the backlog total, to be read at every scrape.
    pub fn watch_backlog(&self, backlog_total: BacklogTotal) {
        self.0.bpf.watch_backlog(backlog_total);
    }

    /// Adds counters of BPF programs, to be read at every scrape.
    pub fn watch_programs(&self, counters: Arc<dyn BpfCounters>) {
        self.0.bpf.watch(counters);
    }

    /// All metrics as OpenMetrics text.
    ///
    /// # Errors
    /// Never in practice: writing to a `String` cannot fail.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        self.refresh_connections();
        let mut text = String::new();
        text::encode(&mut text, &self.0.registry)?;
        Ok(text)
    }
}
