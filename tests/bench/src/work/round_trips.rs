//! Questions and answers on connections that stay, and SMTP dialogues on connections that do not.

use injector_load::order::Work as Load;
use injector_load::service::{ECHO, IMAP, SMTP, Service};

use super::{Measured, Scene, Work, cpu_figure, figure, float, measured};
use crate::record::Figure;

struct RoundTrips {
    name: String,
    about: &'static str,
    service: &'static Service,
    connections: usize,
}

pub(super) fn all() -> impl Iterator<Item = Box<dyn Work>> {
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
    echo.into_iter().chain(shapes).map(|work| Box::new(work) as Box<dyn Work>)
}

impl RoundTrips {
    /// Whether whole dialogues are what counts, rather than questions.
    fn by_session(&self) -> bool {
        self.service == &SMTP
    }
}

impl Work for RoundTrips {
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
        // One connection shows how long a round trip takes, many how many there can be.
        let first = if self.connections == 1 { [median, rate] } else { [rate, median] };
        first.into_iter().chain(rest).collect()
    }

    fn measure(&self, scene: &mut Scene<'_>) -> anyhow::Result<Measured> {
        let order = Load::Closed { service: self.service.name.to_owned(), connections: self.connections };
        let (outcome, _) = scene.load(self.service, order)?;
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
