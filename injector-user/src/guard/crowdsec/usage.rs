//! Usage metrics (`POST /v1/usage-metrics`, CrowdSec 1.6.3 and later). Pure.
//!
//! The form is that of `models.AllMetrics` of CrowdSec's LAPI. The programs count dropped packets by hook and not by
//! decision, so `dropped` has no origin, and includes bans of lists and commands.

use std::time::Duration;

use serde_json::{Value, json};

use super::stream::{self, Origins};

/// From one report to the next. CrowdSec recommends it, and asks for 15 minutes at least.
const INTERVAL: Duration = Duration::from_secs(1800);

/// What the next report contains.
#[derive(Debug)]
pub(super) struct Usage {
    enabled: bool,
    /// Seconds since 1970.
    started: u64,
    /// When the last attempt was, after the start.
    attempted: Option<Duration>,
    /// When the last report that arrived was sent, after the start.
    reported: Duration,
    /// Dropped packets that were reported.
    reported_dropped: u64,
    decisions: Origins,
}

impl Usage {
    /// `dropped` is the number of packets that an earlier daemon's programs dropped.
    pub(super) const fn new(enabled: bool, started: u64, dropped: u64) -> Self {
        Self {
            enabled,
            started,
            attempted: None,
            reported: Duration::ZERO,
            reported_dropped: dropped,
            decisions: Origins::new(),
        }
    }

    /// Counts the decisions of an answer: those of all, or changes.
    pub(super) fn count(&mut self, all: bool, [new, deleted]: [Origins; 2]) {
        if all {
            self.decisions = new;
            return;
        }
        for (origin, [v4, v6]) in deleted {
            if let Some(there) = self.decisions.get_mut(&origin) {
                *there = [there[0].saturating_sub(v4), there[1].saturating_sub(v6)];
            }
        }
        for (origin, [v4, v6]) in new {
            let there = stream::of_origin(&mut self.decisions, origin);
            *there = [there[0] + v4, there[1] + v6];
        }
        self.decisions.retain(|_, count| *count != [0, 0]);
    }

    /// How many decisions of each origin are in effect, by what the LAPI has said of their ends.
    pub(super) fn decisions(&self) -> Vec<(String, u64)> {
        self.decisions.iter().map(|(origin, [v4, v6])| (origin.clone(), v4 + v6)).collect()
    }

    /// Whether a report is due. The first one is, so that the LAPI knows this bouncer's version.
    pub(super) fn is_due(&self, now: Duration) -> bool {
        self.enabled && self.attempted.is_none_or(|at| now.saturating_sub(at) >= INTERVAL)
    }

    /// The report. `dropped` packets so far, `None` if bans are not in the kernel.
    pub(super) fn report(&mut self, now: Duration, dropped: Option<u64>, kernel: &str) -> Value {
        self.attempted = Some(now);
        let mut items: Vec<Value> = Vec::new();
        for (origin, counts) in &self.decisions {
            for (count, ip_type) in counts.iter().zip(["ipv4", "ipv6"]) {
                if *count > 0 {
                    items.push(json!({
                        "name": "active_decisions",
                        "unit": "ip",
                        "value": count,
                        "labels": { "origin": origin, "ip_type": ip_type },
                    }));
                }
            }
        }
        if let Some(dropped) = dropped {
            let value = dropped.saturating_sub(self.reported_dropped);
            items.push(json!({ "name": "dropped", "unit": "packet", "value": value, "labels": {} }));
        }
        json!({
            "log_processors": [],
            "remediation_components": [{
                "type": "injector",
                "version": env!("CARGO_PKG_VERSION"),
                "feature_flags": [],
                "utc_startup_timestamp": self.started,
                "os": { "name": "linux", "version": kernel },
                "metrics": [{
                    "meta": {
                        "window_size_seconds": now.saturating_sub(self.reported).as_secs(),
                        "utc_now_timestamp": self.started.saturating_add(now.as_secs()),
                    },
                    "items": items,
                }],
            }],
        })
    }

