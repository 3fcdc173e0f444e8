//! One server per case: what it does, the verdicts, and the lines to change.

use crate::{
    config::ProxyVersion,
    doctor::{
        fixtures::{away, closed, greeted, misunderstood, seen},
        observation::{Family, Greeting, Observation, Outcome, Probe, Step},
    },
    protocol::Protocol,
};

pub(super) const V2_4: Probe = Probe::Header { version: ProxyVersion::V2, family: Family::V4, tlvs: true };
pub(super) const V2_6: Probe = Probe::Header { version: ProxyVersion::V2, family: Family::V6, tlvs: true };
pub(super) const V1_4: Probe = Probe::Header { version: ProxyVersion::V1, family: Family::V4, tlvs: true };
pub(super) const PLAIN: Probe = Probe::Header { version: ProxyVersion::V2, family: Family::V4, tlvs: false };

pub(super) const STANDARD: Probe = Probe::StandardPort { header: None };
pub(super) const STANDARD_4: Probe = Probe::StandardPort { header: Some(Family::V4) };

pub(super) const EXIM: &str = "220 mail.example.test ESMTP Exim 4.96";
/// The answer of Exim 4.96 to a client whose header is missing.
pub(super) const EXIM_NO_HEADER: &str = "503 Command refused, required Proxy negotiation failed";
pub(super) const BANNER: &str = "220 mail.example.test ESMTP Postfix";
pub(super) const TEASER: &str = "220-mail.example.test ESMTP Postfix";
pub(super) const SMTPD: &str = "421 4.3.0 mail.example.test Server local error";
pub(super) const POSTSCREEN: &str = "421 4.3.2 No system resources";
pub(super) const SYNTAX: &str = "500 5.5.2 Error: bad syntax";
pub(super) const DOVECOT: &str = "* OK [CAPABILITY IMAP4rev1] Dovecot (Debian) ready.";

/// The observation that another address is filtered, so that only the case's own fault is found.
pub(super) fn filtered() -> Observation {
    let from = Some("192.0.2.1".parse().unwrap());
    Observation { step: Step { probe: V2_4, from }, ..seen(V2_4, Outcome::NoAnswer, 20) }
}

pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) protocol: Protocol,
    pub(super) seen: Vec<Observation>,
    pub(super) codes: &'static [&'static str],
    /// Parts of the lines to change.
    pub(super) advice: &'static [&'static str],
}

pub(super) fn case(name: &'static str, protocol: Protocol, seen: Vec<Observation>) -> Case {
    Case { name, protocol, seen, codes: &[], advice: &[] }
}

