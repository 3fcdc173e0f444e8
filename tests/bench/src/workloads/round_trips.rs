//! Round trips on persistent connections, and SMTP dialogues on one connection each.

use injector_load::job::Load;
use injector_load::service::{ECHO, IMAP, SMTP, Service};

use super::{Measured, MeasurementContext, Workload, cpu_figure, figure, float, measured};
use crate::record::Figure;

struct RoundTrips {
    name: String,
    about: &'static str,
    service: &'static Service,
    connections: usize,
}

pub(super) fn all() -> impl Iterator<Item = Box<dyn Workload>> {
    let echo = [1, 32, 256].map(|connections| RoundTrips {
        name: format!("round-trips-{connections}"),
        about: "64 bytes there, 64 back, on connections that stay",
        service: &ECHO,
        connections,
    });
    let shapes = [
        RoundTrips {
            name: "imap-polling".to_owned(),
            about: "NOOP, NOOP, STATUS, FETCH in the sizes they have over TLS, on connections that stay",
            service: &IMAP,
            connections: 32,
        },
        RoundTrips {
            name: "smtp-dialogue".to_owned(),
            about: "greeting, EHLO, MAIL, RCPT, DATA, 4 KiB, QUIT in clear text, each dialogue on a connection of its own",
            service: &SMTP,
            connections: 32,
        },
    ];
    echo.into_iter().chain(shapes).map(|workload| Box::new(workload) as Box<dyn Workload>)
}

impl RoundTrips {
    /// Whether whole dialogues are counted, rather than round trips.
    fn by_session(&self) -> bool {
        self.service == &SMTP
    }
}

impl Workload for RoundTrips {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn about(&self) -> String {
        format!("{}; {} at a time", self.about, self.connections)
    }

    fn figures(&self) -> Vec<Figure> {
        let (rate, cpu) = if self.by_session() {
            ("dialogues/s", "CPU µs/dialogue")
        } else {
            ("round trips/s", "CPU µs/round trip")
        };
        let rate = figure("rate", rate, true, false);
        let median = figure("median", "µs, median", false, false);
        let rest = [figure("p99", "µs, 99 %", false, false), cpu_figure(cpu)];
        // One connection shows the latency of a round trip, many show the throughput.
        let first = if self.connections == 1 { [median, rate] } else { [rate, median] };
        first.into_iter().chain(rest).collect()
    }

    fn measure(&self, context: &mut MeasurementContext<'_>) -> anyhow::Result<Measured> {
        let load = Load::Closed { service: self.service.name.to_owned(), connections: self.connections };
        let (outcome, _) = context.load(self.service, load)?;
        let count = float(if self.by_session() { outcome.sessions } else { outcome.round_trips });
        let latency = outcome.latency.unwrap_or_default();
        Ok(measured(
            outcome.cpu,
            [
                ("rate", count / outcome.seconds),
                ("median", latency.median),
                ("p99", latency.p99),
                ("cpu", outcome.cpu.busy() * 1e6 / count),
            ],
        ))
    }
}
