//! Every fault as a case: what is seen, what is said, which line is to change.

use super::{
    super::{
        fixtures::{away, closed, dialogue, greeted, misunderstood, refuses_to_relay, relays, seen, target},
        observation::{Client, Dialogue, Greeting, Relay, Step},
    },
    *,
};

const V2_4: Probe = Probe::Header { version: ProxyVersion::V2, family: Family::V4, tlvs: true };
const V2_6: Probe = Probe::Header { version: ProxyVersion::V2, family: Family::V6, tlvs: true };
const V1_4: Probe = Probe::Header { version: ProxyVersion::V1, family: Family::V4, tlvs: true };
const PLAIN: Probe = Probe::Header { version: ProxyVersion::V2, family: Family::V4, tlvs: false };

const BANNER: &str = "220 mail.example.test ESMTP Postfix";
const TEASER: &str = "220-mail.example.test ESMTP Postfix";
const SMTPD: &str = "421 4.3.0 mail.example.test Server local error";
const POSTSCREEN: &str = "421 4.3.2 No system resources";
const SYNTAX: &str = "500 5.5.2 Error: bad syntax";
const DOVECOT: &str = "* OK [CAPABILITY IMAP4rev1] Dovecot (Debian) ready.";

/// What is found, as `code` or `note code`, and all lines to change.
fn judged(target: &Target, all: &[Observation]) -> (Vec<String>, String) {
    let found = findings(target, all, &["10.25.0.1".parse().unwrap()]);
    let codes = found.iter().map(|one| {
        let note = if one.fault { "" } else { "note " };
        format!("{note}{}", one.verdict.code())
    });
    let lines = found.iter().flat_map(|one| &one.changes).flat_map(|change| &change.lines);
    (codes.collect(), lines.map(String::as_str).collect::<Vec<_>>().join("\n"))
}

/// A target whose forgery was tried in vain, so that nothing but the case itself is found.
fn filtered() -> Observation {
    let from = Some("192.0.2.1".parse().unwrap());
    Observation { step: Step { probe: V2_4, from }, ..seen(V2_4, Outcome::NoAnswer, 20) }
}

struct Case {
    name: &'static str,
    protocol: Protocol,
    seen: Vec<Observation>,
    codes: &'static [&'static str],
    /// Parts of the lines to change.
    advice: &'static [&'static str],
}

fn case(name: &'static str, protocol: Protocol, seen: Vec<Observation>) -> Case {
    Case { name, protocol, seen, codes: &[], advice: &[] }
}

fn cases() -> Vec<Case> {
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
            codes: &["turned_away"],
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
    ]
}

#[test]
fn each_fault_is_named_with_its_line() {
    for Case { name, protocol, seen, codes, advice } in cases() {
        let (found, lines) = judged(&target(protocol), &seen);
        assert_eq!(found, codes, "{name}");
        for part in advice {
            assert!(lines.contains(part), "{name}: no {part:?} in\n{lines}");
        }
    }
}

#[test]
fn a_family_that_no_client_has_is_worth_a_note() {
    let all = [
        seen(Probe::NoHeader, away(SMTPD), 50),
        seen(V2_4, greeted(BANNER), 1),
        seen(V2_6, away(SMTPD), 0),
        filtered(),
    ];
    let ipv4 = Target { ipv6_clients: false, ..target(Protocol::Submission) };
    assert_eq!(judged(&ipv4, &all).0, ["note ipv6_off"]);
}

#[test]
fn who_is_believed_from_elsewhere_is_forgeable() {
    let believed = Observation { outcome: greeted(BANNER), ..filtered() };
    let all = [
        seen(Probe::NoHeader, away(SMTPD), 50),
        seen(V2_4, greeted(BANNER), 1),
        seen(V2_6, greeted(BANNER), 1),
        believed,
    ];
    let (codes, lines) = judged(&target(Protocol::Submission), &all);
    assert_eq!(codes, ["forgeable"]);
    assert!(lines.contains("ip saddr != 10.25.0.1 tcp dport 2525 counter drop"), "{lines}");
    let (codes, _) = judged(&target(Protocol::Submission), &all[..3]);
    assert_eq!(codes, ["note forgery_untried"]);
}

