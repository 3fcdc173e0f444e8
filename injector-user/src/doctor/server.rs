//! Which server it is, by what it said and when: the advice names its settings.

use std::{fmt, time::Duration};

use super::observation::{Greeting, Observation, Outcome, Probe, Target};
use crate::protocol::Protocol;

/// A mail server, as far as it can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// Postfix, with postscreen on the port.
    Postscreen,
    /// Postfix, with smtpd on the port.
    Smtpd,
    /// Postfix; postscreen may be in front, which hands known clients on without a trace.
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
    /// Not told.
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

/// What Postfix's smtpd says when no header came, or one that it cannot use (smtpd_peer_from_haproxy in
/// `src/smtpd/smtpd_haproxy.c`).
pub const SMTPD_NO_HEADER: &str = "Server local error";
/// The same of postscreen (`src/postscreen/postscreen_haproxy.c`).
pub const POSTSCREEN_NO_HEADER: &str = "421 4.3.2 No system resources";

/// How long Dovecot waits for a header (`src/lib-master/master-service-haproxy.c`), with some room on either side.
const DOVECOT_HEADER_TIMEOUT: std::ops::Range<Duration> =
    Duration::from_millis(2500)..Duration::from_millis(4500);

/// Tells the server by all that was seen of it.
#[must_use]
pub fn identify(target: &Target, seen: &[Observation]) -> Server {
    by_text(target, seen).or_else(|| by_timing(target, seen)).unwrap_or(Server::Unknown)
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
        // Nobody puts postscreen in front of submission: it speaks no AUTH.
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
