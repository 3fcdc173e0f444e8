//! The counters of the BPF programs, read from their maps when somebody scrapes.

use std::{
    fmt::{self, Debug},
    sync::{Arc, PoisonError, RwLock},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter},
};

/// What loaded programs have counted.
pub trait BpfCounters: Send + Sync + Debug {
    /// Program, event and count since the programs were loaded, each pair once. Called at every scrape.
    fn read(&self) -> Vec<(&'static str, &'static str, u64)>;
}

/// The programs being watched: none until they are loaded.
#[derive(Debug, Default)]
pub(super) struct Programs(RwLock<Option<Arc<dyn BpfCounters>>>);

impl Programs {
    pub(super) fn watch(&self, counters: Arc<dyn BpfCounters>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(counters);
    }
}

impl Collector for Programs {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(counters) = self.0.read().unwrap_or_else(PoisonError::into_inner).clone() else {
            return Ok(());
        };
        let mut family = encoder.encode_descriptor(
            "bpf_events",
            "What the programs in the kernel did",
            None,
            MetricType::Counter,
        )?;
        for (program, event, count) in counters.read() {
            let labels = [("program", program), ("event", event)];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
