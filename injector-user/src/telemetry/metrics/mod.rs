//! What the injector counts. `docs/metrics.md` lists it for people; a test keeps the two the same.
//!
//! Names begin with `injector_`. No label carries a client's address. The handles of a listener are looked up
//! once, when it is set up: what a connection touches is an atomic.

mod backends;
pub mod http;
mod listener;
#[cfg(test)]
mod observability;
mod programs;

use std::{
    fmt,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};

use self::{backends::Watched, programs::Programs};
pub use self::{
    backends::{BackendSample, BackendSource},
    listener::{Active, Counts, ListenerMetrics, RejectReason},
    programs::BpfCounters,
};
use crate::telemetry::backlog::BacklogTotal;

/// Upper bounds in seconds. From a local server's 100 µs to the wait of a screener that tests clients before
/// the banner.
const FIRST_BYTE_BUCKETS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// All metrics of the process. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    families: Families,
    programs: Arc<Programs>,
    backends: Arc<Watched>,
    draining: Family<ListenerLabels, Gauge>,
    reloads: [(bool, Counter); 2],
    config_loaded: Gauge<f64, AtomicU64>,
    inline_max_flows: Gauge,
    max_connections: Gauge,
    engine_available: Family<EngineLabels, Gauge>,
    check: Family<CheckLabels, Gauge>,
    check_took: Family<CheckLabels, Gauge<f64, AtomicU64>>,
}

