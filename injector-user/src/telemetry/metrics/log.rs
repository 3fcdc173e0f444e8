//! The dropped log lines, read at every scrape.

use std::{fmt, sync::OnceLock};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter},
};

use crate::telemetry::log::Logging;

/// Collects them.
#[derive(Debug, Default)]
pub(super) struct LogCollector(OnceLock<Logging>);

impl LogCollector {
    pub(super) fn watch(&self, logging: Logging) {
        // A process has one log.
        let _ = self.0.set(logging);
    }
}

impl Collector for LogCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Log lines that were dropped because what reads the log was too slow";
        let dropped = self.0.get().map_or(0, Logging::dropped);
        let counter = encoder.encode_descriptor("log_lines_dropped", help, None, MetricType::Counter)?;
        ConstCounter::new(dropped).encode(counter)
    }
}
