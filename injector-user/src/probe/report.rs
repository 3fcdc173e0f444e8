//! The report of a run: as text, as JSON, and as Prometheus metrics.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::json;

use super::{
    proxy_port::{Exposure, ProxyPort},
    step::{Failure, Step},
};
use crate::doctor::observation::{Family, Relay};

/// The metric that must survive a failed run.
pub(super) const LAST_SUCCESS: &str = "injector_probe_last_success_timestamp_seconds";

/// One run.
#[derive(Clone, Debug)]
pub struct Report {
    /// The probe's name.
    pub probe: String,
    /// The message's id.
    pub id: String,
    /// When it ended.
    pub ended: SystemTime,
    /// How long it took.
    pub took: Duration,
    /// The steps that were started, with their durations.
    pub steps: Vec<(Step, Duration)>,
    /// Why it failed; `None` if it did not.
    pub failure: Option<Failure>,
    /// The mail server's PROXY ports, as this host sees them.
    pub proxy_ports: Vec<ProxyPort>,
    /// Messages of earlier runs that were deleted.
    pub leftovers: usize,
}

impl Report {
    /// Whether a step failed. The PROXY ports are tested even if the roundtrip fails.
    fn failed(&self, step: Step) -> bool {
        let ports = step == Step::ProxyPort && self.proxy_ports.iter().any(|port| port.failure().is_some());
        ports || self.failure.as_ref().is_some_and(|failure| failure.step == step)
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (step, took) in &self.steps {
            let failed = self.failed(*step);
            let mark = if failed { "FAILED" } else { "ok    " };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {mark}  {step:<15} {:>9.1} ms", took.as_secs_f64() * 1000.0);
        }
        for ProxyPort { server, addresses } in &self.proxy_ports {
            let _ = match addresses {
                Ok(addresses) => addresses.iter().try_for_each(|(address, exposure)| {
                    let what = exposure.describe(Family::of(address.ip()));
                    writeln!(text, "          {server} ({address}) {what}")
                }),
                Err(why) => writeln!(text, "          {server} was not tested: {why}"),
            };
        }
        let (probe, seconds) = (&self.probe, self.took.as_secs_f64());
        let _ = match &self.failure {
            None => writeln!(text, "probe {probe}: passed in {seconds:.2} s"),
            Some(Failure { step, error }) => writeln!(
                text,
                "probe {probe}: failed at {step} after {seconds:.2} s: {error}\nwhat to do: {}",
                step.advice()
            ),
        };
        if self.leftovers > 0 {
            let _ = writeln!(text, "deleted {} message(s) that earlier runs left", self.leftovers);
        }
        text
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        let step =
            |(step, took): &(Step, Duration)| json!({ "step": step.name(), "seconds": took.as_secs_f64() });
        let failure = |failure: &Failure| json!({ "step": failure.step.name(), "error": failure.error, "advice": failure.step.advice() });
        json!({
            "probe": self.probe,
            "id": self.id,
            "success": self.failure.is_none(),
            "seconds": self.took.as_secs_f64(),
            "steps": self.steps.iter().map(step).collect::<Vec<_>>(),
            "failure": self.failure.as_ref().map(failure),
            "proxy_ports": self.proxy_ports.iter().map(proxy_port_json).collect::<Vec<_>>(),
            "leftovers_deleted": self.leftovers,
        })
    }

    /// Prometheus text format 0.0.4, which node_exporter and Pushgateway read. `last_success` is
    /// the time that an earlier run reported, in seconds since 1970.
    #[must_use]
    pub fn metrics(&self, last_success: Option<f64>) -> String {
        let mut text = Exposition { probe: &self.probe, text: String::new() };
        let ended = self.ended.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let passed = self.failure.is_none();
        text.gauge(
            "injector_probe_success",
            "1 if the last roundtrip passed, else 0",
            f64::from(u8::from(passed)),
        );
        text.gauge("injector_probe_seconds", "Duration of the last roundtrip", self.took.as_secs_f64());
        text.family("injector_probe_step_seconds", "Duration of each step that the last roundtrip ran");
        for (step, took) in &self.steps {
            text.sample("injector_probe_step_seconds", Some(*step), took.as_secs_f64());
        }
        text.family(
            "injector_probe_step_failed",
            "1 for the step at which the last roundtrip failed, else 0",
        );
        for step in Step::ALL {
            let failed = self.failed(step);
            text.sample("injector_probe_step_failed", Some(step), f64::from(u8::from(failed)));
        }
        text.ports(
            "injector_probe_proxy_port_open",
            "1 if the port answered a PROXY header from this host, else 0",
            &self.proxy_ports,
            ProxyPort::is_open,
        );
        text.ports(
            "injector_probe_proxy_port_relays",
            "1 if it accepted a recipient in a foreign domain after that, else 0",
            &self.proxy_ports,
            ProxyPort::relays,
        );
        let leftovers = u32::try_from(self.leftovers).unwrap_or(u32::MAX);
        text.gauge(
            "injector_probe_leftovers_deleted",
            "Messages of earlier roundtrips that the last one deleted",
            f64::from(leftovers),
        );
        text.gauge(
            "injector_probe_last_run_timestamp_seconds",
            "When the last roundtrip ended, since 1970",
            ended,
        );
        if let Some(at) = if passed { Some(ended) } else { last_success } {
            text.gauge(LAST_SUCCESS, "When a roundtrip last passed, since 1970", at);
        }
        text.text
    }
}

