//! Listeners: combinations of names, addresses, backends and timeouts.

use std::time::Duration;

use super::{LISTENER, and, assert_diagnostics, with};
use crate::{config::Config, protocol::Protocol};

#[test]
fn a_configuration_without_listeners_is_rejected() {
    for text in ["", "[limits]\nmax_connections = 1\n", "listener = []"] {
        assert_diagnostics(text, &["f.toml:1:1: no [[listener]]: at least one is needed"]);
    }
}

#[test]
fn names_have_a_restricted_alphabet_and_are_unique() {
    let expect =
        |name: &str| format!("f.toml:2:8: listener #1: name {name:?}: must be 1 to 63 of a-z, 0-9, _ and -");
    for name in ["", "SMTP", "a b", "mail.25", "é"] {
        assert_diagnostics(&with("name", &format!("name = {name:?}")), &[&expect(name)]);
    }
    let second = LISTENER.replace("192.0.2.10", "192.0.2.11");
    assert_diagnostics(
        &and(&second),
        &["f.toml:7:8: listener \"smtp\": name \"smtp\": already used by the listener in line 2"],
    );
}

#[test]
fn another_name_of_a_protocol_is_answered_with_its_own() {
    for (other, meant) in
        [("smtps", "submissions"), ("SMTPS", "submissions"), ("ManageSieve", "sieve"), ("imap4", "imap")]
    {
        assert_diagnostics(
            &with("protocol", &format!("protocol = {other:?}")),
            &[&format!(
                "f.toml:4:12: listener \"smtp\": protocol {other:?}: did you mean {meant:?}? must be one of smtp, \
                 submission, submissions, imap, imaps, pop3, pop3s, sieve, plain"
            )],
        );
    }
}

#[test]
fn bind_addresses_must_not_overlap() {
    const V4: &str = "\"0.0.0.0:25\" takes connections to every IPv4 address, so leave";
    const BOTH: &str = "\"[::]:25\" takes connections to every IPv4 and IPv6 address, so leave";
    let same = "they are the same IPv4 address; write one of them";
    for (one, other, advice) in [
        ("0.0.0.0:25", "192.0.2.10:25", format!("{V4} \"192.0.2.10:25\" out")),
        ("192.0.2.10:25", "0.0.0.0:25", format!("{V4} \"192.0.2.10:25\" out")),
        ("[::]:25", "0.0.0.0:25", format!("{BOTH} \"0.0.0.0:25\" out")),
        ("0.0.0.0:25", "[::]:25", format!("{BOTH} \"0.0.0.0:25\" out")),
        ("[::]:25", "192.0.2.10:25", format!("{BOTH} \"192.0.2.10:25\" out")),
        ("[2001:db8::10]:25", "[::]:25", format!("{BOTH} \"[2001:db8::10]:25\" out")),
        ("192.0.2.10:25", "[::ffff:192.0.2.10]:25", same.to_owned()),
    ] {
        let second = LISTENER.replace("smtp\"\nbind", "mx\"\nbind").replace("192.0.2.10:25", other);
        assert_diagnostics(
            &format!("{}\n{second}", with("bind", &format!("bind = [{one:?}]"))),
            &[&format!(
                "f.toml:8:9: listener \"mx\": bind {other:?}: overlaps {one:?} of listener \"smtp\" in line 3: {advice}"
            )],
        );
    }
    for fine in [
        "\"0.0.0.0:25\", \"192.0.2.10:26\"",
        "\"0.0.0.0:25\", \"[2001:db8::10]:25\"",
        "\"[::1]:0\", \"[::1]:0\"",
    ] {
        Config::parse(&with("bind", &format!("bind = [{fine}]")), "f.toml")
            .unwrap_or_else(|e| panic!("{fine}: {e}"));
    }
}