/// The families with a label `listener`.
#[derive(Clone, Debug)]
struct Families {
    accepted: Family<ListenerLabels, Counter>,
    active: Family<ServedLabels, Gauge>,
    rejected: Family<ReasonLabels, Counter>,
    closed: Family<ClosedLabels, Counter>,
    headers_sent: Family<ServedLabels, Counter>,
    headers_failed: Family<ServedLabels, Counter>,
    bytes: Family<BytesLabels, Counter>,
    first_byte: Family<ListenerLabels, Histogram, fn() -> Histogram>,
    enrolments: Family<ListenerLabels, Counter>,
    enrolment_failures: Family<ReasonLabels, Counter>,
    plane_changes: Family<ChangeLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ListenerLabels {
    listener: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServedLabels {
    listener: Arc<str>,
    engine: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    listener: Arc<str>,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClosedLabels {
    listener: Arc<str>,
    engine: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BytesLabels {
    listener: Arc<str>,
    direction: &'static str,
    plane: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ChangeLabels {
    listener: Arc<str>,
    change: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EngineLabels {
    engine: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CheckLabels {
    engine: &'static str,
    check: &'static str,
}

/// Whether the daemon may be sent connections, for `/readyz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Not all listeners are open yet.
    Starting,
    /// Every listener is open.
    Ready,
    /// Every listener is drained.
    Draining,
    /// No connection is accepted any more.
    Stopping,
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
        })
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics, at zero; the process counts as started now.
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
        injector.register("build", "What is running", build);
        let max_connections = Gauge::default();
        injector.register(
            "max_connections",
            "Connections that fit at one time: the configured limit, or what file descriptors leave room for",
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
            "1 if this check of an engine's self-test passed at the start, else 0",
            check.clone(),
        );
        let check_took = Family::default();
        injector.register_with_unit(
            "selftest_check",
            "How long this check of an engine's self-test took",
            Unit::Seconds,
            check_took.clone(),
        );
        let draining = Family::default();
        injector.register(
            "listener_draining",
            "1 if new clients of the listener are turned away by the operator, else 0",
            draining.clone(),
        );
        let reloads = Family::<ResultLabels, Counter>::default();
        let result = |applied| {
            let result = if applied { "applied" } else { "rejected" };
            (applied, reloads.get_or_create_owned(&ResultLabels { result }))
        };
        let results = [true, false].map(result);
        injector.register("config_reloads", "Times that the configuration was read again", reloads);
        let config_loaded = Gauge::<f64, AtomicU64>::default();
        injector.register_with_unit(
            "config_loaded_timestamp",
            "When the configuration that runs was read, in seconds since 1970",
            Unit::Seconds,
            config_loaded.clone(),
        );
        let inline_max_flows = Gauge::default();
        injector.register(
            "inline_max_flows",
            "Connections that the inline engine has room for; 0 where it does not run",
            inline_max_flows.clone(),
        );
        let backends = Arc::new(Watched::default());
        injector.register_collector(Box::new(Arc::clone(&backends)));
        let programs = Arc::new(Programs::default());
        injector.register_collector(Box::new(Arc::clone(&programs)));
        Self(Arc::new(Inner {
            registry,
            families,
            programs,
            backends,
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

    /// The handles of a listener that `engine` serves. All their series exist from here on, at zero.
    #[must_use]
    pub fn listener(&self, name: &str, engine: &'static str) -> ListenerMetrics {
        ListenerMetrics::new(&self.0.families, name, engine)
    }

    /// Has the backends of a listener looked at, at every scrape, in place of those that it had before.
    pub fn watch_backends(&self, listener: &str, backends: Arc<dyn BackendSource>) {
        self.0.backends.watch(listener, backends);
    }

    /// Says whether a listener is drained.
    pub fn set_draining(&self, listener: &str, draining: bool) {
        self.0.draining.get_or_create(&ListenerLabels { listener: listener.into() }).set(i64::from(draining));
    }

    /// A listener is no longer configured: only what it has counted stays.
    pub fn forget_listener(&self, listener: &str) {
        self.0.backends.forget(listener);
        self.0.draining.remove(&ListenerLabels { listener: listener.into() });
    }

    /// The configuration was read now, at the start.
    pub fn config_loaded(&self) {
        self.0
            .config_loaded
            .set(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
    }

    /// The configuration was read again, and `applied` or refused.
    pub fn config_reloaded(&self, applied: bool) {
        if let Some((_, counter)) = self.0.reloads.iter().find(|(result, _)| *result == applied) {
            counter.inc();
        }
        if applied {
            self.config_loaded();
        }
    }

    /// Sets how many connections the inline engine has room for.
    pub fn set_inline_max_flows(&self, most: u32) {
        self.0.inline_max_flows.set(i64::from(most));
    }

    /// Sets how many connections fit at one time.
    pub fn set_max_connections(&self, most: usize) {
        self.0.max_connections.set(i64::try_from(most).unwrap_or(i64::MAX));
    }

    /// Says whether an engine passed its self-test.
    pub fn set_engine(&self, engine: &'static str, available: bool) {
        self.0.engine_available.get_or_create(&EngineLabels { engine }).set(i64::from(available));
    }

    /// Says how a check of an engine's self-test went.
    pub fn set_check(&self, engine: &'static str, check: &'static str, passed: bool, took: Duration) {
        let labels = CheckLabels { engine, check };
        self.0.check.get_or_create(&labels).set(i64::from(passed));
        self.0.check_took.get_or_create(&labels).set(took.as_secs_f64());
    }

    /// Has the bytes that wait in the kernel read at every scrape.
    pub fn watch_backlog(&self, backlog_total: BacklogTotal) {
        self.0.programs.watch_backlog(backlog_total);
    }

    /// Has the counters of these programs read at every scrape, besides those given before.
    pub fn watch_programs(&self, counters: Arc<dyn BpfCounters>) {
        self.0.programs.watch(counters);
    }

    /// Everything as OpenMetrics text.
    ///
    /// # Errors
    /// Never in practice: the only writer is a `String`.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.0.registry)?;
        Ok(text)
    }
}

impl Families {
    fn registered(registry: &mut Registry) -> Self {
        let families = Self {
            accepted: Family::default(),
            active: Family::default(),
            rejected: Family::default(),
            closed: Family::default(),
            headers_sent: Family::default(),
            headers_failed: Family::default(),
            bytes: Family::default(),
            first_byte: Family::new_with_constructor(|| Histogram::new(FIRST_BYTE_BUCKETS)),
            enrolments: Family::default(),
            enrolment_failures: Family::default(),
            plane_changes: Family::default(),
        };
        // OpenMetrics wants the unit at the end of the name, and the crate appends it: "injector" + "bytes".
        registry.register_with_unit(
            "injector",
            "Payload carried, by direction and by the plane that moved it; headers are not payload",
            Unit::Bytes,
            families.bytes.clone(),
        );
        let injector = registry.sub_registry_with_prefix("injector");
        injector.register("connections_accepted", "Connections accepted", families.accepted.clone());
        injector.register("connections_active", "Connections being served", families.active.clone());
        injector.register(
            "connections_rejected",
            "Connections that were turned away before their backend spoke",
            families.rejected.clone(),
        );
        injector.register("connections_closed", "Connections served to their end", families.closed.clone());
        injector.register("headers_sent", "PROXY headers sent to a backend", families.headers_sent.clone());
        injector.register(
            "headers_failed",
            "Connections reset because the header could not be put in front",
            families.headers_failed.clone(),
        );
        injector.register_with_unit(
            "header_to_first_byte",
            "Time from the header to the first byte of the backend",
            Unit::Seconds,
            families.first_byte.clone(),
        );
        injector.register("enrolments", "Directions handed to the kernel", families.enrolments.clone());
        injector.register(
            "enrolment_failures",
            "Headers or directions that stayed in user space because the kernel would not have them",
            families.enrolment_failures.clone(),
        );
        injector.register(
            "plane_changes",
            "Spliced directions held because the target did not keep up, taken back to user space, and resumed by the kernel",
            families.plane_changes.clone(),
        );
        families
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        time::Duration,
    };

    use super::*;
    use crate::telemetry::outcome::{Bytes, CloseReason};

    #[derive(Debug)]
    struct OneBackend;

    impl BackendSource for OneBackend {
        fn sample(&self) -> Vec<BackendSample> {
            vec![BackendSample {
                name: "mail.internal:2525".to_owned(),
                up: true,
                active: 0,
                sessions: 0,
                checks_passed: 0,
                checks_failed: 0,
                ejections: 0,
            }]
        }
    }

    #[derive(Debug)]
    struct Counted;

    impl BpfCounters for Counted {
        fn read(&self) -> Vec<(&'static str, &'static str, u64)> {
            vec![("inject", "pushed", 3), ("verdict", "redirected", 5)]
        }
    }

    /// Every family with at least one sample.
    pub(super) fn complete() -> (Metrics, ListenerMetrics) {
        let metrics = Metrics::new();
        metrics.watch_programs(Arc::new(Counted));
        metrics.set_engine("splice", false);
        let took = Duration::from_millis(250);
        metrics.set_check("splice", "carry", true, took);
        metrics.set_check("splice", "slow_reader", false, took);
        metrics.set_max_connections(10);
        metrics.set_draining("smtp", false);
        metrics.watch_backends("smtp", Arc::new(OneBackend));
        let listener = metrics.listener("smtp", "relay");
        listener.enrolment_failed("not_established");
        (metrics, listener)
    }

    fn sample(metrics: &Metrics, series: &str) -> f64 {
        let text = metrics.encode().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().unwrap()
    }

    /// Family → (type, unit), as the exposition says.
    fn families(text: &str) -> BTreeMap<&str, (&str, Option<&str>)> {
        let described = |keyword: &str| -> BTreeMap<_, _> {
            text.lines().filter_map(|line| line.strip_prefix(keyword)?.split_once(' ')).collect()
        };
        let units = described("# UNIT ");
        described("# TYPE ")
            .into_iter()
            .map(|(name, kind)| (name, (kind, units.get(name).copied())))
            .collect()
    }

    #[test]
    fn every_family_has_its_type_and_unit() {
        let (metrics, _) = complete();
        let text = metrics.encode().unwrap();
        let expected = BTreeMap::from([
            ("injector_backend_active", ("gauge", None)),
            ("injector_backend_checks", ("counter", None)),
            ("injector_backend_ejections", ("counter", None)),
            ("injector_backend_sessions", ("counter", None)),
            ("injector_backend_up", ("gauge", None)),
            ("injector_backlog_bytes", ("gauge", Some("bytes"))),
            ("injector_bpf_events", ("counter", None)),
            ("injector_build", ("info", None)),
            ("injector_bytes", ("counter", Some("bytes"))),
            ("injector_config_loaded_timestamp_seconds", ("gauge", Some("seconds"))),
            ("injector_config_reloads", ("counter", None)),
            ("injector_connections_accepted", ("counter", None)),
            ("injector_connections_active", ("gauge", None)),
            ("injector_connections_closed", ("counter", None)),
            ("injector_connections_rejected", ("counter", None)),
            ("injector_engine_available", ("gauge", None)),
            ("injector_enrolment_failures", ("counter", None)),
            ("injector_enrolments", ("counter", None)),
            ("injector_header_to_first_byte_seconds", ("histogram", Some("seconds"))),
            ("injector_headers_failed", ("counter", None)),
            ("injector_headers_sent", ("counter", None)),
            ("injector_inline_max_flows", ("gauge", None)),
            ("injector_listener_draining", ("gauge", None)),
            ("injector_max_connections", ("gauge", None)),
            ("injector_plane_changes", ("counter", None)),
            ("injector_selftest_check", ("gauge", None)),
            ("injector_selftest_check_seconds", ("gauge", Some("seconds"))),
            ("process_start_time_seconds", ("gauge", Some("seconds"))),
        ]);
        assert_eq!(families(&text), expected, "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[test]
    fn the_documentation_lists_exactly_what_is_exposed() {
        let (metrics, _) = complete();
        let text = metrics.encode().unwrap();
        // Name with its suffix, labels, type: `injector_bytes_total{direction,…}`.
        let mut exposed = BTreeSet::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, rest) = line.split_once(['{', ' ']).unwrap();
            if name.ends_with("_sum") || name.ends_with("_count") {
                continue;
            }
            let rest = if line.contains('{') { rest } else { "" };
            let labels: Vec<_> = rest.split(',').filter_map(|label| Some(label.split_once('=')?.0)).collect();
            let labels: Vec<_> = labels.into_iter().filter(|label| *label != "le").collect();
            let name = name.strip_suffix("_bucket").unwrap_or(name);
            exposed.insert((name.to_owned(), labels.join(", ")));
        }
        let document = include_str!("../../../../docs/metrics.md");
        let rows = document.lines().filter_map(|line| line.strip_prefix("| `"));
        let documented: BTreeSet<_> = rows
            .filter(|row| row.starts_with("injector_") || row.starts_with("process_"))
            // Those of `injector probe`, which compares them itself.
            .filter(|row| !row.starts_with("injector_probe_"))
            .map(|row| {
                let cells: Vec<_> = row.split('|').map(str::trim).collect();
                (cells[0].trim_end_matches('`').to_owned(), cells[2].replace('`', ""))
            })
            .collect();
        assert_eq!(documented, exposed);
    }

    #[test]
    fn the_documentation_lists_the_values_of_labels() {
        let document = include_str!("../../../../docs/metrics.md");
        for word in
            CloseReason::ALL.map(CloseReason::name).iter().chain(&RejectReason::ALL.map(RejectReason::name))
        {
            assert!(document.contains(&format!("`{word}`")), "{word} is not in docs/metrics.md");
        }
    }

    #[test]
    fn series_of_a_listener_exist_from_the_start() {
        let (metrics, _) = complete();
        for reason in RejectReason::ALL {
            let series = format!(
                "injector_connections_rejected_total{{listener=\"smtp\",reason=\"{}\"}}",
                reason.name()
            );
            assert_eq!(sample(&metrics, &series), 0.0);
        }
        for reason in CloseReason::ALL {
            let labels = format!("listener=\"smtp\",engine=\"relay\",reason=\"{reason}\"");
            assert_eq!(sample(&metrics, &format!("injector_connections_closed_total{{{labels}}}")), 0.0);
        }
    }

    #[test]
    fn what_is_reported_is_counted_where_it_belongs() {
        let (metrics, listener) = complete();
        listener.accepted();
        listener.rejected(RejectReason::TooManyConnections);
        listener.header_sent();
        listener.header_failed();
        listener.enrolled();
        listener.enrolment_failed("not_established");
        listener
            .bytes(Bytes { relayed: 1, piped: 5, spliced: 2 }, Bytes { relayed: 3, piped: 6, spliced: 4 });
        listener.first_byte(Duration::from_millis(3));
        let served = r#"listener="smtp",engine="relay""#;
        let bytes = |direction, plane| {
            format!(r#"injector_bytes_total{{listener="smtp",direction="{direction}",plane="{plane}"}}"#)
        };
        let first_byte =
            |le| format!(r#"injector_header_to_first_byte_seconds_bucket{{le="{le}",listener="smtp"}}"#);
        for (series, value) in [
            (r#"injector_connections_accepted_total{listener="smtp"}"#.to_owned(), 1.0),
            (
                r#"injector_connections_rejected_total{listener="smtp",reason="too_many_connections"}"#
                    .to_owned(),
                1.0,
            ),
            (format!("injector_headers_sent_total{{{served}}}"), 1.0),
            (format!("injector_headers_failed_total{{{served}}}"), 1.0),
            (r#"injector_enrolments_total{listener="smtp"}"#.to_owned(), 1.0),
            (
                r#"injector_enrolment_failures_total{listener="smtp",reason="not_established"}"#.to_owned(),
                2.0,
            ),
            (bytes("client_to_backend", "relayed"), 1.0),
            (bytes("client_to_backend", "piped"), 5.0),
            (bytes("client_to_backend", "spliced"), 2.0),
            (bytes("backend_to_client", "relayed"), 3.0),
            (bytes("backend_to_client", "piped"), 6.0),
            (bytes("backend_to_client", "spliced"), 4.0),
            (first_byte("0.0025"), 0.0),
            (first_byte("0.005"), 1.0),
            (r#"injector_bpf_events_total{program="verdict",event="redirected"}"#.to_owned(), 5.0),
            (r#"injector_engine_available{engine="splice"}"#.to_owned(), 0.0),
            (r#"injector_selftest_check{engine="splice",check="carry"}"#.to_owned(), 1.0),
            (r#"injector_selftest_check{engine="splice",check="slow_reader"}"#.to_owned(), 0.0),
            (r#"injector_selftest_check_seconds{engine="splice",check="carry"}"#.to_owned(), 0.25),
            ("injector_max_connections".to_owned(), 10.0),
            (format!(r#"injector_build_info{{version="{}"}}"#, env!("CARGO_PKG_VERSION")), 1.0),
        ] {
            assert_eq!(sample(&metrics, &series), value, "{series}");
        }
        let age = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
            - sample(&metrics, "process_start_time_seconds");
        assert!((0.0..60.0).contains(&age), "{age}");
    }

    #[test]
    fn a_connection_is_active_until_its_guard_goes() {
        let (metrics, listener) = complete();
        let active = || sample(&metrics, r#"injector_connections_active{listener="smtp",engine="relay"}"#);
        let (one, two) = (listener.active(), listener.active());
        assert_eq!(active(), 2.0);
        drop(one);
        assert_eq!(active(), 1.0);
        drop(two);
        assert_eq!(active(), 0.0);
    }

    #[test]
    fn an_end_before_the_backend_spoke_is_a_refusal_as_well() {
        let (metrics, listener) = complete();
        CloseReason::ALL.into_iter().for_each(|reason| listener.closed(reason));
        for reason in CloseReason::ALL {
            let labels = format!("listener=\"smtp\",engine=\"relay\",reason=\"{reason}\"");
            assert_eq!(sample(&metrics, &format!("injector_connections_closed_total{{{labels}}}")), 1.0);
        }
        let refusals =
            ["backend_refused", "connect_timeout", "backend_unreachable", "backend_unresolved", "no_banner"];
        for reason in RejectReason::ALL.map(RejectReason::name) {
            let series =
                format!("injector_connections_rejected_total{{listener=\"smtp\",reason=\"{reason}\"}}");
            let expected = refusals.contains(&reason) || reason == "forged_header";
            assert_eq!(sample(&metrics, &series), f64::from(u8::from(expected)), "{reason}");
        }
    }
}
