//! A part of the daemon whose values are read at every scrape.

use std::{
    fmt::{self, Debug},
    sync::{Arc, OnceLock},
};

use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};

/// Metrics that are made of values read now.
pub(super) trait Sampled: Debug + Send + Sync {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error>;
}

/// Collects the metrics of a source, of which a process has one at most. Until it is set there are none.
#[derive(Debug)]
pub(super) struct SourceCollector<S: ?Sized>(OnceLock<Arc<S>>);

impl<S: ?Sized> Default for SourceCollector<S> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

impl<S: ?Sized> SourceCollector<S> {
    pub(super) fn watch(&self, source: Arc<S>) {
        // A second one does not exist.
        let _ = self.0.set(source);
    }
}

impl<S: Sampled + ?Sized + 'static> Collector for SourceCollector<S> {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.get().map_or(Ok(()), |source| source.encode(encoder))
    }
}
