//! What is known of the backends, read when somebody scrapes.

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

use crate::backend::{Account, Backend, Backends};

/// The backends of each listener.
#[derive(Debug, Default)]
pub(super) struct Watched(RwLock<BTreeMap<String, Arc<Backends>>>);

impl Watched {
    pub(super) fn watch(&self, listener: &str, backends: Arc<Backends>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(listener.to_owned(), backends);
    }

    pub(super) fn forget(&self, listener: &str) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(listener);
    }
}

type Count = fn(Account) -> u64;

impl Collector for Watched {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let watched = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        let all: Vec<(&str, String, &Backend)> = watched
            .iter()
            .flat_map(|(listener, backends)| backends.all().iter().map(move |it| (listener, it)))
            .map(|(listener, backend)| (listener.as_str(), backend.configured().to_string(), backend))
            .collect();
        if all.is_empty() {
            return Ok(());
        }
        let help = "1 if the backend gets connections, 0 if it is down, ejected or taken out";
        let mut family = encoder.encode_descriptor("backend_up", help, None, MetricType::Gauge)?;
        for (listener, name, backend) in &all {
            let labels = [("listener", *listener), ("backend", name.as_str())];
            let up = i64::from(backend.standing().is_up());
            ConstGauge::new(up).encode(family.encode_family(&labels)?)?;
        }
        let help = "Sessions of the engines that end TCP with the backend now";
        let mut family = encoder.encode_descriptor("backend_active", help, None, MetricType::Gauge)?;
        for (listener, name, backend) in &all {
            let labels = [("listener", *listener), ("backend", name.as_str())];
            let active = i64::try_from(backend.account().active).unwrap_or(i64::MAX);
            ConstGauge::new(active).encode(family.encode_family(&labels)?)?;
        }
        let counters: [(&str, &str, Count); 2] = [
            ("backend_sessions", "Connections that reached the backend", |it| it.sessions),
            ("backend_ejections", "Times that the backend was left out because connections failed", |it| {
                it.ejections
            }),
        ];
        for (metric, help, count) in counters {
            let mut family = encoder.encode_descriptor(metric, help, None, MetricType::Counter)?;
            for (listener, name, backend) in &all {
                let labels = [("listener", *listener), ("backend", name.as_str())];
                ConstCounter::new(count(backend.account())).encode(family.encode_family(&labels)?)?;
            }
        }
        let mut family = encoder.encode_descriptor(
            "backend_checks",
            "Checks of the backend",
            None,
            MetricType::Counter,
        )?;
        for (listener, name, backend) in &all {
            let Account { passed, failed, .. } = backend.account();
            for (result, count) in [("passed", passed), ("failed", failed)] {
                let labels = [("listener", *listener), ("backend", name.as_str()), ("result", result)];
                ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
