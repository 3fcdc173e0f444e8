//! The metrics of the Services of Kubernetes that are followed, read at every scrape.

use std::{
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

use super::source::Sampled;

/// The values of one Service at a scrape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceSample {
    /// Its namespace and name.
    pub service: String,
    /// The kind of objects that are watched.
    pub resource: &'static str,
    /// Whether the API answered the last request.
    pub up: bool,
    /// When it last answered.
    pub last_answer: Option<SystemTime>,
    /// How many requests failed.
    pub failures: u64,
    /// How many endpoints have each state, once they are known.
    pub endpoints: Option<[(&'static str, usize); 3]>,
}

/// A source of the metrics of Services.
pub trait ServiceSource: fmt::Debug + Send + Sync {
    /// Called at every scrape.
    fn sample(&self) -> Vec<ServiceSample>;
}

impl Sampled for dyn ServiceSource {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let samples = self.sample();
        if samples.is_empty() {
            return Ok(());
        }
        fn labels(sample: &ServiceSample) -> [(&'static str, &str); 2] {
            [("service", &sample.service), ("resource", sample.resource)]
        }
        let help = "1 if the Kubernetes API answered the last request about the service, else 0";
        let mut family = encoder.encode_descriptor("kubernetes_watch_up", help, None, MetricType::Gauge)?;
        for sample in &samples {
            ConstGauge::new(i64::from(sample.up)).encode(family.encode_family(&labels(sample))?)?;
        }
        let help =
            "When the Kubernetes API last answered about the service, in seconds since 1970; 0 if never";
        let name = "kubernetes_last_answer_timestamp";
        let mut family = encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Gauge)?;
        for sample in &samples {
            let answered = sample.last_answer.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
            let answered = answered.unwrap_or_default().as_secs_f64();
            ConstGauge::new(answered).encode(family.encode_family(&labels(sample))?)?;
        }
        let help = "Requests to the Kubernetes API that failed, or whose answer could not be used";
        let name = "kubernetes_watch_failures";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for sample in &samples {
            ConstCounter::new(sample.failures).encode(family.encode_family(&labels(sample))?)?;
        }
        if samples.iter().all(|sample| sample.endpoints.is_none()) {
            return Ok(());
        }
        let help = "Endpoints of the service by state: only ready ones get connections, or those that end if none is ready";
        let mut family = encoder.encode_descriptor("kubernetes_endpoints", help, None, MetricType::Gauge)?;
        for sample in &samples {
            for (state, count) in sample.endpoints.iter().flatten() {
                let labels = [("service", sample.service.as_str()), ("state", *state)];
                let count = i64::try_from(*count).unwrap_or(i64::MAX);
                ConstGauge::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
