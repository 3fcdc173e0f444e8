//! The counters of the BPF programs, read from their maps at every scrape.

use std::{
    fmt::{self, Debug},
    sync::{Arc, PoisonError, RwLock},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

use crate::telemetry::backlog::BacklogTotal;

/// The counters of loaded programs.
pub trait BpfCounters: Send + Sync + Debug {
    /// Program, event and count since the programs were loaded; each pair once. Called at every
    /// scrape.
    fn read(&self) -> Vec<(&'static str, &'static str, u64)>;

    /// How many entries of the inline engine's flow map are in use.
    fn flows(&self) -> u32 {
        0
    }
}

/// Collects the counters of all loaded programs, and the backlog.
#[derive(Debug, Default)]
pub(super) struct BpfCollector {
    counters: RwLock<Vec<Arc<dyn BpfCounters>>>,
    backlog: RwLock<BacklogTotal>,
}

impl BpfCollector {
    pub(super) fn watch(&self, counters: Arc<dyn BpfCounters>) {
        self.counters.write().unwrap_or_else(PoisonError::into_inner).push(counters);
    }

    pub(super) fn watch_backlog(&self, backlog_total: BacklogTotal) {
        *self.backlog.write().unwrap_or_else(PoisonError::into_inner) = backlog_total;
    }
}

impl Collector for BpfCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let backlog = self.backlog.read().unwrap_or_else(PoisonError::into_inner).bytes();
        let gauge = encoder.encode_descriptor(
            "backlog",
            "Bytes queued in the kernel for slow receivers, as last measured",
            Some(&Unit::Bytes),
            MetricType::Gauge,
        )?;
        ConstGauge::new(i64::try_from(backlog).unwrap_or(i64::MAX)).encode(gauge)?;
        let watched = self.counters.read().unwrap_or_else(PoisonError::into_inner).clone();
        let flows = watched.iter().map(|counters| counters.flows()).fold(0, u32::saturating_add);
        let gauge = encoder.encode_descriptor(
            "inline_flows",
            "Entries of the inline engine's flow map in use, those of ended connections included",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(i64::from(flows)).encode(gauge)?;
        if watched.is_empty() {
            return Ok(());
        }
        let mut family = encoder.encode_descriptor(
            "bpf_events",
            "Events in the BPF programs",
            None,
            MetricType::Counter,
        )?;
        for (program, event, count) in watched.iter().flat_map(|counters| counters.read()) {
            let labels = [("program", program), ("event", event)];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
