//! Round-trip latency while bulk runs beside it.

use injector_load::job::Load;
use injector_load::service::{ECHO, SINK};

use super::{Measured, MeasurementContext, Workload, figure, float, measured};
use crate::record::Figure;

/// Connections that make round trips.
const REQUESTERS: usize = 4;
/// Connections that carry bulk.
const BULK: usize = 4;

struct BesideBulk;

pub(super) fn workload() -> Box<dyn Workload> {
    Box::new(BesideBulk)
}

impl Workload for BesideBulk {
    fn name(&self) -> String {
        "beside-bulk".to_owned()
    }

    fn about(&self) -> String {
        format!("round trips of 64 bytes on {REQUESTERS} connections while {BULK} others upload")
    }

    fn figures(&self) -> Vec<Figure> {
        vec![
            figure("median", "µs, median", false, false),
            figure("p99", "µs, 99 %", false, false),
            figure("p999", "µs, 99.9 %", false, false),
            figure("bulk", "GB/s beside", true, false),
        ]
    }

    fn measure(&self, context: &mut MeasurementContext<'_>) -> anyhow::Result<Measured> {
        let bulk = context.system.target(&SINK);
        let load = Load::Beside { connections: REQUESTERS, bulk_connections: BULK, bulk };
        let (outcome, _) = context.load(&ECHO, load)?;
        let latency = outcome.latency.unwrap_or_default();
        // The upload runs through warm-up and measurement.
        let seconds = outcome.seconds + 2.0 * injector_load::job::WARM_UP;
        Ok(measured(
            outcome.cpu,
            [
                ("median", latency.median),
                ("p99", latency.p99),
                ("p999", latency.p999),
                ("bulk", float(outcome.bytes) / 1e9 / seconds),
            ],
        ))
    }
}