#[test]
fn a_backend_must_not_be_the_listener_itself() {
    for (bind, backend) in [
        ("192.0.2.10:25", "192.0.2.10:25"),
        ("127.0.0.1:25", "localhost:25"),
        ("127.0.0.1:25", "localhost.:25"),
        ("0.0.0.0:25", "127.0.0.9:25"),
        ("[::]:25", "[::1]:25"),
        ("[::]:25", "localhost:25"),
        ("192.0.2.10:25", "[::ffff:192.0.2.10]:25"),
    ] {
        let text = with("bind", &format!("bind = [{bind:?}]")).replace("mail.internal:2525", backend);
        assert_diagnostics(
            &text,
            &[&format!(
                "f.toml:5:13: listener \"smtp\": backends {backend:?}: points back at this listener \
                 (bind {bind:?}): connections would loop"
            )],
        );
    }
    for (bind, backend) in
        [("0.0.0.0:25", "[::1]:25"), ("127.0.0.1:25", "127.0.0.2:25"), ("192.0.2.10:25", "localhost:25")]
    {
        let text = with("bind", &format!("bind = [{bind:?}]")).replace("mail.internal:2525", backend);
        Config::parse(&text, "f.toml").unwrap_or_else(|error| panic!("{bind} {backend}: {error}"));
    }
}

#[test]
fn a_backend_is_a_string_or_a_table() {
    let fine = "\"192.0.2.20:1\", { address = \"192.0.2.21:1\", weight = 3 }, { address = \"192.0.2.22:1\", backup = true }";
    let config = Config::parse(&with("backends", &format!("backends = [{fine}]")), "f.toml").unwrap();
    let found: Vec<_> = config.listeners[0].backends.iter().map(|it| (it.weight, it.backup)).collect();
    assert_eq!(found, [(1, false), (3, false), (1, true)]);
}

#[test]
fn a_mail_check_defaults_to_the_protocol_of_its_listener() {
    let config =
        Config::parse(&and("[listener.health]\ncheck = \"mail\"\nport = 25\neject_after = 0\n"), "f")
            .unwrap();
    let health = config.listeners[0].health;
    assert_eq!(health.ejection.after, None);
    let check = health.check.unwrap();
    assert_eq!((check.protocol, check.port, check.rise, check.fall), (Some(Protocol::Smtp), Some(25), 2, 3));
}

#[test]
fn the_header_may_wait_for_less_than_3_seconds() {
    let header_wait = |protocol: &str, wait: &str| {
        let listener = with("protocol", &format!("protocol = {protocol:?}"));
        format!("{listener}\n[listener.timeouts]\nheader_wait = {wait:?}")
    };
    let config = Config::parse(&header_wait("plain", "2s 999ms"), "f.toml").unwrap();
    assert_eq!(config.listeners[0].timeouts.header_wait, Duration::from_millis(2999));
}

#[test]
fn a_virtual_address_belongs_to_one_listener() {
    let second = |listener: &str| {
        format!(
            "{LISTENER}virtual_addresses = [\"198.51.100.1\"]\n\n[[listener]]\nname = \"mx\"\nprotocol = \"smtp\"\nbackends = [\"mail.internal:2525\"]\n{listener}\n"
        )
    };
    for (listener, error) in [
        (
            "bind = [\"192.0.2.11:25\"]\nvirtual_addresses = [\"198.51.100.1\"]",
            "f.toml:13:22: listener \"mx\": virtual_addresses \"198.51.100.1\": 198.51.100.1:25 is already taken by \
             listener \"smtp\" in line 6",
        ),
        (
            "bind = [\"192.0.2.11:25\"]\nvirtual_addresses = [\"192.0.2.10\"]",
            "f.toml:13:22: listener \"mx\": virtual_addresses \"192.0.2.10\": 192.0.2.10:25 is already taken by \
             listener \"smtp\" in line 3",
        ),
        (
            "bind = [\"198.51.100.1:25\"]",
            "f.toml:12:9: listener \"mx\": bind \"198.51.100.1:25\": already taken by listener \"smtp\" in line 6",
        ),
    ] {
        assert_diagnostics(&second(listener), &[error]);
    }
    let other_port = "bind = [\"192.0.2.11:26\"]\nvirtual_addresses = [\"198.51.100.1\", \"192.0.2.10\"]";
    let config = Config::parse(&second(other_port), "f.toml").unwrap();
    let sockets = |index: usize| -> Vec<String> {
        let listener = &config.listeners[index];
        let all = listener.virtual_sockets(&listener.virtual_addresses.listed);
        all.map(|socket| socket.to_string()).collect()
    };
    assert_eq!(sockets(0), ["198.51.100.1:25"]);
    assert_eq!(sockets(1), ["198.51.100.1:26", "192.0.2.10:26"]);
}
