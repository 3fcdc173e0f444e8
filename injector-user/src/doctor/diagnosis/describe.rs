//! Observations in the report's text.

use crate::doctor::observation::{Dialogue, Observation, Outcome, Relay};

/// An observation in one line.
pub(in crate::doctor) fn describe(one: &Observation) -> String {
    let outcome = describe_outcome(one);
    match &one.dialogue {
        Some(dialogue) => format!("{outcome}; {}", describe_dialogue(dialogue)),
        None => outcome,
    }
}

fn describe_outcome(one: &Observation) -> String {
    let after = format!("after {:.1} s", one.after.as_secs_f32());
    let tls = one.tls.as_deref().map(|version| format!("{version}, ")).unwrap_or_default();
    match &one.outcome {
        Outcome::Refused => "connection refused".to_owned(),
        Outcome::NoAnswer => format!("no answer {after}"),
        Outcome::NoSourcePorts => "no source port of this host is left".to_owned(),
        Outcome::Unreachable(why) => why.clone(),
        Outcome::Greeted(greeting) => {
            let line: String = greeting.line.chars().take(60).collect();
            let more = if line.len() < greeting.line.len() { "…" } else { "" };
            let teaser = if greeting.teaser { ", the rest" } else { "" };
            format!("{tls}\"{line}{more}\"{teaser} {after}")
        }
        Outcome::Misunderstood { complaint, .. } if one.step.probe.is_bare() => {
            format!("{tls}greets and refuses commands: {complaint:?}")
        }
        Outcome::Misunderstood { complaint, .. } => format!("{tls}read as commands: {complaint:?}"),
        Outcome::Rejected(said) => format!("{tls}{said:?} {after}"),
        Outcome::Strange(said) => format!("{said:?} {after}"),
        Outcome::Alert(name) => format!("TLS alert {name} {after}"),
        Outcome::Closed { reset: true } => format!("{tls}reset {after}"),
        Outcome::Closed { reset: false } => format!("{tls}closed {after}"),
        Outcome::Silent => format!("{tls}nothing {after}"),
    }
}

/// The result of a dialogue, for the line of its observation.
fn describe_dialogue(dialogue: &Dialogue) -> String {
    match dialogue {
        Dialogue::Relay(Relay::Accepted(said)) => format!("relays: {said:?}"),
        Dialogue::Relay(Relay::Refused(said)) => format!("does not relay: {said:?}"),
        Dialogue::Relay(Relay::Unknown(why)) => format!("relaying unknown: {why}"),
        Dialogue::ClearTextLogin(true) => "accepts passwords in clear text".to_owned(),
        Dialogue::ClearTextLogin(false) => "accepts no passwords in clear text".to_owned(),
    }
}
