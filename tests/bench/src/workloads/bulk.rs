//! Bulk at full speed, up or down.

use anyhow::ensure;
use injector_load::job::Load;
use injector_load::service::{SINK, SOURCE};

use super::{Measured, MeasurementContext, Workload, cpu_figure, figure, float, measured};
use crate::record::Figure;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

struct Bulk {
    direction: Direction,
    connections: usize,
}

pub(super) fn all() -> impl Iterator<Item = Box<dyn Workload>> {
    [(Direction::Up, 1), (Direction::Up, 16), (Direction::Down, 1), (Direction::Down, 16)]
        .into_iter()
        .map(|(direction, connections)| Box::new(Bulk { direction, connections }) as Box<dyn Workload>)
}

impl Workload for Bulk {
    fn name(&self) -> String {
        let direction = if self.direction == Direction::Up { "up" } else { "down" };
        format!("bulk-{direction}-{}", self.connections)
    }

    fn about(&self) -> String {
        let direction = if self.direction == Direction::Up { "client to server" } else { "server to client" };
        format!(
            "{direction}, {} connections, written 256 KiB at once; the receiver drops the bytes in the kernel (MSG_TRUNC); \
             timed until the last byte has arrived",
            self.connections
        )
    }

    fn figures(&self) -> Vec<Figure> {
        vec![figure("rate", "GB/s", true, false), cpu_figure("CPU s/GB")]
    }

    fn measure(&self, context: &mut MeasurementContext<'_>) -> anyhow::Result<Measured> {
        let connections = self.connections;
        let (outcome, counts) = match self.direction {
            Direction::Up => context.load(&SINK, Load::Upload { connections })?,
            Direction::Down => context.load(&SOURCE, Load::Download { connections })?,
        };
        let (sent, received) = match self.direction {
            Direction::Up => (outcome.bytes, counts.bytes_in),
            Direction::Down => (counts.bytes_out, outcome.bytes),
        };
        ensure!(sent == received, "{sent} bytes were sent and {received} arrived");
        ensure!(received > 0, "nothing arrived");
        let gigabytes = float(received) / 1e9;
        Ok(measured(
            outcome.cpu,
            [("rate", gigabytes / outcome.seconds), ("cpu", outcome.cpu.busy() / gigabytes)],
        ))
    }
}