pub(super) fn cases() -> Vec<Case> {
    use Protocol::{Imap, Imaps, Plain, Smtp, Submission, Submissions};
    let in_tls =
        |probe, line| Observation { tls: Some("TLS 1.3".to_owned()), ..seen(probe, greeted(line), 1) };
    let teased = |complaint| misunderstood(TEASER, complaint);
    vec![
        case(
            "smtpd as it should be",
            Submission,
            vec![
                seen(Probe::NoHeader, away(SMTPD), 50),
                seen(V2_4, greeted(BANNER), 1),
                seen(V2_6, greeted(BANNER), 1),
                filtered(),
            ],
        ),
        Case {
            codes: &["not_listening"],
            advice: &["2525 inet n - n - 1 postscreen\n  -o postscreen_upstream_proxy_protocol=haproxy"],
            ..case("refused", Smtp, vec![seen(Probe::NoHeader, Outcome::Refused, 0)])
        },
        Case {
            codes: &["no_source_ports"],
            ..case("no source port", Smtp, vec![seen(Probe::NoHeader, Outcome::NoSourcePorts, 0)])
        },
        Case {
            codes: &["no_answer"],
            advice: &["ip saddr 10.25.0.1 tcp dport 2525 accept"],
            ..case("dropped", Smtp, vec![seen(Probe::NoHeader, Outcome::NoAnswer, 50)])
        },
        Case {
            codes: &["no_proxy"],
            advice: &[
                "-o postscreen_upstream_proxy_protocol=haproxy",
                "-o smtpd_upstream_proxy_protocol=haproxy",
            ],
            ..case(
                "smtpd, or postscreen that knows the client",
                Smtp,
                vec![
                    seen(Probe::NoHeader, greeted(BANNER), 1),
                    seen(V2_4, misunderstood(BANNER, SYNTAX), 1),
                    seen(V2_6, misunderstood(BANNER, SYNTAX), 1),
                    seen(V1_4, misunderstood(BANNER, SYNTAX), 1),
                ],
            )
        },
        Case {
            codes: &["no_proxy"],
            advice: &["1 postscreen\n  -o postscreen_upstream_proxy_protocol=haproxy"],
            ..case(
                "postscreen without its own setting",
                Smtp,
                vec![
                    seen(
                        Probe::NoHeader,
                        Outcome::Greeted(Greeting { line: TEASER.to_owned(), teaser: true }),
                        60,
                    ),
                    seen(V2_4, teased("502 5.5.2 Error: command not recognized"), 1),
                    seen(V2_6, teased("502 5.5.2 Error: command not recognized"), 1),
                    seen(V1_4, teased("502 5.5.2 Error: command not recognized"), 1),
                ],
            )
        },
        Case {
            codes: &["no_proxy"],
            advice: &["- smtpd\n  -o smtpd_upstream_proxy_protocol=haproxy\n  -o smtpd_tls_wrappermode=yes"],
            ..case(
                "smtpd in TLS",
                Submissions,
                vec![
                    in_tls(Probe::Tls, BANNER),
                    seen(V2_4, Outcome::Closed { reset: true }, 0),
                    seen(V2_6, Outcome::Closed { reset: true }, 0),
                    seen(V1_4, Outcome::Closed { reset: true }, 0),
                ],
            )
        },
        Case {
            codes: &["wants_v1"],
            advice: &["version = \"v1\""],
            ..case(
                "v1 only",
                Smtp,
                vec![
                    seen(Probe::NoHeader, Outcome::Silent, 100),
                    seen(V2_4, closed(), 0),
                    seen(V2_6, closed(), 0),
                    seen(V1_4, greeted("220 haraka"), 1),
                ],
            )
        },
        Case {
            codes: &["refuses_tlvs"],
            advice: &["without crc32c"],
            ..case(
                "TLVs",
                Smtp,
                vec![
                    seen(Probe::NoHeader, away(SMTPD), 50),
                    seen(V2_4, closed(), 0),
                    seen(V2_6, closed(), 0),
                    seen(V1_4, closed(), 0),
                    seen(PLAIN, greeted(BANNER), 1),
                ],
            )
        },
        Case {
            codes: &["untrusted"],
            advice: &["haproxy_trusted_networks = 10.25.0.1"],
            ..case(
                "Dovecot that does not know the edge",
                Imaps,
                vec![
                    seen(Probe::Tls, Outcome::Closed { reset: true }, 0),
                    seen(V2_4, Outcome::Closed { reset: true }, 0),
                    seen(V2_6, Outcome::Closed { reset: true }, 0),
                    seen(V1_4, Outcome::Closed { reset: true }, 0),
                    seen(Probe::NoHeader, closed(), 0),
                ],
            )
        },
        Case {
            codes: &["header_refused"],
            ..case(
                "a trusted edge whose header is refused is another thing",
                Imaps,
                vec![
                    seen(Probe::Tls, Outcome::Closed { reset: true }, 0),
                    seen(V2_4, Outcome::Closed { reset: true }, 0),
                    seen(V2_6, Outcome::Closed { reset: true }, 0),
                    seen(V1_4, Outcome::Closed { reset: true }, 0),
                    seen(Probe::NoHeader, closed(), 30),
                ],
            )
        },
        Case {
            codes: &["ipv6_off"],
            advice: &["inet_protocols = all"],
            ..case(
                "inet_protocols = ipv4",
                Smtp,
                vec![
                    seen(Probe::NoHeader, away(POSTSCREEN), 50),
                    seen(V2_4, greeted(BANNER), 1),
                    seen(V2_6, away(POSTSCREEN), 0),
                    filtered(),
                ],
            )
        },
        Case {
            codes: &["header_optional"],
            advice: &["ip saddr != 10.25.0.1 tcp dport 2525"],
            ..case(
                "with and without",
                Imap,
                vec![
                    seen(Probe::NoHeader, greeted(DOVECOT), 1),
                    seen(V2_4, greeted(DOVECOT), 1),
                    seen(V2_6, greeted(DOVECOT), 1),
                    filtered(),
                ],
            )
        },
        Case {
            codes: &["clear_text"],
            advice: &["-o smtpd_tls_wrappermode=yes", "protocol = \"submission\""],
            ..case(
                "clear text for TLS",
                Submissions,
                vec![
                    seen(Probe::Tls, away(SMTPD), 1),
                    seen(V2_4, Outcome::Strange(BANNER.to_owned()), 1),
                    seen(V2_6, Outcome::Strange(BANNER.to_owned()), 1),
                    seen(V1_4, Outcome::Strange(BANNER.to_owned()), 1),
                    seen(Probe::NoHeader, away(SMTPD), 50),
                ],
            )
        },
        Case {
            codes: &["mute"],
            advice: &["protocol = \"imaps\""],
            ..case(
                "TLS for clear text",
                Imap,
                vec![
                    seen(Probe::NoHeader, closed(), 30),
                    seen(V2_4, Outcome::Silent, 100),
                    seen(V1_4, Outcome::Silent, 100),
                ],
            )
        },
        Case {
            codes: &["note unproven"],
            ..case(
                "plain",
                Plain,
                vec![
                    seen(Probe::NoHeader, Outcome::Silent, 100),
                    seen(V2_4, Outcome::Silent, 100),
                    seen(V1_4, Outcome::Silent, 100),
                ],
            )
        },
        Case {
            codes: &["rejected"],
            ..case(
                "too busy",
                Submission,
                vec![
                    seen(Probe::NoHeader, away("421 4.7.0 Error: too many connections"), 0),
                    seen(V2_4, away("421 4.7.0 Error: too many connections"), 0),
                    seen(V2_6, away("421 4.7.0 Error: too many connections"), 0),
                    seen(V1_4, away("421 4.7.0 Error: too many connections"), 0),
                ],
            )
        },
        Case {
            codes: &["header_refused"],
            ..case(
                "Postfix that refuses both families",
                Submission,
                vec![
                    seen(Probe::NoHeader, away(SMTPD), 50),
                    seen(V2_4, away(SMTPD), 0),
                    seen(V2_6, away(SMTPD), 0),
                    seen(V1_4, away(SMTPD), 0),
                ],
            )
        },
        Case {
            codes: &["other_protocol"],
            ..case(
                "IMAP where SMTP should be",
                Smtp,
                vec![
                    seen(Probe::NoHeader, closed(), 30),
                    seen(V2_4, Outcome::Strange(DOVECOT.to_owned()), 0),
                    seen(V2_6, Outcome::Strange(DOVECOT.to_owned()), 0),
                    seen(V1_4, Outcome::Strange(DOVECOT.to_owned()), 0),
                ],
            )
        },
        Case {
            codes: &["note tls_trouble"],
            ..case(
                "an alert after the header is TLS all the same",
                Imaps,
                vec![
                    seen(Probe::Tls, closed(), 0),
                    seen(V2_4, Outcome::Alert("HandshakeFailure".to_owned()), 0),
                    seen(V2_6, Outcome::Alert("HandshakeFailure".to_owned()), 0),
                    filtered(),
                ],
            )
        },
        Case {
            codes: &["no_proxy"],
            ..case(
                "an alert about the header's bytes is not",
                Imaps,
                vec![
                    in_tls(Probe::Tls, DOVECOT),
                    seen(V2_4, Outcome::Alert("UnexpectedMessage".to_owned()), 0),
                    seen(V2_6, Outcome::Alert("UnexpectedMessage".to_owned()), 0),
                    seen(V1_4, Outcome::Alert("UnexpectedMessage".to_owned()), 0),
                ],
            )
        },
        case(
            "Exim that expects a header",
            Smtp,
            vec![
                seen(Probe::NoHeader, misunderstood(EXIM, EXIM_NO_HEADER), 30),
                seen(V2_4, greeted(EXIM), 0),
                seen(V2_6, greeted(EXIM), 0),
                filtered(),
                // By sender: so does its standard port.
                seen(STANDARD, misunderstood(EXIM, EXIM_NO_HEADER), 30),
                seen(STANDARD_4, greeted(EXIM), 0),
            ],
        ),
        case(
            "Exim in TLS",
            Submissions,
            vec![
                seen(Probe::Tls, Outcome::Alert("ProtocolVersion".to_owned()), 30),
                in_tls(V2_4, EXIM),
                in_tls(V2_6, EXIM),
                filtered(),
            ],
        ),
        Case {
            codes: &["no_proxy"],
            advice: &["hosts_proxy = <; 10.25.0.1"],
            ..case(
                "Exim that does not know the edge",
                Smtp,
                vec![
                    seen(Probe::NoHeader, greeted(EXIM), 0),
                    seen(V2_4, misunderstood(EXIM, "500 unrecognized command"), 0),
                    seen(V2_6, misunderstood(EXIM, "500 unrecognized command"), 0),
                    seen(V1_4, misunderstood(EXIM, "500 unrecognized command"), 0),
                ],
            )
        },
        Case {
            codes: &["standard_port"],
            advice: &[
                "smtpd_upstream_proxy_protocol =\n",
                "2525 inet n - n - - smtpd\n  -o smtpd_upstream_proxy_protocol=haproxy",
            ],
            ..case(
                "Postfix with the setting in main.cf",
                Submission,
                vec![
                    seen(Probe::NoHeader, away(SMTPD), 50),
                    seen(V2_4, greeted(BANNER), 1),
                    seen(V2_6, greeted(BANNER), 1),
                    filtered(),
                    seen(STANDARD, away(SMTPD), 50),
                    seen(STANDARD_4, greeted(BANNER), 1),
                ],
            )
        },
        case(
            "a standard port of another server",
            Submission,
            vec![
                seen(Probe::NoHeader, away(SMTPD), 50),
                seen(V2_4, greeted(BANNER), 1),
                seen(V2_6, greeted(BANNER), 1),
                filtered(),
                seen(STANDARD, away("421 4.7.0 too many connections"), 0),
                seen(STANDARD_4, away("421 4.7.0 too many connections"), 0),
            ],
        ),
        Case {
            codes: &["mute"],
            ..case(
                "OpenSMTPD in TLS",
                Submissions,
                vec![
                    seen(Probe::Tls, Outcome::Silent, 100),
                    seen(V2_4, Outcome::Silent, 100),
                    seen(V1_4, closed(), 0),
                    seen(Probe::NoHeader, Outcome::Silent, 100),
                ],
            )
        },
    ]
}