/// The last success that the file of an earlier run reports.
pub(super) fn last_success(exposition: &str) -> Option<f64> {
    exposition.lines().find_map(|line| line.strip_prefix(LAST_SUCCESS)?.rsplit_once(' ')?.1.parse().ok())
}

/// All samples are gauges with the probe's name. Names of probes and steps need no escapes.
struct Exposition<'a> {
    probe: &'a str,
    text: String,
}

impl Exposition<'_> {
    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, help);
        self.sample(name, None, value);
    }

    fn family(&mut self, name: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} gauge\n");
    }

    /// One sample for each port that was tested.
    fn ports(&mut self, name: &str, help: &str, ports: &[ProxyPort], is: impl Fn(&ProxyPort) -> bool) {
        let tried: Vec<_> = ports.iter().filter(|port| port.addresses.is_ok()).collect();
        if tried.is_empty() {
            return;
        }
        self.family(name, help);
        for port in tried {
            let server = port.server.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let value = u8::from(is(port));
            let _ = writeln!(self.text, "{name}{{probe=\"{}\",proxy_port=\"{server}\"}} {value}", self.probe);
        }
    }

    fn sample(&mut self, name: &str, step: Option<Step>, value: f64) {
        let step = step.map(|step| format!(",step=\"{step}\"")).unwrap_or_default();
        let _ = writeln!(self.text, "{name}{{probe=\"{}\"{step}}} {value}", self.probe);
    }
}

