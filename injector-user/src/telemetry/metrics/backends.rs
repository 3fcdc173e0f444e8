//! The metrics of backends, read at every scrape.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

/// The values of one backend at a scrape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendSample {
    /// The name in the configuration.
    pub name: String,
    /// Whether it gets connections.
    pub up: bool,
    /// Open sessions. Not those of the inline engine, which the kernel forwards.
    pub active: u64,
    /// Sessions so far.
    pub sessions: u64,
    /// Passed health checks.
    pub checks_passed: u64,
    /// Failed health checks.
    pub checks_failed: u64,
    /// Ejections because connections failed.
    pub ejections: u64,
    /// Headers that it answered as commands.
    pub misread: u64,
    /// It answered the last one so.
    pub misreads_header: bool,
}

/// A source of the metrics of a listener's backends.
pub trait BackendSource: fmt::Debug + Send + Sync {
    /// All backends, in the order of the configuration. Called at every scrape.
    fn sample(&self) -> Vec<BackendSample>;

    /// How many clients wait for a backend. Called at every scrape.
    fn queued(&self) -> usize;
}

/// Collects the backends of each listener.
#[derive(Debug, Default)]
pub(super) struct BackendCollector(RwLock<BTreeMap<String, Arc<dyn BackendSource>>>);

impl BackendCollector {
    pub(super) fn watch(&self, listener: &str, backends: Arc<dyn BackendSource>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(listener.to_owned(), backends);
    }

    pub(super) fn forget(&self, listener: &str) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(listener);
    }

    /// The listeners that have backends, of which none is up.
    pub(super) fn without_backend(&self) -> Vec<String> {
        let watched = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let none_is_up = |backends: &dyn BackendSource| {
            let all = backends.sample();
            !all.is_empty() && all.iter().all(|backend| !backend.up)
        };
        let down = watched.iter().filter(|(_, backends)| none_is_up(&***backends));
        down.map(|(listener, _)| listener.clone()).collect()
    }
}

impl BackendCollector {
    /// The backends that read the header as commands, with their listeners.
    pub(super) fn misreading(&self) -> Vec<(String, String)> {
        let watched = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        let of = |(listener, backends): (String, Arc<dyn BackendSource>)| {
            let misreading = backends.sample().into_iter().filter(|sample| sample.misreads_header);
            misreading.map(|sample| (listener.clone(), sample.name)).collect::<Vec<_>>()
        };
        watched.into_iter().flat_map(of).collect()
    }
}

type Count = fn(&BackendSample) -> u64;

impl Collector for BackendCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let watched = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        let all: Vec<(&str, BackendSample)> = watched
            .iter()
            .flat_map(|(listener, backends)| {
                backends.sample().into_iter().map(move |it| (listener.as_str(), it))
            })
            .collect();
        if all.is_empty() {
            return Ok(());
        }
        let help = "1 if the backend receives connections, 0 if it is down, ejected or disabled";
        let mut family = encoder.encode_descriptor("backend_up", help, None, MetricType::Gauge)?;
        for (listener, backend) in &all {
            let labels = [("listener", *listener), ("backend", backend.name.as_str())];
            let up = i64::from(backend.up);
            ConstGauge::new(up).encode(family.encode_family(&labels)?)?;
        }
        let help = "Sessions of splice and relay with the backend now";
        let mut family = encoder.encode_descriptor("backend_active", help, None, MetricType::Gauge)?;
        for (listener, backend) in &all {
            let labels = [("listener", *listener), ("backend", backend.name.as_str())];
            let active = i64::try_from(backend.active).unwrap_or(i64::MAX);
            ConstGauge::new(active).encode(family.encode_family(&labels)?)?;
        }
        let help = "Clients that wait because every backend has max_connections sessions";
        let mut family = encoder.encode_descriptor("backend_queue", help, None, MetricType::Gauge)?;
        for (listener, backends) in &watched {
            let queued = i64::try_from(backends.queued()).unwrap_or(i64::MAX);
            ConstGauge::new(queued).encode(family.encode_family(&[("listener", listener.as_str())])?)?;
        }
        let counters: [(&str, &str, Count); 3] = [
            ("backend_sessions", "Connections that reached the backend", |it| it.sessions),
            ("backend_ejections", "Ejections of the backend because connections failed", |it| it.ejections),
            ("backend_headers_misread", "Headers that the backend answered as commands", |it| it.misread),
        ];
        for (metric, help, count) in counters {
            let mut family = encoder.encode_descriptor(metric, help, None, MetricType::Counter)?;
            for (listener, backend) in &all {
                let labels = [("listener", *listener), ("backend", backend.name.as_str())];
                ConstCounter::new(count(backend)).encode(family.encode_family(&labels)?)?;
            }
        }
        let mut family = encoder.encode_descriptor(
            "backend_checks",
            "Checks of the backend",
            None,
            MetricType::Counter,
        )?;
        for (listener, backend) in &all {
            for (result, count) in [("passed", backend.checks_passed), ("failed", backend.checks_failed)] {
                let labels =
                    [("listener", *listener), ("backend", backend.name.as_str()), ("result", result)];
                ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