    /// The report arrived.
    pub(super) const fn reported(&mut self, now: Duration, dropped: Option<u64>) {
        self.reported = now;
        if let Some(dropped) = dropped {
            self.reported_dropped = dropped;
        }
    }

    /// The LAPI does not know usage metrics.
    pub(super) const fn turn_off(&mut self) {
        self.enabled = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins(counts: &[(&str, u64, u64)]) -> Origins {
        counts.iter().map(|(origin, v4, v6)| ((*origin).to_owned(), [*v4, *v6])).collect()
    }

    fn second(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_report_has_the_form_of_the_lapi() {
        let mut usage = Usage::new(true, 1_700_000_000, 5);
        usage.count(true, [origins(&[("CAPI", 3, 1)]), Origins::new()]);
        usage.count(false, [origins(&[("cscli", 1, 0)]), origins(&[("CAPI", 1, 9), ("gone", 1, 1)])]);
        let report = usage.report(second(1800), Some(12), "6.1.0");
        assert_eq!(usage.decisions(), [("CAPI".to_owned(), 2), ("cscli".to_owned(), 1)]);
        let expected = json!({
            "log_processors": [],
            "remediation_components": [{
                "type": "injector",
                "version": env!("CARGO_PKG_VERSION"),
                "feature_flags": [],
                "utc_startup_timestamp": 1_700_000_000u64,
                "os": { "name": "linux", "version": "6.1.0" },
                "metrics": [{
                    "meta": { "window_size_seconds": 1800, "utc_now_timestamp": 1_700_001_800u64 },
                    "items": [
                        {"name": "active_decisions", "unit": "ip", "value": 2,
                         "labels": {"origin": "CAPI", "ip_type": "ipv4"}},
                        {"name": "active_decisions", "unit": "ip", "value": 1,
                         "labels": {"origin": "cscli", "ip_type": "ipv4"}},
                        {"name": "dropped", "unit": "packet", "value": 7, "labels": {}},
                    ],
                }],
            }],
        });
        assert_eq!(report, expected);
    }

    #[test]
    fn origins_of_many_answers_are_limited_too() {
        let mut usage = Usage::new(true, 0, 0);
        for number in 0..3 * stream::MAX_ORIGINS {
            usage.count(false, [origins(&[(&format!("lists:{number}"), 1, 0)]), Origins::new()]);
        }
        let decisions = usage.decisions();
        assert_eq!(decisions.len(), stream::MAX_ORIGINS + 1);
        assert_eq!(decisions.iter().map(|(_, count)| count).sum::<u64>(), 3 * stream::MAX_ORIGINS as u64);
    }

    #[test]
    fn a_lost_report_is_part_of_the_next() {
        let mut usage = Usage::new(true, 0, 0);
        let window = |report: &Value| {
            let metrics = &report["remediation_components"][0]["metrics"][0];
            (metrics["meta"]["window_size_seconds"].as_u64().unwrap(), metrics["items"][0]["value"].as_u64())
        };
        assert!(usage.is_due(second(1)));
        assert_eq!(window(&usage.report(second(1), Some(4), "")), (1, Some(4)));
        assert!(!usage.is_due(second(1800)) && usage.is_due(second(1801)));
        assert_eq!(window(&usage.report(second(1801), Some(9), "")), (1801, Some(9)));
        usage.reported(second(1801), Some(9));
        assert_eq!(window(&usage.report(second(3601), Some(10), "")), (1800, Some(1)));
        // The programs were loaded anew.
        assert_eq!(window(&usage.report(second(5401), Some(0), "")), (3600, Some(0)));
        assert_eq!(window(&usage.report(second(5401), None, "")), (3600, None));
        usage.turn_off();
        assert!(!usage.is_due(second(99_999)));
        assert!(!Usage::new(false, 0, 0).is_due(second(99_999)));
    }
}