fn proxy_port_json(port: &ProxyPort) -> serde_json::Value {
    let address = |(address, exposure): &(SocketAddr, Exposure)| {
        let (said, relay) = match exposure {
            Exposure::Closed(how) => (how, None),
            Exposure::Open { said, relay } => (said, relay.as_ref()),
        };
        json!({
            "address": address,
            "open": matches!(exposure, Exposure::Open { .. }),
            "reply": said,
            "relays": match relay {
                Some(Relay::Accepted(_)) => Some(true),
                Some(Relay::Refused(_)) => Some(false),
                Some(Relay::Unknown(_)) | None => None,
            },
        })
    };
    let (addresses, error) = match &port.addresses {
        Ok(addresses) => (addresses.iter().map(address).collect::<Vec<_>>(), None),
        Err(why) => (Vec::new(), Some(why)),
    };
    json!({ "proxy_port": port.server, "addresses": addresses, "error": error })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn report(failure: Option<Failure>) -> Report {
        Report {
            probe: "mail".to_owned(),
            id: "1".to_owned(),
            ended: UNIX_EPOCH + Duration::from_millis(1_800_000_000_500),
            took: Duration::from_millis(1250),
            steps: vec![
                (Step::SmtpConnect, Duration::from_millis(2)),
                (Step::SmtpGreeting, Duration::from_secs(1)),
            ],
            failure,
            proxy_ports: Vec::new(),
            leftovers: 2,
        }
    }

    fn failed() -> Report {
        report(Some(Failure { step: Step::SmtpGreeting, error: "it \"hung\" up".to_owned() }))
    }

    #[test]
    fn a_success_updates_the_last_success() {
        let text = report(None).metrics(Some(7.0));
        for line in [
            "injector_probe_success{probe=\"mail\"} 1",
            "injector_probe_seconds{probe=\"mail\"} 1.25",
            "injector_probe_step_seconds{probe=\"mail\",step=\"smtp_greeting\"} 1",
            "injector_probe_step_failed{probe=\"mail\",step=\"smtp_greeting\"} 0",
            "injector_probe_last_run_timestamp_seconds{probe=\"mail\"} 1800000000.5",
            "injector_probe_last_success_timestamp_seconds{probe=\"mail\"} 1800000000.5",
        ] {
            assert!(text.lines().any(|have| have == line), "no {line} in\n{text}");
        }
        assert_eq!(last_success(&text), Some(1_800_000_000.5));
    }

    #[test]
    fn a_failure_names_its_step_and_keeps_the_last_success() {
        let text = failed().metrics(Some(7.0));
        for line in [
            "injector_probe_success{probe=\"mail\"} 0",
            "injector_probe_step_failed{probe=\"mail\",step=\"smtp_greeting\"} 1",
            "injector_probe_step_failed{probe=\"mail\",step=\"arrival\"} 0",
            "injector_probe_last_success_timestamp_seconds{probe=\"mail\"} 7",
        ] {
            assert!(text.lines().any(|have| have == line), "no {line} in\n{text}");
        }
        assert_eq!(last_success(&text), Some(7.0));
        assert!(!failed().metrics(None).contains(LAST_SUCCESS), "there never was one");
        let printed = failed().text();
        assert!(
            printed.contains("failed at smtp_greeting after 1.25 s: it \"hung\" up\nwhat to do: "),
            "{printed}"
        );
        assert_eq!(failed().json()["failure"]["step"], "smtp_greeting");
    }

    fn open() -> ProxyPort {
        let relay = Some(Relay::Accepted("250 2.1.5 Ok".to_owned()));
        let open = Exposure::Open { said: "\"220 mail\"".to_owned(), relay };
        let closed = Exposure::Closed("no answer".to_owned());
        let addresses = vec![
            ("[2001:db8::10]:2525".parse().unwrap(), closed),
            ("192.0.2.10:2525".parse().unwrap(), open),
        ];
        ProxyPort { server: "mail.example:2525".to_owned(), addresses: Ok(addresses) }
    }

    #[test]
    fn an_open_proxy_port_is_a_step_and_two_gauges() {
        let closed = Exposure::Closed("connection refused".to_owned());
        let closed_port = ProxyPort {
            server: "192.0.2.10:10993".to_owned(),
            addresses: Ok(vec![("192.0.2.10:10993".parse().unwrap(), closed)]),
        };
        let failure = Failure { step: Step::ProxyPort, error: open().failure().unwrap() };
        let mut report = Report { proxy_ports: vec![open(), closed_port], ..report(Some(failure)) };
        report.steps.push((Step::ProxyPort, Duration::from_secs(1)));
        let metrics = report.metrics(None);
        for line in [
            "injector_probe_step_failed{probe=\"mail\",step=\"proxy_port\"} 1",
            "injector_probe_proxy_port_open{probe=\"mail\",proxy_port=\"mail.example:2525\"} 1",
            "injector_probe_proxy_port_open{probe=\"mail\",proxy_port=\"192.0.2.10:10993\"} 0",
            "injector_probe_proxy_port_relays{probe=\"mail\",proxy_port=\"mail.example:2525\"} 1",
        ] {
            assert!(metrics.lines().any(|have| have == line), "no {line} in\n{metrics}");
        }
        let text = report.text();
        for part in [
            "  FAILED  proxy_port ",
            "mail.example:2525 ([2001:db8::10]:2525) is closed to this host: no answer",
            "failed at proxy_port after 1.25 s: mail.example:2525 (192.0.2.10:2525) answers a header with the source 127.0.0.1 from this host",
            "OPEN RELAY",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        let json = report.json();
        assert_eq!(json["proxy_ports"][0]["addresses"][1]["relays"], true);
        assert_eq!(json["proxy_ports"][1]["addresses"][0]["open"], false);
        // It is reported in addition to another failure.
        report.failure = failed().failure;
        let metrics = report.metrics(None);
        assert_eq!(
            metrics.lines().filter(|line| line.contains("step_failed{") && line.ends_with(" 1")).count(),
            2
        );
    }

    #[test]
    fn text_of_a_success_a_failure_and_an_open_port() {
        let failure = Failure { step: Step::ProxyPort, error: open().failure().unwrap() };
        let untested =
            ProxyPort { server: "mail.example:10993".to_owned(), addresses: Err("no route".to_owned()) };
        let mut exposed = Report { proxy_ports: vec![open(), untested], ..report(Some(failure)) };
        exposed.steps.push((Step::ProxyPort, Duration::from_secs(1)));
        let texts = [report(None), failed(), exposed].map(|report| report.text());
        insta::assert_snapshot!(texts.join("\n"));
    }

    #[test]
    fn the_documentation_lists_exactly_what_the_probe_exposes() {
        let text = Report { proxy_ports: vec![open()], ..report(None) }.metrics(None);
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let exposed: BTreeSet<_> = samples
            .map(|line| {
                let (name, rest) = line.split_once('{').unwrap();
                let labels: Vec<_> =
                    rest.split(',').filter_map(|label| Some(label.split_once('=')?.0)).collect();
                (name.to_owned(), labels.join(", "))
            })
            .collect();
        let document = include_str!("../../../docs/metrics.md");
        let documented: BTreeSet<_> = document
            .lines()
            .filter_map(|line| line.strip_prefix("| `"))
            .filter(|row| row.starts_with("injector_probe_"))
            .map(|row| {
                let cells: Vec<_> = row.split('|').map(str::trim).collect();
                (cells[0].trim_end_matches('`').to_owned(), cells[2].replace('`', ""))
            })
            .collect();
        assert_eq!(documented, exposed);
        for step in Step::ALL {
            assert!(document.contains(&format!("`{step}`")), "{step} is not in docs/metrics.md");
        }
    }
}
