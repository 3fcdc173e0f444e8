//! As many bytes as fit through, up or down.

use anyhow::ensure;
use injector_load::order::Work as Load;
use injector_load::service::{SINK, SOURCE};

use super::{Measured, Scene, Work, cpu_figure, figure, float, measured};
use crate::record::Figure;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Up,
    Down,
}

struct Bulk {
    way: Way,
    connections: usize,
}

pub(super) fn all() -> impl Iterator<Item = Box<dyn Work>> {
    [(Way::Up, 1), (Way::Up, 16), (Way::Down, 1), (Way::Down, 16)]
        .into_iter()
        .map(|(way, connections)| Box::new(Bulk { way, connections }) as Box<dyn Work>)
}

impl Work for Bulk {
    fn name(&self) -> String {
        let way = if self.way == Way::Up { "up" } else { "down" };
        format!("bulk-{way}-{}", self.connections)
    }

    fn about(&self) -> String {
        let way = if self.way == Way::Up { "client to server" } else { "server to client" };
        format!(
            "{way}, {} connections, written 256 KiB at once; the receiver drops the bytes in the kernel (MSG_TRUNC); \
             timed until the last byte has arrived",
            self.connections
        )
    }

    fn figures(&self) -> Vec<Figure> {
        vec![figure("rate", "GB/s", true, false), cpu_figure("CPU s/GB")]
    }

    fn measure(&self, scene: &mut Scene<'_>) -> anyhow::Result<Measured> {
        let connections = self.connections;
        let (outcome, counts) = match self.way {
            Way::Up => scene.load(&SINK, Load::Upload { connections })?,
            Way::Down => scene.load(&SOURCE, Load::Download { connections })?,
        };
        let (sent, come) = match self.way {
            Way::Up => (outcome.bytes, counts.bytes_in),
            Way::Down => (counts.bytes_out, outcome.bytes),
        };
        ensure!(sent == come, "{sent} bytes were sent and {come} arrived");
        ensure!(come > 0, "nothing arrived");
        let gigabytes = float(come) / 1e9;
        Ok(measured(
            outcome.cpu,
            [("rate", gigabytes / outcome.seconds), ("cpu", outcome.cpu.busy() / gigabytes)],
        ))
    }
}
