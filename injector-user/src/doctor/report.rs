//! The report of `injector doctor`, as text and JSON.

use std::{fmt::Write as _, net::IpAddr, net::SocketAddr};

use serde_json::{Value, json};

use super::{
    diagnosis::{Finding, describe},
    observation::{Dialogue, Observation, Outcome, Relay, Target},
    server::{self, Server},
};
use crate::{config::ProxyVersion, protocol::Protocol};

/// All listeners that were examined.
#[derive(Debug)]
pub struct Report {
    /// In the order of the configuration.
    pub listeners: Vec<ListenerReport>,
    /// Findings on the running daemon's guard.
    pub guard: Vec<Finding>,
    /// Examined from a host that is not the injector's.
    pub untrusted: bool,
}

/// One listener.
#[derive(Debug)]
pub struct ListenerReport {
    /// Its name.
    pub name: String,
    /// What is spoken on it.
    pub protocol: Protocol,
    /// The header it sends.
    pub version: ProxyVersion,
    /// Findings that apply to all of its backends.
    pub findings: Vec<Finding>,
    /// Its backends, in order.
    pub backends: Vec<BackendReport>,
}

/// One backend.
#[derive(Debug)]
pub struct BackendReport {
    /// The backend as configured.
    pub name: String,
    /// Findings that apply to all of its addresses.
    pub findings: Vec<Finding>,
    /// The report on each of its addresses.
    pub addresses: Vec<AddressReport>,
}

/// One address of a backend.
#[derive(Debug)]
pub struct AddressReport {
    /// The address.
    pub address: SocketAddr,
    /// The source address that it sees.
    pub source: Option<IpAddr>,
    /// What it is.
    pub server: Server,
    /// The observations, in order.
    pub observations: Vec<Observation>,
    /// What follows from it.
    pub findings: Vec<Finding>,
}

impl AddressReport {
    pub(super) fn new(target: &Target, observations: Vec<Observation>, findings: Vec<Finding>) -> Self {
        Self {
            address: target.address,
            source: target.source,
            server: server::identify(target, &observations),
            observations,
            findings,
        }
    }
}

impl Report {
    /// Everything found.
    fn findings(&self) -> impl Iterator<Item = &Finding> {
        let of_listeners = self.listeners.iter().flat_map(|listener| {
            let backends = listener.backends.iter().flat_map(|backend| {
                backend.findings.iter().chain(backend.addresses.iter().flat_map(|address| &address.findings))
            });
            listener.findings.iter().chain(backends)
        });
        self.guard.iter().chain(of_listeners)
    }

    /// How many faults there are.
    #[must_use]
    pub fn faults(&self) -> usize {
        self.findings().filter(|finding| finding.fault).count()
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        for listener in &self.listeners {
            let _ = writeln!(out, "{} ({}, header {})", listener.name, listener.protocol, listener.version);
            write_findings(&mut out, "  ", &listener.findings);
            for backend in &listener.backends {
                write_backend(&mut out, backend, self.untrusted);
            }
            let _ = writeln!(out);
        }
        if !self.guard.is_empty() {
            let _ = writeln!(out, "guard");
            write_findings(&mut out, "  ", &self.guard);
            let _ = writeln!(out);
        }
        let addresses = self.listeners.iter().flat_map(|listener| &listener.backends);
        let addresses = addresses.map(|backend| backend.addresses.len()).sum();
        let _ = writeln!(
            out,
            "{}, {}",
            count(addresses, "address", "addresses"),
            match self.faults() {
                0 => "no fault".to_owned(),
                faults => count(faults, "fault", "faults"),
            }
        );
        out
    }

    /// For programs; `docs/doctor.md` has the fields.
    #[must_use]
    pub fn json(&self) -> Value {
        let listeners: Vec<_> = self.listeners.iter().map(listener_json).collect();
        json!({
            "ok": self.faults() == 0,
            "untrusted": self.untrusted,
            "listeners": listeners,
            "guard": findings_json(&self.guard),
        })
    }
}

fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

fn write_backend(out: &mut String, backend: &BackendReport, untrusted: bool) {
    if !backend.findings.is_empty() {
        let _ = writeln!(out, "  {}", backend.name);
        write_findings(out, "    ", &backend.findings);
    }
    for address in &backend.addresses {
        let shown = address.address.to_string();
        let name = if backend.name == shown { String::new() } else { format!("{}: ", backend.name) };
        let source = address.source.map(|source| format!(", which sees {source}")).unwrap_or_default();
        let _ = writeln!(out, "  {name}{shown}{source} ({})", address.server);
        for one in &address.observations {
            let from = one.step.from.map(|from| format!(" from {from}")).unwrap_or_default();
            let _ = writeln!(out, "    {:<38}  {}", format!("{}{from}", one.step.probe), describe(one));
        }
        write_findings(out, "    ", &address.findings);
        if !address.findings.iter().any(|finding| finding.fault) {
            let summary = if untrusted { "closed to this host" } else { "ok" };
            let _ = writeln!(out, "    {summary}");
        }
    }
}

fn write_findings(out: &mut String, indent: &str, findings: &[Finding]) {
    for finding in findings {
        let kind = if finding.fault { "FAULT" } else { "note" };
        let _ = writeln!(out, "{indent}{kind} {}: {}", finding.verdict.code(), finding.message);
        for change in &finding.changes {
            let _ = writeln!(out, "{indent}  change {}:", change.place);
            for line in &change.lines {
                let _ = writeln!(out, "{indent}      {line}");
            }
        }
    }
}

