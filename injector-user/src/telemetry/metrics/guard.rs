//! The metrics of bans, read at every scrape.

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

/// The values at a scrape.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuardSample {
    /// How many bans each origin wants.
    pub bans: Vec<(&'static str, usize)>,
    /// How many addresses and networks may be banned.
    pub max_bans: u32,
    /// Packets dropped in the kernel, by hook; empty if bans are not in the kernel.
    pub dropped: Vec<(&'static str, u64)>,
    /// Bans that did not fit since the start.
    pub rejected_full: usize,
    /// The kernel lacks changes, because it refused them.
    pub is_behind: bool,
    /// The list files.
    pub lists: Vec<ListSample>,
}

/// A list file at a scrape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListSample {
    /// Its path.
    pub file: String,
    /// How many networks of it are in effect.
    pub networks: usize,
    /// It cannot be read now.
    pub failed: bool,
    /// When it was last read.
    pub read_at: Option<SystemTime>,
}

/// A source of the guard's metrics.
pub trait GuardSource: fmt::Debug + Send + Sync {
    /// Called at every scrape.
    fn sample(&self) -> GuardSample;
}

impl Sampled for dyn GuardSource {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let GuardSample { bans, max_bans, dropped, rejected_full, is_behind, lists } = self.sample();
        let help = "Bans, by who wants them";
        let mut family = encoder.encode_descriptor("guard_bans", help, None, MetricType::Gauge)?;
        for (origin, count) in bans {
            gauge(count).encode(family.encode_family(&[("origin", origin)])?)?;
        }
        let help = "How many addresses and networks may be banned";
        let metric = encoder.encode_descriptor("guard_max_bans", help, None, MetricType::Gauge)?;
        ConstGauge::new(i64::from(max_bans)).encode(metric)?;
        let help = "Bans that did not fit into guard.max_bans";
        let mut family = encoder.encode_descriptor("guard_bans_rejected", help, None, MetricType::Counter)?;
        ConstCounter::new(rejected_full as u64).encode(family.encode_family(&[("reason", "full")])?)?;
        let help = "1 if the kernel refused a change of the bans and lacks it, else 0";
        let metric = encoder.encode_descriptor("guard_kernel_behind", help, None, MetricType::Gauge)?;
        ConstGauge::new(i64::from(is_behind)).encode(metric)?;
        if !dropped.is_empty() {
            let help = "Packets of banned sources that the kernel dropped";
            let name = "guard_dropped_packets";
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (hook, count) in dropped {
                ConstCounter::new(count).encode(family.encode_family(&[("hook", hook)])?)?;
            }
        }
        if lists.is_empty() {
            return Ok(());
        }
        let help = "Networks of a list file that are in effect";
        let mut family = encoder.encode_descriptor("guard_list_networks", help, None, MetricType::Gauge)?;
        for list in &lists {
            gauge(list.networks).encode(family.encode_family(&[("file", list.file.as_str())])?)?;
        }
        let help = "1 if a list file cannot be read now, else 0";
        let mut family = encoder.encode_descriptor("guard_list_failed", help, None, MetricType::Gauge)?;
        for list in &lists {
            let failed = i64::from(list.failed);
            ConstGauge::new(failed).encode(family.encode_family(&[("file", list.file.as_str())])?)?;
        }
        let help = "When a list file was last read, in seconds since 1970; 0 if never";
        let name = "guard_list_read_timestamp";
        let mut family = encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Gauge)?;
        for list in &lists {
            let read_at = list.read_at.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
            let labels = [("file", list.file.as_str())];
            ConstGauge::new(read_at.as_secs_f64()).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

fn gauge(count: usize) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX))
}