const LOCALHOST: Probe = claim(Client::Localhost);
const DOCUMENTATION: Probe = claim(Client::Documentation);
const RESTRICTIONS: &str = "-o smtpd_relay_restrictions=permit_sasl_authenticated,reject_unauth_destination";

const fn claim(client: Client) -> Probe {
    Probe::Claim { version: ProxyVersion::V2, family: Family::V4, client }
}

/// A sound submission port, and what came of the claims.
fn with_claims(claims: Vec<Observation>) -> Vec<Observation> {
    let mut all = vec![
        seen(Probe::NoHeader, away(SMTPD), 50),
        seen(V2_4, greeted(BANNER), 1),
        seen(V2_6, greeted(BANNER), 1),
        filtered(),
    ];
    all.extend(claims);
    all
}

#[test]
fn relaying_for_localhost_is_worth_a_note_and_for_all_a_fault() {
    let submission = target(Protocol::Submission);
    let unknown = |why: &str| Dialogue::Relay(Relay::Unknown(why.to_owned()));
    let note = with_claims(vec![dialogue(LOCALHOST, relays()), dialogue(DOCUMENTATION, refuses_to_relay())]);
    let (codes, lines) = judged(&submission, &note);
    assert_eq!(codes, ["note relays_for_localhost"]);
    assert!(lines.contains(RESTRICTIONS) && !lines.contains("nft"), "others were filtered: {lines}");
    let untried: Vec<_> = note.iter().filter(|one| one.step.from.is_none()).cloned().collect();
    let (codes, lines) = judged(&submission, &untried);
    assert_eq!(codes, ["note forgery_untried", "note relays_for_localhost"]);
    assert!(lines.contains("ip saddr != 10.25.0.1 tcp dport 2525 counter drop"), "{lines}");
    let all = with_claims(vec![dialogue(LOCALHOST, relays()), dialogue(DOCUMENTATION, relays())]);
    let (codes, lines) = judged(&submission, &all);
    assert_eq!(codes, ["open_relay"]);
    assert!(lines.contains(RESTRICTIONS) && !lines.contains("nft"), "no firewall mends that: {lines}");
    let refuses = with_claims(vec![dialogue(LOCALHOST, refuses_to_relay())]);
    assert_eq!(judged(&submission, &refuses).0, [""; 0]);
    let greylisted = with_claims(vec![dialogue(LOCALHOST, unknown("\"451 later\""))]);
    assert_eq!(judged(&submission, &greylisted).0, ["note relay_unknown"]);
    let half = with_claims(vec![dialogue(LOCALHOST, relays()), dialogue(DOCUMENTATION, unknown("\"451\""))]);
    assert_eq!(judged(&submission, &half).0, ["note relays_for_localhost"]);
    // A server that answers no such header is as it should be.
    assert_eq!(judged(&submission, &with_claims(vec![seen(LOCALHOST, closed(), 0)])).0, [""; 0]);
}

#[test]
fn relaying_for_localhost_is_a_fault_where_others_are_believed() {
    let mut all =
        with_claims(vec![dialogue(LOCALHOST, relays()), dialogue(DOCUMENTATION, refuses_to_relay())]);
    all[3].outcome = greeted(BANNER);
    assert_eq!(judged(&target(Protocol::Submission), &all).0, ["forgeable", "open_relay"]);
}

