//! How long a round trip takes while bulk runs beside it.

use injector_load::order::Work as Load;
use injector_load::service::{ECHO, SINK};

use super::{Measured, Scene, Work, figure, float, measured};
use crate::record::Figure;

/// Connections with questions.
const ASKING: usize = 4;
/// Connections with bulk.
const BULK: usize = 4;

struct Mixed;

pub(super) fn work() -> Box<dyn Work> {
    Box::new(Mixed)
}

impl Work for Mixed {
    fn name(&self) -> String {
        "beside-bulk".to_owned()
    }

    fn about(&self) -> String {
        format!("round trips of 64 bytes on {ASKING} connections while {BULK} others upload")
    }

    fn figures(&self) -> Vec<Figure> {
        vec![
            figure("median", "µs, median", false, false),
            figure("p99", "µs, 99 %", false, false),
            figure("p999", "µs, 99.9 %", false, false),
            figure("bulk", "GB/s beside", true, false),
        ]
    }

    fn measure(&self, scene: &mut Scene<'_>) -> anyhow::Result<Measured> {
        let bulk = scene.peer.target(&SINK);
        let order = Load::Beside { connections: ASKING, bulk_connections: BULK, bulk };
        let (outcome, _) = scene.load(&ECHO, order)?;
        let latency = outcome.latency.unwrap_or_default();
        // The upload runs through warm-up and measurement.
        let seconds = outcome.seconds + 2.0 * injector_load::client::WARM_UP;
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
