//! Metrics of the engines.

use crate::{engine::registry::EngineProbes, telemetry::metrics::Metrics};

/// Exports the results of the self-tests, and the counters and the log of the splice programs.
pub(super) fn observe(metrics: &Metrics, probes: &EngineProbes) {
    metrics.set_engine("relay", true);
    for (engine, report) in [("inline", &probes.inline), ("splice", &probes.splice)] {
        metrics.set_engine(engine, report.failure().is_none());
        for check in &report.checks {
            metrics.set_check(engine, check.name, check.result.is_ok(), check.took);
        }
    }
    if let Some(splice) = probes.splice_engine() {
        splice.spawn_tasks(metrics);
    }
}