#[test]
fn postscreen_leaves_relaying_to_the_smtpd_behind_it() {
    let smtp = target(Protocol::Smtp);
    for (silence, count) in [(away(POSTSCREEN), 1), (away("421 4.3.0 busy"), 2)] {
        let mut all =
            with_claims(vec![dialogue(LOCALHOST, relays()), dialogue(DOCUMENTATION, refuses_to_relay())]);
        all[0].outcome = silence;
        let found = findings(&smtp, &all, &[]);
        let changes = found.iter().flat_map(|one| &one.changes);
        let settings = changes.filter(|change| change.lines[0].trim() == RESTRICTIONS).count();
        assert_eq!(settings, count, "{found:?}");
    }
}

#[test]
fn clear_text_passwords_for_localhost_alone_are_worth_a_note() {
    let imap = target(Protocol::Imap);
    let login = |probe, login| Observation {
        outcome: greeted(DOVECOT),
        ..dialogue(probe, Dialogue::ClearTextLogin(login))
    };
    let seen_with = |localhost, documentation| {
        let mut all = with_claims(vec![login(LOCALHOST, localhost), login(DOCUMENTATION, documentation)]);
        all[0].outcome = closed();
        all
    };
    let (codes, lines) = judged(&imap, &seen_with(true, false));
    assert_eq!(codes, ["note trusts_localhost"]);
    assert!(lines.ends_with("login_trusted_networks ="), "{lines}");
    assert_eq!(judged(&imap, &seen_with(true, true)).0, [""; 0]);
    assert_eq!(judged(&imap, &with_claims(vec![login(LOCALHOST, false)])).0, [""; 0]);
}

#[test]
fn a_stranger_for_whom_a_server_relays_has_found_an_open_relay() {
    let untrusted = Target { untrusted: true, ..target(Protocol::Submission) };
    let finding_for = |what| {
        findings(&untrusted, &[seen(V2_4, greeted(BANNER), 0), dialogue(LOCALHOST, what)], &[])
            .into_iter()
            .next()
            .unwrap()
    };
    let open = finding_for(relays());
    assert_eq!((open.verdict, open.fault), (Verdict::OpenRelay, true));
    let lines: Vec<_> =
        open.changes.iter().flat_map(|change| &change.lines).map(|line| line.trim()).collect();
    assert!(lines.contains(&RESTRICTIONS) && lines[2].contains("ip saddr != INJECTOR_IPV4 "), "{lines:?}");
    assert_eq!(finding_for(refuses_to_relay()).verdict, Verdict::Forgeable);
    let unknown = finding_for(Dialogue::Relay(Relay::Unknown("\"451 later\"".to_owned())));
    assert_eq!(unknown.verdict, Verdict::Forgeable);
    assert!(unknown.message.ends_with("is unknown: \"451 later\""), "{}", unknown.message);
}

#[test]
fn a_stranger_may_not_be_believed() {
    let untrusted = Target { untrusted: true, ..target(Protocol::Submission) };
    for outcome in
        [Outcome::Refused, Outcome::NoAnswer, closed(), misunderstood(BANNER, SYNTAX), Outcome::Silent]
    {
        assert_eq!(judged(&untrusted, &[seen(V2_4, outcome, 0)]).0, [""; 0]);
    }
    let (codes, lines) = judged(&untrusted, &[seen(V2_4, greeted(BANNER), 0)]);
    assert_eq!(codes, ["forgeable"]);
    assert!(lines.contains("ip saddr != INJECTOR_IPV4 "), "{lines}");
}

#[test]
fn wants_v2_is_the_reverse_of_wants_v1() {
    let v1_6 = Probe::Header { version: ProxyVersion::V1, family: Family::V6, tlvs: true };
    let mut smtp = target(Protocol::Smtp);
    smtp.receiver.version = ProxyVersion::V1;
    let all = [
        seen(Probe::NoHeader, Outcome::Silent, 100),
        seen(V1_4, closed(), 0),
        seen(v1_6, closed(), 0),
        seen(V2_4, greeted("220 OpenSMTPD"), 0),
    ];
    let (codes, lines) = judged(&smtp, &all);
    assert_eq!((codes, lines), (vec!["wants_v2".to_owned()], "version = \"v2\"".to_owned()));
}
