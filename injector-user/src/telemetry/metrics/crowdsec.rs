//! The metrics of the CrowdSec feed. They exist while there is one.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{
        TypedMetric,
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
    },
    registry::Unit,
};

use super::labels::IgnoredLabels;

/// The metrics of the CrowdSec feed. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct CrowdSecMetrics(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    enabled: AtomicBool,
    up: Gauge,
    last_success: Gauge<f64, AtomicU64>,
    failures: Counter,
    ignored: Family<IgnoredLabels, Counter>,
    /// By their origin.
    decisions: Mutex<Vec<(String, u64)>>,
}

impl CrowdSecMetrics {
    /// Exports them from now on, with these reasons for ignoring a decision.
    pub fn enable(&self, reasons: &[&'static str]) {
        for reason in reasons {
            drop(self.0.ignored.get_or_create(&IgnoredLabels { reason }));
        }
        self.0.up.set(0);
        self.0.enabled.store(true, Ordering::Relaxed);
    }

    /// Exports them no longer.
    pub fn disable(&self) {
        self.0.enabled.store(false, Ordering::Relaxed);
    }

    /// An answer of the LAPI was applied.
    pub fn succeeded(&self) {
        self.0.up.set(1);
        self.0
            .last_success
            .set(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
    }

    /// The LAPI could not be asked, or its answer could not be used.
    pub fn failed(&self) {
        self.0.up.set(0);
        self.0.failures.inc();
    }

    /// So many decisions of each origin are in effect.
    pub fn set_decisions(&self, decisions: Vec<(String, u64)>) {
        *self.0.decisions.lock().unwrap_or_else(PoisonError::into_inner) = decisions;
    }

    /// Decisions did not become bans.
    pub fn ignored(&self, reason: &'static str, count: u64) {
        self.0.ignored.get_or_create(&IgnoredLabels { reason }).inc_by(count);
    }
}

impl Collector for CrowdSecMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Inner { enabled, up, last_success, failures, ignored, decisions } = &*self.0;
        if !enabled.load(Ordering::Relaxed) {
            return Ok(());
        }
        let help = "1 if the last request to the CrowdSec LAPI succeeded, else 0";
        up.encode(encoder.encode_descriptor("guard_crowdsec_up", help, None, Gauge::<i64>::TYPE)?)?;
        let help = "When decisions were last read from the CrowdSec LAPI, in seconds since 1970; 0 if never";
        let name = "guard_crowdsec_last_success_timestamp";
        last_success.encode(encoder.encode_descriptor(
            name,
            help,
            Some(&Unit::Seconds),
            Gauge::<i64>::TYPE,
        )?)?;
        let help = "Requests to the CrowdSec LAPI that failed, or whose answer could not be used";
        failures.encode(encoder.encode_descriptor(
            "guard_crowdsec_failures",
            help,
            None,
            Counter::<u64>::TYPE,
        )?)?;
        let help = "Decisions of CrowdSec that did not become bans";
        ignored.encode(encoder.encode_descriptor(
            "guard_crowdsec_ignored",
            help,
            None,
            Counter::<u64>::TYPE,
        )?)?;
        let help = "Decisions of CrowdSec that are bans, by their origin";
        let name = "guard_crowdsec_decisions";
        let mut family = encoder.encode_descriptor(name, help, None, Gauge::<i64>::TYPE)?;
        for (origin, count) in &*decisions.lock().unwrap_or_else(PoisonError::into_inner) {
            let count = ConstGauge::new(i64::try_from(*count).unwrap_or(i64::MAX));
            count.encode(family.encode_family(&[("origin", origin.as_str())])?)?;
        }
        Ok(())
    }
}
