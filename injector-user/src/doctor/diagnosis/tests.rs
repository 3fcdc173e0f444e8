//! Every fault as a case: what was observed, the verdict, and the line to change.

mod cases;

use self::cases::{BANNER, Case, DOVECOT, POSTSCREEN, SMTPD, SYNTAX, V1_4, V2_4, V2_6, cases, filtered};
use super::{
    super::{
        fixtures::{away, closed, dialogue, greeted, misunderstood, refuses_to_relay, relays, seen, target},
        observation::{Client, Dialogue, Relay},
    },
    *,
};

/// The findings as `code` or `note code`, and all lines to change.
fn judged(target: &Target, all: &[Observation]) -> (Vec<String>, String) {
    let found = findings(target, all, &["10.25.0.1".parse().unwrap()]);
    let codes = found.iter().map(|one| {
        let note = if one.fault { "" } else { "note " };
        format!("{note}{}", one.verdict.code())
    });
    let lines = found.iter().flat_map(|one| &one.changes).flat_map(|change| &change.lines);
    (codes.collect(), lines.map(String::as_str).collect::<Vec<_>>().join("\n"))
}

#[test]
fn each_fault_has_its_verdict_and_line() {
    for Case { name, protocol, seen, codes, advice } in cases() {
        let (found, lines) = judged(&target(protocol), &seen);
        assert_eq!(found, codes, "{name}");
        for part in advice {
            assert!(lines.contains(part), "{name}: no {part:?} in\n{lines}");
        }
    }
}

#[test]
fn messages_of_all_cases() {
    let mut text = String::new();
    for Case { name, protocol, seen, .. } in cases() {
        text.push_str(&format!("{name} ({protocol}):\n"));
        for Finding { verdict, fault, message, changes } in
            findings(&target(protocol), &seen, &["10.25.0.1".parse().unwrap()])
        {
            let kind = if fault { "FAULT" } else { "note" };
            text.push_str(&format!("  {kind} {}: {message}\n", verdict.code()));
            for change in changes {
                text.push_str(&format!("    change {}\n", change.place));
            }
        }
    }
    insta::assert_snapshot!(text);
}

#[test]
fn a_rejected_family_without_clients_is_a_note() {
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
fn a_backend_that_trusts_another_address_is_forgeable() {
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
    assert_eq!(codes, ["note forgery_untested"]);
}

const LOCALHOST: Probe = claim(Client::Localhost);
const DOCUMENTATION: Probe = claim(Client::Documentation);
const RESTRICTIONS: &str = "-o smtpd_relay_restrictions=permit_sasl_authenticated,reject_unauth_destination";

const fn claim(client: Client) -> Probe {
    Probe::Claim { version: ProxyVersion::V2, family: Family::V4, client }
}

/// The observations of a correct submission port, and these.
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
fn relaying_for_localhost_is_a_note_and_for_all_a_fault() {
    let submission = target(Protocol::Submission);
    let unknown = |why: &str| Dialogue::Relay(Relay::Unknown(why.to_owned()));
    let note = with_claims(vec![dialogue(LOCALHOST, relays()), dialogue(DOCUMENTATION, refuses_to_relay())]);
    let (codes, lines) = judged(&submission, &note);
    assert_eq!(codes, ["note relays_for_localhost"]);
    assert!(lines.contains(RESTRICTIONS) && !lines.contains("nft"), "others were filtered: {lines}");
    let not_run: Vec<_> = note.iter().filter(|one| one.step.from.is_none()).cloned().collect();
    let (codes, lines) = judged(&submission, &not_run);
    assert_eq!(codes, ["note forgery_untested", "note relays_for_localhost"]);
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
    // A server that does not answer such a header is correct.
    assert_eq!(judged(&submission, &with_claims(vec![seen(LOCALHOST, closed(), 0)])).0, [""; 0]);
}

#[test]
fn relaying_for_localhost_is_a_fault_if_others_are_trusted() {
    let mut all =
        with_claims(vec![dialogue(LOCALHOST, relays()), dialogue(DOCUMENTATION, refuses_to_relay())]);
    all[3].outcome = greeted(BANNER);
    assert_eq!(judged(&target(Protocol::Submission), &all).0, ["forgeable", "open_relay"]);
}

#[test]
fn relay_advice_behind_postscreen_is_for_the_smtpd() {
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
fn clear_text_passwords_for_localhost_alone_are_a_note() {
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
fn a_server_that_relays_for_an_untrusted_host_is_an_open_relay() {
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
fn trusting_an_untrusted_host_is_a_fault() {
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

/// Webmail and probes use the port as well: the injector gets another one.
#[test]
fn the_advice_for_a_standard_port_leaves_it_as_it_is() {
    let on = |protocol: Protocol| {
        let port = protocol.standard_port().unwrap();
        let address = std::net::SocketAddr::new("10.25.0.2".parse().unwrap(), port);
        Target { address, backend: format!("mail.internal:{port}"), ..target(protocol) }
    };
    let no_proxy = |protocol| {
        let bare = if target(protocol).is_tls() { Probe::Tls } else { Probe::NoHeader };
        judged(
            &on(protocol),
            &[seen(bare, greeted("* OK ready"), 0), seen(V2_4, closed(), 0), seen(V2_6, closed(), 0)],
        )
    };
    for (protocol, service) in [
        (Protocol::Smtp, "2525 inet n - n - 1 postscreen"),
        (Protocol::Submission, "5587 inet n - n - - smtpd"),
        (Protocol::Submissions, "4465 inet n - n - - smtpd"),
        (Protocol::Imaps, "    port = 10993"),
        (Protocol::Sieve, "    port = 14190"),
    ] {
        let (codes, lines) = no_proxy(protocol);
        assert_eq!(codes, ["no_proxy"], "{protocol}");
        let own = format!("backends = [\"mail.internal:{}\"]", protocol.alternative_port().unwrap());
        assert!(lines.contains(service) && lines.contains(&own), "{protocol}:\n{lines}");
        let standard = on(protocol).address.port();
        let starts = |line: &str| {
            line.starts_with(&format!("{standard} inet")) || line.ends_with(&format!("= {standard}"))
        };
        assert!(!lines.lines().any(starts), "{protocol}:\n{lines}");
    }
    let (_, lines) = judged(&on(Protocol::Smtp), &[seen(Probe::NoHeader, Outcome::Refused, 0)]);
    assert!(lines.contains("2525 inet") && !lines.contains("\n25 inet"), "{lines}");
    // Exim expects a header by sender: the port may stay.
    let exim = [
        seen(Probe::NoHeader, greeted(cases::EXIM), 0),
        seen(V2_4, misunderstood(cases::EXIM, "500 unrecognized command"), 0),
        seen(V2_6, misunderstood(cases::EXIM, "500 unrecognized command"), 0),
    ];
    assert_eq!(judged(&on(Protocol::Smtp), &exim).1, "hosts_proxy = <; 10.25.0.1");
}
