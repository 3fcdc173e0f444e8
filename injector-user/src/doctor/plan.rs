//! Which probe comes next, given the observations: as few connections as distinguish the faults.

use super::observation::{Client, Dialogue, Family, Observation, Outcome, Probe, Step, Target};
use crate::{config::ProxyVersion, protocol::Protocol};

/// The next step; `None` if enough is known.
#[must_use]
pub fn next(target: &Target, seen: &[Observation]) -> Option<Step> {
    // If this host cannot connect, more probes find nothing more. Its other addresses may be
    // filtered, as they should be.
    let of_backend = |one: &&Observation| one.step.from.is_none() && one.step.probe.is_to_backend();
    if seen.iter().filter(of_backend).any(Observation::failed_to_connect) {
        return None;
    }
    wanted(target, seen).into_iter().find(|step| !seen.iter().any(|observation| observation.step == *step))
}

/// All steps that the observations require, in order. Further observations only append to it.
fn wanted(target: &Target, seen: &[Observation]) -> Vec<Step> {
    let version = target.receiver.version;
    if target.untrusted {
        let family = Family::of(target.address.ip());
        let mut steps = vec![here(header(version, family))];
        if answered(seen, here(header(version, family))) {
            steps.extend(claims(target, seen, family));
        }
        return steps;
    }
    let bare = if target.is_tls() { Probe::Tls } else { Probe::NoHeader };
    let headers = Family::ALL.map(|family| header(version, family));
    let mut steps = vec![here(bare), here(headers[0])];
    // If a server sends nothing after a header, the family of the header's addresses does not
    // matter.
    let silent = |one: &Observation| one.step == here(headers[0]) && one.outcome == Outcome::Silent;
    let headers = if seen.iter().any(silent) { &headers[..1] } else { &headers[..] };
    steps.extend(headers.iter().skip(1).map(|probe| here(*probe)));
    if !headers.iter().all(|probe| seen.iter().any(|one| one.step == here(*probe))) {
        return steps;
    }
    let accepts = |family: &Family| answered(seen, here(header(version, *family)));
    match Family::ALL.into_iter().find(accepts) {
        Some(family) => {
            let probe = header(version, family);
            for other in &target.other_sources {
                let step = Step { probe, from: Some(*other) };
                steps.push(step);
                if answered(seen, step) {
                    // One is proof enough.
                    break;
                }
            }
            steps.extend(claims(target, seen, family));
            steps.extend(standard_port(target, seen, family));
        }
        None => {
            steps.push(here(header(target.other_version(), Family::V4)));
            if version == ProxyVersion::V2 && target.has_tlvs() {
                steps.push(here(Probe::Header { version, family: Family::V4, tlvs: false }));
            }
            // A server that closes on a ClientHello either expects a header, or does not trust this
            // host.
            if target.is_tls() && !answered(seen, here(bare)) {
                steps.push(here(Probe::NoHeader));
            }
        }
    }
    steps
}

/// A header with the source localhost. If the server allows that client something, another with an
/// untrusted source, to distinguish "for localhost" from "for all".
fn claims(target: &Target, seen: &[Observation], family: Family) -> Vec<Step> {
    if target.protocol == Protocol::Plain {
        return Vec::new();
    }
    let claim = |client| here(Probe::Claim { version: target.receiver.version, family, client });
    let localhost = claim(Client::Localhost);
    let allowed =
        |one: &Observation| one.step == localhost && one.dialogue.as_ref().is_some_and(Dialogue::is_allowed);
    let mut steps = vec![localhost];
    if seen.iter().any(allowed) {
        steps.push(claim(Client::Documentation));
    }
    steps
}

/// Whether the standard port, which other clients use, requires a header too.
fn standard_port(target: &Target, seen: &[Observation], family: Family) -> Vec<Step> {
    if target.is_on_standard_port() || target.protocol.standard_port().is_none() {
        return Vec::new();
    }
    let bare = here(Probe::StandardPort { header: None });
    let mut steps = vec![bare];
    if seen.iter().any(|one| one.step == bare && !one.failed_to_connect() && !one.answered()) {
        steps.push(here(Probe::StandardPort { header: Some(family) }));
    }
    steps
}

const fn here(probe: Probe) -> Step {
    Step { probe, from: None }
}

const fn header(version: ProxyVersion, family: Family) -> Probe {
    Probe::Header { version, family, tlvs: true }
}

