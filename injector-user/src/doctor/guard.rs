//! Whether the running daemon's guard drops packets of banned sources. The daemon knows that: it is asked
//! over its control socket.

use super::diagnosis::{Finding, Verdict};
use crate::{
    config::Config,
    control::{
        Request,
        client::{self, ClientError},
        wire::{Answer, GuardStatus},
    },
};

/// What is known of the guard of a running daemon.
#[derive(Debug)]
enum Seen {
    /// The configuration has no control socket.
    NoSocket,
    /// No daemon answers, for this reason.
    NoAnswer(String),
    /// What the daemon says of it; `None` if it has none.
    Answered(Option<GuardStatus>),
}

/// Asks the daemon, if the configuration has `[guard]`, and returns what is wrong.
pub(super) fn examine(config: &Config) -> Vec<Finding> {
    if config.guard.is_none() {
        return Vec::new();
    }
    let seen = match config.admin.as_ref().map(|admin| client::send(&admin.socket, &Request::Status)) {
        None => Seen::NoSocket,
        Some(Ok(Answer::Status(status))) => Seen::Answered(status.guard),
        Some(Ok(_)) => Seen::NoAnswer("the answer is to another request".to_owned()),
        Some(Err(ClientError::Connect { path, error })) => {
            Seen::NoAnswer(format!("{}: {error}", path.display()))
        }
        Some(Err(error)) => Seen::NoAnswer(error.to_string()),
    };
    findings(seen)
}

fn findings(seen: Seen) -> Vec<Finding> {
    match seen {
        Seen::NoSocket => vec![Finding::note(
            Verdict::GuardUnknown,
            "whether the guard drops packets is not known: without [admin], the daemon cannot be asked",
        )],
        Seen::NoAnswer(why) => vec![Finding::note(
            Verdict::GuardUnknown,
            format!("whether the guard drops packets is not known: the daemon does not answer ({why})"),
        )],
        Seen::Answered(None) => vec![Finding::fault(
            Verdict::GuardOff,
            "the daemon runs without [guard], which the configuration has: restart it",
            Vec::new(),
        )],
        Seen::Answered(Some(status)) => {
            let fault = |text| Finding::fault(Verdict::GuardIncomplete, text, Vec::new());
            status.faults().into_iter().map(fault).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::EXAMPLE, control::wire::GuardDeviceStatus};

    fn codes(seen: Seen) -> Vec<(bool, &'static str)> {
        findings(seen).iter().map(|finding| (finding.fault, finding.verdict.code())).collect()
    }

    #[test]
    fn faults_are_what_a_running_daemon_reports() {
        assert_eq!(codes(Seen::NoSocket), [(false, "guard_unknown")]);
        assert_eq!(codes(Seen::NoAnswer("no such file".to_owned())), [(false, "guard_unknown")]);
        assert_eq!(codes(Seen::Answered(None)), [(true, "guard_off")]);
        let device = GuardDeviceStatus { name: "eth0".to_owned(), ..GuardDeviceStatus::default() };
        let good = GuardDeviceStatus { ingress: Some("tcx".to_owned()), ..device.clone() };
        let bad = GuardDeviceStatus { ingress_error: Some("no memory".to_owned()), ..device };
        let status = |devices| Seen::Answered(Some(GuardStatus { devices, ..GuardStatus::default() }));
        assert_eq!(codes(status(vec![good.clone()])), []);
        assert_eq!(codes(status(vec![good, bad])), [(true, "guard_incomplete")]);
    }

    #[test]
    fn a_configuration_without_guard_is_not_asked_about() {
        let config = |before: &str| Config::parse(&format!("{before}\n{EXAMPLE}"), "f.toml").unwrap();
        let admin = "[admin]\nsocket = \"/nonexistent/admin.sock\"";
        assert_eq!(examine(&config(admin)), []);
        let [finding] = &examine(&config(&format!("[guard]\n{admin}")))[..] else { panic!() };
        assert!(finding.message.contains("/nonexistent/admin.sock: No such file"), "{}", finding.message);
    }
}
