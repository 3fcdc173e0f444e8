//! Which probe comes next, given what was seen: as few connections as tell the faults apart.

use super::observation::{Family, Observation, Outcome, Probe, Step, Subject};
use crate::config::ProxyVersion;

/// The next step; `None` when enough is known.
#[must_use]
pub fn next(subject: &Subject, seen: &[Observation]) -> Option<Step> {
    // Who cannot connect learns nothing more by trying again; other sources of this host may be filtered as they should.
    if seen.iter().any(|observation| observation.unconnected() && observation.step.from.is_none()) {
        return None;
    }
    wanted(subject, seen).into_iter().find(|step| !seen.iter().any(|observation| observation.step == *step))
}

/// All steps that what was seen calls for, in order. What was seen only ever adds to it, at the end.
fn wanted(subject: &Subject, seen: &[Observation]) -> Vec<Step> {
    let version = subject.receiver.version;
    if subject.stranger {
        return vec![here(header(version, Family::of(subject.address.ip())))];
    }
    let bare = if subject.is_tls() { Probe::Tls } else { Probe::Silence };
    let headers = Family::ALL.map(|family| header(version, family));
    let mut steps = vec![here(bare), here(headers[0])];
    // Where a header is followed by silence, the family of its addresses is not the matter.
    let silent = |one: &Observation| one.step == here(headers[0]) && one.outcome == Outcome::Silent;
    let headers = if seen.iter().any(silent) { &headers[..1] } else { &headers[..] };
    steps.extend(headers.iter().skip(1).map(|probe| here(*probe)));
    if !headers.iter().all(|probe| seen.iter().any(|one| one.step == here(*probe))) {
        return steps;
    }
    let accepted = headers.iter().copied().find(|probe| answered(seen, here(*probe)));
    match accepted {
        Some(probe) => {
            for other in &subject.others {
                let step = Step { probe, from: Some(*other) };
                steps.push(step);
                if answered(seen, step) {
                    // One is proof enough.
                    break;
                }
            }
        }
        None => {
            steps.push(here(header(subject.other_version(), Family::V4)));
            if version == ProxyVersion::V2 && subject.has_tlvs() {
                steps.push(here(Probe::Header { version, family: Family::V4, tlvs: false }));
            }
            // A server that closes on a ClientHello may have wanted a header, or not this host at all.
            if subject.is_tls() && !answered(seen, here(bare)) {
                steps.push(here(Probe::Silence));
            }
        }
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

    use super::{super::observation::Greeting, *};
    use crate::{
        config::Receiver,
        doctor::samples::{closed, subject},
        protocol::Protocol,
    };

    const OTHERS: [IpAddr; 2] = [
        IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)),
        IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2)),
    ];

    /// The probes that are made when `outcome` says what comes of each.
    fn walk(subject: &Subject, outcome: impl Fn(Step) -> Outcome) -> Vec<String> {
        let mut seen = Vec::new();
        let mut names = Vec::new();
        while let Some(step) = next(subject, &seen) {
            names.push(match step.from {
                Some(from) => format!("{} from {from}", step.probe.code()),
                None => step.probe.code(),
            });
            let outcome = outcome(step);
            seen.push(Observation { step, outcome, after: Duration::ZERO, tls: None });
            assert!(seen.len() < 20, "{names:?}");
        }
        names
    }

    fn greets_with_header(step: Step) -> Outcome {
        match step.probe {
            Probe::Header { .. } => Outcome::Greeted(Greeting::default()),
            _ => closed(),
        }
    }

    #[test]
    fn a_sound_backend_costs_three_connections_and_one_for_each_other_source() {
        let mut smtp = subject(Protocol::Smtp);
        let three = ["silence", "header_v2_ipv4", "header_v2_ipv6"];
        assert_eq!(walk(&smtp, greets_with_header), three);
        smtp.others = OTHERS.to_vec();
        let filtered = |step: Step| match step.from {
            Some(_) => Outcome::NoAnswer,
            None => greets_with_header(step),
        };
        let four = ["header_v2_ipv4 from 192.0.2.1", "header_v2_ipv4 from 192.0.2.2"];
        assert_eq!(walk(&smtp, filtered), [&three[..], &four[..]].concat());
    }

    #[test]
    fn one_stranger_who_is_answered_is_enough() {
        let mut smtp = subject(Protocol::Smtp);
        smtp.others = OTHERS.to_vec();
        let last = walk(&smtp, greets_with_header).pop();
        assert_eq!(last.as_deref(), Some("header_v2_ipv4 from 192.0.2.1"));
    }

    #[test]
    fn a_backend_that_cannot_be_reached_is_left_alone() {
        assert_eq!(walk(&subject(Protocol::Smtp), |_| Outcome::Refused), ["silence"]);
        assert_eq!(walk(&subject(Protocol::Imaps), |_| Outcome::NoAnswer), ["tls"]);
    }

    #[test]
    fn what_refuses_the_header_is_asked_for_the_other_version() {
        let mut imaps = subject(Protocol::Imaps);
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
    fn silence_is_waited_for_once_for_each_version() {
        let names = walk(&subject(Protocol::Imap), |_| Outcome::Silent);
        assert_eq!(names, ["silence", "header_v2_ipv4", "header_v1_ipv4"]);
    }

    #[test]
    fn a_stranger_tries_one_header() {
        let mut smtp = subject(Protocol::Smtp);
        smtp.stranger = true;
        smtp.others = OTHERS.to_vec();
        assert_eq!(walk(&smtp, greets_with_header), ["header_v2_ipv4"]);
        smtp.address = "[fd25::2]:2525".parse().unwrap();
        assert_eq!(walk(&smtp, |_| closed()), ["header_v2_ipv6"]);
    }
}
