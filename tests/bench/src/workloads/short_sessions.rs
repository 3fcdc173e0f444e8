//! Connections with one request and one response: as many as possible, and at fixed rates.

use injector_load::job::Load;
use injector_load::service::SHORT;

use super::{Measured, MeasurementContext, Workload, cpu_figure, figure, float, measured};
use crate::record::Figure;

/// Clients of the closed loop.
const CLIENTS: usize = 32;

/// Sessions a second of the open loops.
const RATES: [f64; 4] = [500.0, 1000.0, 2000.0, 4000.0];

struct Closed;

struct Open {
    rate: f64,
}

pub(super) fn all() -> impl Iterator<Item = Box<dyn Workload>> {
    let closed = std::iter::once(Box::new(Closed) as Box<dyn Workload>);
    closed.chain(RATES.into_iter().map(|rate| Box::new(Open { rate }) as Box<dyn Workload>))
}

impl Workload for Closed {
    fn name(&self) -> String {
        "short-sessions".to_owned()
    }

    fn about(&self) -> String {
        format!(
            "connect, 64 bytes there, 64 back, the server closes; {CLIENTS} clients, each begins anew at once"
        )
    }

    fn figures(&self) -> Vec<Figure> {
        vec![
            figure("rate", "sessions/s", true, false),
            figure("median", "µs, median", false, false),
            figure("p99", "µs, 99 %", false, false),
            cpu_figure("CPU µs/session"),
        ]
    }

    fn measure(&self, context: &mut MeasurementContext<'_>) -> anyhow::Result<Measured> {
        let load = Load::Closed { service: SHORT.name.to_owned(), connections: CLIENTS };
        sessions(context, load)
    }
}

impl Workload for Open {
    fn name(&self) -> String {
        format!("short-sessions-at-{}", self.rate)
    }

    fn about(&self) -> String {
        format!("the same, {} begun every second; latency counts from when a session was to begin", self.rate)
    }

    fn figures(&self) -> Vec<Figure> {
        vec![
            figure("median", "µs, median", false, false),
            figure("p99", "µs, 99 %", false, false),
            figure("p999", "µs, 99.9 %", false, false),
            figure("unfinished", "unfinished", false, false),
            cpu_figure("CPU µs/session"),
        ]
    }

    fn measure(&self, context: &mut MeasurementContext<'_>) -> anyhow::Result<Measured> {
        sessions(context, Load::Open { service: SHORT.name.to_owned(), rate: self.rate })
    }
}

fn sessions(context: &mut MeasurementContext<'_>, load: Load) -> anyhow::Result<Measured> {
    let (outcome, _) = context.load(&SHORT, load)?;
    // At a fixed rate some sessions may not have completed in the measured time.
    let (count, latency) = (float(outcome.sessions.max(1)), outcome.latency.unwrap_or_default());
    Ok(measured(
        outcome.cpu,
        [
            ("rate", count / outcome.seconds),
            ("median", latency.median),
            ("p99", latency.p99),
            ("p999", latency.p999),
            ("unfinished", float(outcome.unfinished)),
            ("cpu", outcome.cpu.busy() * 1e6 / count),
        ],
    ))
}