fn answered(seen: &[Observation], step: Step) -> bool {
    seen.iter().any(|observation| observation.step == step && observation.answered())
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, time::Duration};

    use super::{
        super::observation::{Greeting, Relay},
        *,
    };
    use crate::{
        config::Receiver,
        doctor::fixtures::{closed, target},
        protocol::Protocol,
    };

    const OTHERS: [IpAddr; 2] = [
        IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)),
        IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2)),
    ];

    /// The probes that the plan makes if `outcome` gives the outcome of each.
    fn walk(target: &Target, outcome: impl Fn(Step) -> Outcome) -> Vec<String> {
        walk_with(target, outcome, |_| None)
    }

    fn walk_with(
        target: &Target,
        outcome: impl Fn(Step) -> Outcome,
        dialogue: impl Fn(Step) -> Option<Dialogue>,
    ) -> Vec<String> {
        let mut seen = Vec::new();
        let mut names = Vec::new();
        while let Some(step) = next(target, &seen) {
            names.push(match step.from {
                Some(from) => format!("{} from {from}", step.probe.code()),
                None => step.probe.code(),
            });
            let outcome = outcome(step);
            seen.push(Observation {
                step,
                outcome,
                after: Duration::ZERO,
                tls: None,
                dialogue: dialogue(step),
            });
            assert!(seen.len() < 20, "{names:?}");
        }
        names
    }

    fn greets_with_header(step: Step) -> Outcome {
        match step.probe {
            Probe::Header { .. } | Probe::Claim { .. } => Outcome::Greeted(Greeting::default()),
            Probe::StandardPort { header: None } => Outcome::Greeted(Greeting::default()),
            _ => closed(),
        }
    }

    #[test]
    fn a_correct_backend_gets_three_probes_one_per_other_source_localhost_and_the_standard_port() {
        let mut smtp = target(Protocol::Smtp);
        let three = ["silence", "header_v2_ipv4", "header_v2_ipv6"];
        let localhost = ["header_v2_ipv4_localhost", "standard_port"];
        assert_eq!(walk(&smtp, greets_with_header), [&three[..], &localhost].concat());
        smtp.other_sources = OTHERS.to_vec();
        let filtered = |step: Step| match step.from {
            Some(_) => Outcome::NoAnswer,
            None => greets_with_header(step),
        };
        let others = ["header_v2_ipv4 from 192.0.2.1", "header_v2_ipv4 from 192.0.2.2"];
        assert_eq!(walk(&smtp, filtered), [&three[..], &others, &localhost].concat());
        // Protocol "plain" has no dialogue.
        let plain = Target { protocol: Protocol::Plain, ..target(Protocol::Plain) };
        assert_eq!(walk(&plain, greets_with_header), three);
    }

    #[test]
    fn a_standard_port_that_does_not_answer_gets_a_header() {
        let answers = |standard: fn() -> Outcome| {
            move |step: Step| match step.probe {
                Probe::StandardPort { header: None } => standard(),
                _ => greets_with_header(step),
            }
        };
        let smtp = target(Protocol::Smtp);
        assert_eq!(
            walk(&smtp, answers(|| Outcome::Silent))[4..],
            ["standard_port", "standard_port_header_ipv4"]
        );
        assert_eq!(walk(&smtp, answers(|| Outcome::Refused))[4..], ["standard_port"]);
        let on_it = Target { address: "10.25.0.2:25".parse().unwrap(), ..target(Protocol::Smtp) };
        assert_eq!(walk(&on_it, greets_with_header).len(), 4);
    }

    #[test]
    fn permissions_of_localhost_are_tested_for_another_client() {
        let relays = |_| Some(Dialogue::Relay(Relay::Accepted(String::new())));
        let both = ["header_v2_ipv4_localhost", "header_v2_ipv4_documentation"];
        let smtp = target(Protocol::Smtp);
        assert_eq!(walk_with(&smtp, greets_with_header, relays)[3..5], both);
        let refuses = |_| Some(Dialogue::Relay(Relay::Refused(String::new())));
        assert_eq!(walk_with(&smtp, greets_with_header, refuses)[3..4], both[..1]);
        let untrusted = Target { untrusted: true, ..target(Protocol::Smtp) };
        assert_eq!(walk_with(&untrusted, greets_with_header, relays)[1..], both);
        // The server rejects headers with IPv4 addresses.
        let ipv6_only = |step: Step| match step.probe {
            Probe::Header { family: Family::V4, .. } => closed(),
            _ => greets_with_header(step),
        };
        assert!(walk(&smtp, ipv6_only).contains(&"header_v2_ipv6_localhost".to_owned()));
    }

    #[test]
    fn one_trusted_other_source_is_enough() {
        let mut smtp = target(Protocol::Smtp);
        smtp.other_sources = OTHERS.to_vec();
        let names = walk(&smtp, greets_with_header);
        assert_eq!(names[3..5], ["header_v2_ipv4 from 192.0.2.1", "header_v2_ipv4_localhost"]);
    }

    #[test]
    fn an_unreachable_backend_gets_one_probe() {
        assert_eq!(walk(&target(Protocol::Smtp), |_| Outcome::Refused), ["silence"]);
        assert_eq!(walk(&target(Protocol::Imaps), |_| Outcome::NoAnswer), ["tls"]);
    }

    #[test]
    fn a_rejected_header_is_followed_by_the_other_version() {
        let mut imaps = target(Protocol::Imaps);
        let expected = ["tls", "header_v2_ipv4", "header_v2_ipv6", "header_v1_ipv4", "silence"];
        assert_eq!(walk(&imaps, |_| closed()), expected);
        imaps.receiver = Receiver { crc32c: true, ..Receiver::default() };
        let names = walk(&imaps, |_| closed());
        assert_eq!(names[4..], ["header_v2_ipv4_without_tlvs", "silence"]);
        imaps.receiver = Receiver { version: ProxyVersion::V1, ..Receiver::default() };
        let names = walk(&imaps, |_| closed());
        assert_eq!(names[1..], ["header_v1_ipv4", "header_v1_ipv6", "header_v2_ipv4", "silence"]);
    }

    #[test]
    fn a_silent_backend_gets_one_header_of_each_version() {
        let names = walk(&target(Protocol::Imap), |_| Outcome::Silent);
        assert_eq!(names, ["silence", "header_v2_ipv4", "header_v1_ipv4"]);
    }

    #[test]
    fn an_untrusted_host_sends_one_header_and_one_more_if_trusted() {
        let mut smtp = target(Protocol::Smtp);
        smtp.untrusted = true;
        smtp.other_sources = OTHERS.to_vec();
        assert_eq!(walk(&smtp, greets_with_header), ["header_v2_ipv4", "header_v2_ipv4_localhost"]);
        assert_eq!(walk(&smtp, |_| Outcome::NoAnswer), ["header_v2_ipv4"]);
        smtp.address = "[fd25::2]:2525".parse().unwrap();
        assert_eq!(walk(&smtp, |_| closed()), ["header_v2_ipv6"]);
    }
}