fn listener_json(listener: &ListenerReport) -> Value {
    let backends: Vec<_> = listener
        .backends
        .iter()
        .map(|backend| {
            json!({
                "backend": backend.name,
                "findings": findings_json(&backend.findings),
                "addresses": backend.addresses.iter().map(address_json).collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({
        "name": listener.name,
        "protocol": listener.protocol.name(),
        "version": listener.version.to_string(),
        "findings": findings_json(&listener.findings),
        "backends": backends,
    })
}

fn address_json(address: &AddressReport) -> Value {
    let observations: Vec<_> = address
        .observations
        .iter()
        .map(|one| {
            json!({
                "probe": one.step.probe.code(),
                "from": one.step.from,
                "outcome": outcome_code(&one.outcome),
                "answered": one.answered(),
                "reply": one.said(),
                "tls": one.tls,
                "relay": relay_json(one.dialogue.as_ref()),
                "clear_text_login": match one.dialogue {
                    Some(Dialogue::ClearTextLogin(login)) => Some(login),
                    _ => None,
                },
                "seconds": one.after.as_secs_f64(),
            })
        })
        .collect();
    json!({
        "address": address.address,
        "source": address.source,
        "server": address.server.to_string(),
        "ok": !address.findings.iter().any(|finding| finding.fault),
        "observations": observations,
        "findings": findings_json(&address.findings),
    })
}

fn findings_json(findings: &[Finding]) -> Vec<Value> {
    let change = |change: &super::advice::Change| json!({ "place": change.place, "lines": change.lines });
    findings
        .iter()
        .map(|finding| {
            json!({
                "verdict": finding.verdict.code(),
                "fault": finding.fault,
                "message": finding.message,
                "changes": finding.changes.iter().map(change).collect::<Vec<_>>(),
            })
        })
        .collect()
}

fn relay_json(dialogue: Option<&Dialogue>) -> Option<Value> {
    let Some(Dialogue::Relay(relay)) = dialogue else { return None };
    let (answer, said) = match relay {
        Relay::Accepted(said) => ("accepted", said),
        Relay::Refused(said) => ("refused", said),
        Relay::Unknown(why) => ("unknown", why),
    };
    Some(json!({ "answer": answer, "reply": said }))
}

const fn outcome_code(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Refused => "refused",
        Outcome::NoAnswer => "no_answer",
        Outcome::NoSourcePorts => "no_source_ports",
        Outcome::Unreachable(_) => "unreachable",
        Outcome::Greeted(_) => "greeted",
        Outcome::Misunderstood { .. } => "misunderstood",
        Outcome::Rejected(_) => "rejected",
        Outcome::Strange(_) => "strange",
        Outcome::Alert(_) => "alert",
        Outcome::Closed { .. } => "closed",
        Outcome::Silent => "silent",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{
        diagnosis::{Verdict, findings},
        fixtures::{away, closed, dialogue, greeted, refuses_to_relay, relays, seen, target},
        observation::{Client, Family, Probe},
    };

    const fn header(family: Family) -> Probe {
        Probe::Header { version: ProxyVersion::V2, family, tlvs: true }
    }

    const fn client(client: Client) -> Probe {
        Probe::Claim { version: ProxyVersion::V2, family: Family::V4, client }
    }

    /// A listener with one backend, of which these observations were made.
    fn listener(protocol: Protocol, untrusted: bool, observations: Vec<Observation>) -> ListenerReport {
        let target = Target { untrusted, ..target(protocol) };
        let findings = findings(&target, &observations, &["10.25.0.1".parse().unwrap()]);
        let addresses = vec![AddressReport::new(&target, observations, findings)];
        ListenerReport {
            name: protocol.name().to_owned(),
            protocol,
            version: ProxyVersion::V2,
            findings: Vec::new(),
            backends: vec![BackendReport {
                name: "mail.internal:2525".to_owned(),
                findings: Vec::new(),
                addresses,
            }],
        }
    }

    fn report() -> Report {
        let smtpd = || away("421 4.3.0 mail.example.test Server local error");
        let banner = || greeted("220 mail.example.test ESMTP Postfix");
        let relaying = vec![
            seen(Probe::NoHeader, smtpd(), 51),
            seen(header(Family::V4), banner(), 0),
            seen(header(Family::V6), banner(), 0),
            dialogue(client(Client::Localhost), relays()),
            dialogue(client(Client::Documentation), refuses_to_relay()),
        ];
        let untrusting = vec![
            seen(Probe::Tls, Outcome::Closed { reset: true }, 3),
            seen(header(Family::V4), Outcome::Closed { reset: true }, 1),
            seen(header(Family::V6), Outcome::Closed { reset: true }, 0),
            seen(Probe::NoHeader, closed(), 0),
        ];
        Report {
            listeners: vec![
                listener(Protocol::Submission, false, relaying),
                listener(Protocol::Imaps, false, untrusting),
            ],
            guard: vec![Finding::fault(
                Verdict::GuardIncomplete,
                "eth0: no program at the ingress",
                Vec::new(),
            )],
            untrusted: false,
        }
    }

    #[test]
    fn text_lists_observations_findings_and_changes() {
        insta::assert_snapshot!(report().text());
    }

    #[test]
    fn json_has_the_documented_fields() {
        insta::assert_snapshot!(format!("{:#}", report().json()));
    }

    #[test]
    fn text_from_an_untrusted_host_reports_closed_ports() {
        let reset = vec![seen(header(Family::V4), Outcome::NoAnswer, 20)];
        let report = Report {
            listeners: vec![listener(Protocol::Smtp, true, reset)],
            guard: Vec::new(),
            untrusted: true,
        };
        insta::assert_snapshot!(report.text());
    }
}
