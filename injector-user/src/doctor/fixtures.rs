//! The behaviour of Postfix 3.7.11 and Dovecot 2.3.19.1, for tests.

use std::time::Duration;

use super::observation::{Dialogue, Greeting, Observation, Outcome, Probe, Relay, Step, Target};
use crate::{config::Receiver, protocol::Protocol};

/// A backend at 10.25.0.2:2525 of a listener with clients of both families.
pub(super) fn target(protocol: Protocol) -> Target {
    Target {
        listener: "test".to_owned(),
        protocol,
        receiver: Receiver::default(),
        ipv6_clients: true,
        ipv4_clients: true,
        backend: "10.25.0.2:2525".to_owned(),
        address: "10.25.0.2:2525".parse().unwrap(),
        source: Some("10.25.0.1".parse().unwrap()),
        other_sources: Vec::new(),
        untrusted: false,
    }
}

pub(super) const fn closed() -> Outcome {
    Outcome::Closed { reset: false }
}

pub(super) fn greeted(line: &str) -> Outcome {
    Outcome::Greeted(Greeting { line: line.to_owned(), teaser: false })
}

pub(super) fn misunderstood(line: &str, complaint: &str) -> Outcome {
    let greeting = Greeting { line: line.to_owned(), teaser: line.starts_with("220-") };
    Outcome::Misunderstood { greeting, complaint: complaint.to_owned() }
}

pub(super) fn away(line: &str) -> Outcome {
    Outcome::Rejected(line.to_owned())
}

/// An observation `tenths` of a second after the connection.
pub(super) fn seen(probe: Probe, outcome: Outcome, tenths: u64) -> Observation {
    let step = Step { probe, from: None };
    Observation { step, outcome, after: Duration::from_millis(tenths * 100), tls: None, dialogue: None }
}

/// An SMTP greeting, and the result of the dialogue after it.
pub(super) fn dialogue(probe: Probe, dialogue: Dialogue) -> Observation {
    Observation { dialogue: Some(dialogue), ..seen(probe, greeted("220 mail.example.test ESMTP Postfix"), 1) }
}

pub(super) fn relays() -> Dialogue {
    Dialogue::Relay(Relay::Accepted("250 2.1.5 Ok".to_owned()))
}

pub(super) fn refuses_to_relay() -> Dialogue {
    Dialogue::Relay(Relay::Refused("454 4.7.1 <relay-test@example.com>: Relay access denied".to_owned()))
}
