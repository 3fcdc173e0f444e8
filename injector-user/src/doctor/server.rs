//! Identifies the server by its replies and their timing, because the advice names its settings.

use std::{fmt, time::Duration};

use super::observation::{Greeting, Observation, Outcome, Probe, Target};
use crate::protocol::Protocol;

/// A mail server that the doctor can identify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// Postfix, with postscreen on the port.
    Postscreen,
    /// Postfix, with smtpd on the port.
    Smtpd,
    /// Postfix; postscreen may have the port, because it passes known clients on without a trace.
    Postfix,
    /// Dovecot.
    Dovecot,
    /// By its greeting; see the name in the advice.
    Exim,
    /// The same.
    OpenSmtpd,
    /// The same.
    Stalwart,
    /// The same.
    Cyrus,
    /// The same.
    Haraka,
    /// Not identified.
    Unknown,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Postscreen => "Postfix, postscreen",
            Self::Smtpd => "Postfix, smtpd",
            Self::Postfix => "Postfix",
            Self::Dovecot => "Dovecot",
            Self::Exim => "Exim",
            Self::OpenSmtpd => "OpenSMTPD",
            Self::Stalwart => "Stalwart",
            Self::Cyrus => "Cyrus",
            Self::Haraka => "Haraka",
            Self::Unknown => "server not recognised",
        })
    }
}

impl Server {
    /// Whether it expects a header by the sender's address, on all ports. Other clients then use the
    /// same ports without one.
    #[must_use]
    pub const fn is_by_sender(self) -> bool {
        matches!(self, Self::Exim | Self::Stalwart | Self::Haraka)
    }

    /// Whether it is Postfix.
    #[must_use]
    pub const fn is_postfix(self) -> bool {
        matches!(self, Self::Postscreen | Self::Smtpd | Self::Postfix)
    }
}

/// The reply of Postfix's smtpd to a missing or unusable header (smtpd_peer_from_haproxy in
/// `src/smtpd/smtpd_haproxy.c`).
pub const SMTPD_NO_HEADER: &str = "Server local error";
/// The reply of postscreen to the same (`src/postscreen/postscreen_haproxy.c`).
pub const POSTSCREEN_NO_HEADER: &str = "421 4.3.2 No system resources";

/// How long Dovecot waits for a header (`src/lib-master/master-service-haproxy.c`), with a margin
/// on either side.
const DOVECOT_HEADER_TIMEOUT: std::ops::Range<Duration> =
    Duration::from_millis(2500)..Duration::from_millis(4500);

/// Identifies the server by all observations.
#[must_use]
pub fn identify(target: &Target, seen: &[Observation]) -> Server {
    // Another program may have the standard port.
    let seen: Vec<_> = seen.iter().filter(|one| one.step.probe.is_to_backend()).cloned().collect();
    by_text(target, &seen).or_else(|| by_timing(target, &seen)).unwrap_or(Server::Unknown)
}

fn by_text(target: &Target, seen: &[Observation]) -> Option<Server> {
    let said = |words: &str| seen.iter().filter_map(Observation::said).any(|line| line.contains(words));
    let complained = |words: &str| {
        seen.iter().any(|one| matches!(&one.outcome, Outcome::Misunderstood { complaint, .. } if complaint.contains(words)))
    };
    let teased = seen.iter().any(|one| {
        let (Outcome::Greeted(greeting) | Outcome::Misunderstood { greeting, .. }) = &one.outcome else {
            return false;
        };
        let Greeting { teaser, .. } = greeting;
        *teaser
    });
    for (name, server) in [
        ("Dovecot", Server::Dovecot),
        ("Exim", Server::Exim),
        ("OpenSMTPD", Server::OpenSmtpd),
        ("Stalwart", Server::Stalwart),
        ("Cyrus", Server::Cyrus),
        ("Haraka", Server::Haraka),
    ] {
        if said(name) {
            return Some(server);
        }
    }
    if said(POSTSCREEN_NO_HEADER) || (teased && (said("Postfix") || complained("5.5.2 Error: "))) {
        return Some(Server::Postscreen);
    }
    if said("421 4.3.0") && said(SMTPD_NO_HEADER) {
        return Some(Server::Smtpd);
    }
    if said("Postfix") || complained("5.5.2 Error: bad syntax") {
        // postscreen does not support AUTH, so it is not used for submission.
        return Some(if target.protocol == Protocol::Smtp { Server::Postfix } else { Server::Smtpd });
    }
    None
}

fn by_timing(target: &Target, seen: &[Observation]) -> Option<Server> {
    let kept_in = matches!(
        target.protocol,
        Protocol::Imap | Protocol::Imaps | Protocol::Pop3 | Protocol::Pop3s | Protocol::Sieve
    );
    let silence = seen.iter().find(|one| one.step.probe == Probe::NoHeader)?;
    let closed = matches!(silence.outcome, Outcome::Closed { .. });
    (closed && kept_in && (DOVECOT_HEADER_TIMEOUT.contains(&silence.after) || silence.closed_immediately()))
        .then_some(Server::Dovecot)
}
