//! Latencies of many events, with three significant digits.

use std::time::Duration;

use hdrhistogram::Histogram;

/// Longer latencies are recorded as this: one minute, in nanoseconds.
const MAX_NANOS: u64 = 60_000_000_000;

/// A histogram of latencies.
#[derive(Clone, Debug)]
pub struct Latencies(Histogram<u64>);

/// Quantiles of the latencies, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    /// Number of events.
    pub count: u64,
    /// Half of the events were faster.
    pub median: f64,
    /// 90 % were faster.
    pub p90: f64,
    /// 99 % were faster.
    pub p99: f64,
    /// 99.9 % were faster.
    pub p999: f64,
    /// The slowest.
    pub max: f64,
}

impl Latencies {
    /// # Errors
    /// Never; the bounds are valid constants.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self(Histogram::new_with_bounds(1, MAX_NANOS, 3)?))
    }

    /// Adds one event.
    pub fn record(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(MAX_NANOS));
    }

    /// Adds the events of another thread.
    ///
    /// # Errors
    /// Never; both have the same bounds.
    pub fn add(&mut self, other: &Self) -> anyhow::Result<()> {
        Ok(self.0.add(&other.0)?)
    }

    /// Removes all events, at the end of the warm-up.
    pub fn clear(&mut self) {
        self.0.reset();
    }

    /// The quantiles; `None` if there are no events.
    #[must_use]
    pub fn summary(&self) -> Option<Summary> {
        #[expect(clippy::cast_precision_loss, reason = "nanoseconds of at max a minute")]
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1000.0;
        (!self.0.is_empty()).then(|| Summary {
            count: self.0.len(),
            median: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: at(1.0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_come_in_microseconds() {
        let mut latencies = Latencies::new().unwrap();
        assert_eq!(latencies.summary(), None);
        for micros in 1..=1000 {
            latencies.record(Duration::from_micros(micros));
        }
        let summary = latencies.summary().unwrap();
        assert_eq!(summary.count, 1000);
        assert!((summary.median - 500.0).abs() < 1.0, "{summary:?}");
        assert!((summary.p99 - 990.0).abs() < 1.0, "{summary:?}");
        latencies.record(Duration::from_secs(3600));
        assert!(latencies.summary().unwrap().max < 61e6);
    }
}
