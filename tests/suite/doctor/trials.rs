//! One trial for each fault, with its verdict and the line that corrects it.

use std::net::SocketAddr;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use injector_testbed::log_file::Mark;
use injector_testbed::netns::{Family, MAIL};
use injector_testbed::sockets::LIMIT;

use crate::doctor_run::{DoctorRun, Listener, configuration, listener, run, run_json};
use crate::testbed::{DROPPED, NOTHING, Testbed};
use crate::{dovecot, postfix, receivers};

pub(crate) type Run = fn(&Testbed) -> anyhow::Result<()>;

pub(crate) const ALL: &[(&str, Run)] = &[
    ("postfix/no setting on smtpd, then with it", no_setting_on_smtpd),
    ("postfix/no setting on smtpd in TLS", no_setting_in_tls),
    ("postfix/forgeable, then behind the printed rule", forgeable),
    ("postfix/forgeable by untrusted hosts", forgeable_by_strangers),
    ("postfix/relays for localhost, then does not", relays_for_localhost),
    ("postfix/open relay for untrusted hosts, then behind the printed rule", open_relay_for_strangers),
    ("postfix/relays for localhost with postscreen, TLS and STARTTLS", relays_over_all_services),
    ("postfix/open relay for all", open_relay),
    ("postfix/every recipient deferred", greylisted),
    ("dovecot/clear-text passwords for localhost", trusts_localhost),
    ("dovecot/edge not trusted, then trusted", untrusted),
    ("no fault", fine),
    ("postfix/postscreen's setting on smtpd", postscreen_setting_on_smtpd),
    ("postfix/smtpd's setting behind postscreen", smtpd_setting_behind_postscreen),
    ("postfix/IPv6 off in inet_protocols", ipv6_off),
    ("postfix/clear text for submissions", clear_text),
    ("postfix/TLS for submission", mute),
    ("dovecot/no haproxy = yes", no_haproxy),
    ("receiver/v1 only", v1_only),
    ("receiver/v2 only", v2_only),
    ("receiver/header optional", header_optional),
    ("receiver/no TLVs", no_tlvs),
    ("network/nothing listens", not_listening),
    ("network/no answer", no_answer),
    ("network/a name without an address", no_address),
    ("network/a name with two addresses, over loopback", name),
    ("cli/exit codes and text", exit_codes),
];

fn at(family: Family, port: u16) -> String {
    SocketAddr::new(MAIL.of(family), port).to_string()
}

pub(crate) fn ipv4(port: u16) -> String {
    at(Family::V4, port)
}

pub(crate) fn both(port: u16) -> Vec<String> {
    Family::ALL.map(|family| at(family, port)).to_vec()
}

/// One listener, examined from the edge.
pub(crate) fn one(testbed: &Testbed, protocol: &'static str, port: u16) -> anyhow::Result<DoctorRun> {
    run_json(&testbed.topology.edge, &[listener("l", protocol, &[ipv4(port)])], &[])
}

/// A correct setup, over IPv4 and IPv6: no finding, not even a note, and few connections.
fn fine(testbed: &Testbed) -> anyhow::Result<()> {
    let listeners = [
        listener("smtp", "smtp", &both(postfix::POSTSCREEN)),
        listener("submission", "submission", &both(postfix::SMTPD)),
        listener("submissions", "submissions", &both(postfix::WRAPPED)),
        listener("imaps", "imaps", &both(dovecot::IMAPS)),
        listener("pop3", "pop3", &both(dovecot::POP3)),
    ];
    let seen = run_json(&testbed.topology.edge, &listeners, &[])?;
    seen.expect(&[])?;
    let servers = ["Postfix, postscreen", "Postfix, smtpd", "Postfix, smtpd", "Dovecot", "Dovecot"];
    ensure!(seen.servers() == servers.map(|server| [server; 2]).concat(), "{:?}", seen.servers());
    // Four connections, one from each of three other addresses of the edge, and one to the standard
    // port.
    ensure!(seen.connections() == 10 * 8, "{} connections", seen.connections());
    // The firewall reset those from other hosts: per family one without data and three with a
    // header.
    let log = testbed.postfix.log();
    let connected =
        log.lines_with(Mark::default(), &[&format!("postfix/{}/smtpd[", postfix::SMTPD), "]: connect from "]);
    ensure!(connected.len() == 8, "{connected:#?}");
    Ok(())
}

fn no_setting_on_smtpd(testbed: &Testbed) -> anyhow::Result<()> {
    let port = postfix::REPAIRED;
    let seen = one(testbed, "submission", port)?;
    seen.expect(&[&format!("l/{} no_proxy", ipv4(port))])?;
    seen.advises(&format!("{port} inet n - n - - smtpd"))?;
    let setting = seen.lines().into_iter().find(|line| line.trim().starts_with("-o "));
    let setting = setting.context("no setting advised")?;
    ensure!(setting.trim() == "-o smtpd_upstream_proxy_protocol=haproxy", "{setting:?}");

    postfix::set(&testbed.topology.mail, &testbed.postfix, port, &setting)?;
    // An smtpd that is still waiting for clients may accept one more before it exits.
    let seen = patiently(
        || one(testbed, "submission", port),
        |seen| !seen.findings().join(" ").contains("no_proxy"),
    )?;
    // This port has no firewall: the next fault.
    seen.expect(&[&format!("l/{} forgeable", ipv4(port))])?;
    shut(testbed, &seen)?;
    one(testbed, "submission", port)?.expect(&[])
}

fn no_setting_in_tls(testbed: &Testbed) -> anyhow::Result<()> {
    let port = postfix::BARE_WRAPPED;
    let seen = one(testbed, "submissions", port)?;
    seen.expect(&[&format!("l/{} no_proxy", ipv4(port))])?;
    ensure!(seen.servers() == ["Postfix, smtpd"], "{:?}", seen.servers());
    seen.advises("-o smtpd_upstream_proxy_protocol=haproxy")
}

/// Such an smtpd behaves as one without the setting; on port 25 it may as well be postscreen, which
/// has already tested the client.
fn postscreen_setting_on_smtpd(testbed: &Testbed) -> anyhow::Result<()> {
    let port = postfix::SMTPD_AS_POSTSCREEN;
    let seen = one(testbed, "smtp", port)?;
    seen.expect(&[&format!("l/{} no_proxy", ipv4(port))])?;
    seen.advises("-o smtpd_upstream_proxy_protocol=haproxy")?;
    seen.advises("-o postscreen_upstream_proxy_protocol=haproxy")?;
    // Where postscreen is impossible, one line remains.
    let seen = one(testbed, "submission", port)?;
    ensure!(!seen.lines().join("\n").contains("postscreen"), "{:?}", seen.lines());
    seen.advises("-o smtpd_upstream_proxy_protocol=haproxy")
}

fn smtpd_setting_behind_postscreen(testbed: &Testbed) -> anyhow::Result<()> {
    let port = postfix::POSTSCREEN_AS_SMTPD;
    let expected = format!("l/{} no_proxy", ipv4(port));
    let seen = one(testbed, "smtp", port)?;
    seen.expect(&[&expected])?;
    ensure!(seen.servers() == ["Postfix, postscreen"], "{:?}", seen.servers());
    seen.advises(&format!("{port} inet n - n - 1 postscreen"))?;
    seen.advises("-o postscreen_upstream_proxy_protocol=haproxy")?;
    ensure!(!seen.lines().join("\n").contains("smtpd_upstream"), "{:?}", seen.lines());
    // Postfix logs the same once the connection is accepted.
    let ignored = "ignoring non-empty smtpd_upstream_proxy_protocol setting behind postscreen";
    testbed.postfix.log().wait_for(Mark::default(), &[ignored], LIMIT)?;
    // Now postscreen remembers the edge and passes it untested: both lines are suggested. With
    // these probes that may take one more connection, because postscreen does not pass a client
    // that spoke early at once.
    let mut seen = one(testbed, "smtp", port)?;
    if seen.servers() == ["Postfix, postscreen"] {
        seen = one(testbed, "smtp", port)?;
    }
    seen.expect(&[&expected])?;
    ensure!(seen.servers() == ["Postfix"], "{:?}", seen.servers());
    seen.advises("-o postscreen_upstream_proxy_protocol=haproxy")?;
    seen.advises("-o smtpd_upstream_proxy_protocol=haproxy")
}

fn ipv6_off(testbed: &Testbed) -> anyhow::Result<()> {
    let ports = [postfix::IPV4_POSTSCREEN, postfix::IPV4_SMTPD];
    let listeners = [
        listener("smtp", "smtp", &[ipv4(ports[0])]),
        listener("submission", "submission", &[ipv4(ports[1])]),
    ];
    let seen = run_json(&testbed.topology.edge, &listeners, &[])?;
    seen.expect(&[
        &format!("smtp/{} ipv6_off", ipv4(ports[0])),
        &format!("submission/{} ipv6_off", ipv4(ports[1])),
    ])?;
    seen.advises("inet_protocols = all")?;
    ensure!(seen.servers() == ["Postfix, postscreen", "Postfix, smtpd"], "{:?}", seen.servers());
    // Without IPv6 clients it is harmless.
    let ipv4_only = listeners.map(|listener| Listener { ipv6: false, ..listener });
    run_json(&testbed.topology.edge, &ipv4_only, &[])?.expect(&[
        &format!("smtp/{} note ipv6_off", ipv4(ports[0])),
        &format!("submission/{} note ipv6_off", ipv4(ports[1])),
    ])
}

fn clear_text(testbed: &Testbed) -> anyhow::Result<()> {
    let seen = one(testbed, "submissions", postfix::CLEAR)?;
    seen.expect(&[&format!("l/{} clear_text", ipv4(postfix::CLEAR))])?;
    seen.advises("-o smtpd_tls_wrappermode=yes")?;
    seen.advises("protocol = \"submission\"")
}

fn mute(testbed: &Testbed) -> anyhow::Result<()> {
    let listeners = [listener("l", "submission", &[ipv4(postfix::WRAPPED)])];
    let seen = run_json(&testbed.topology.edge, &listeners, &["--timeout", "6s"])?;
    seen.expect(&[&format!("l/{} mute", ipv4(postfix::WRAPPED))])?;
    seen.advises("protocol = \"submissions\"")
}

fn forgeable(testbed: &Testbed) -> anyhow::Result<()> {
    let port = postfix::FORGEABLE;
    let listeners = [listener("l", "submission", &both(port))];
    let seen = run_json(&testbed.topology.edge, &listeners, &[])?;
    let [v4, v6] = Family::ALL.map(|family| format!("l/{} forgeable", at(family, port)));
    seen.expect(&[&v4, &v6])?;
    shut(testbed, &seen)?;
    run_json(&testbed.topology.edge, &listeners, &[])?.expect(&[])
}

/// Runs the commands that the doctor printed, on the mail host.
fn shut(testbed: &Testbed, seen: &DoctorRun) -> anyhow::Result<()> {
    let mut lines = seen.lines();
    lines.dedup();
    for line in lines.iter().filter(|line| line.starts_with("nft ")) {
        let output = testbed.topology.mail.run(|| Command::new("sh").args(["-c", line]).output())??;
        ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn forgeable_by_strangers(testbed: &Testbed) -> anyhow::Result<()> {
    let port = postfix::FORGEABLE_BY_STRANGERS;
    let open = [listener("open", "submission", &both(port))];
    let seen = run_json(&testbed.topology.client, &open, &["--untrusted"])?;
    let [v4, v6] = Family::ALL.map(|family| format!("open/{} forgeable", at(family, port)));
    seen.expect(&[&v4, &v6])?;
    seen.advises(&format!(
        "nft 'add rule inet proxy_ports input ip saddr != INJECTOR_IPV4 tcp dport {port} counter drop'"
    ))?;
    let shut = [
        listener("smtp", "smtp", &both(postfix::POSTSCREEN)),
        listener("imaps", "imaps", &both(dovecot::IMAPS)),
        listener("bare", "submission", &[ipv4(postfix::BARE_SMTPD)]),
    ];
    run_json(&testbed.topology.client, &shut, &["--untrusted"])?.expect(&[])
}

/// Postfix' log must not have what the doctor may never cause: a message would have a Message-ID
/// and a queue id.
fn nothing_sent(testbed: &Testbed) -> anyhow::Result<()> {
    let log = testbed.standard_postfix.log().since(Mark::default());
    let sent =
        log.lines().find(|line| ["message-id=", "data=", "status="].iter().any(|sign| line.contains(sign)));
    ensure!(sent.is_none(), "the doctor sent mail: {}", sent.unwrap_or_default());
    Ok(())
}

fn relays_for_localhost(testbed: &Testbed) -> anyhow::Result<()> {
    const SETTING: &str = "-o smtpd_relay_restrictions=permit_sasl_authenticated,reject_unauth_destination";
    let port = postfix::STANDARD_REPAIRED;
    let seen = one(testbed, "submission", port)?;
    seen.expect(&[&format!("l/{} note relays_for_localhost", ipv4(port))])?;
    ensure!(seen.relay_answers() == ["accepted", "refused"], "{:?}", seen.relay_answers());
    seen.advises(SETTING)?;
    // Postfix took the client of both recipients from the header.
    let service = format!("postfix/{port}/smtpd[");
    let log = testbed.standard_postfix.log();
    log.wait_for(Mark::default(), &[&service, ": client=unknown[127.0.0.1]"], LIMIT)?;
    let refused = "RCPT from unknown[192.0.2.1]: 454 4.7.1 <relay-test@example.com>: Relay access denied";
    log.wait_for(Mark::default(), &[&service, refused], LIMIT)?;

    postfix::set(&testbed.topology.mail, &testbed.standard_postfix, port, SETTING)?;
    patiently(|| one(testbed, "submission", port), |seen| seen.findings().is_empty())?.expect(&[])?;
    nothing_sent(testbed)
}

fn open_relay_for_strangers(testbed: &Testbed) -> anyhow::Result<()> {
    let port = postfix::STANDARD_OPEN;
    let open = [listener("open", "submission", &[ipv4(port)])];
    let seen = run_json(&testbed.topology.client, &open, &["--untrusted"])?;
    seen.expect(&[&format!("open/{} open_relay", ipv4(port))])?;
    // On the injector's host: a header from its other addresses is trusted as well.
    let edge = run_json(&testbed.topology.edge, &open, &[])?;
    edge.expect(&[&format!("open/{} forgeable", ipv4(port)), &format!("open/{} open_relay", ipv4(port))])?;
    shut(testbed, &edge)?;
    run_json(&testbed.topology.client, &open, &["--untrusted"])?.expect(&[])?;
    let note = format!("open/{} note relays_for_localhost", ipv4(port));
    run_json(&testbed.topology.edge, &open, &[])?.expect(&[&note])?;
    nothing_sent(testbed)
}

fn relays_over_all_services(testbed: &Testbed) -> anyhow::Result<()> {
    let services = [
        ("smtp", postfix::STANDARD_POSTSCREEN),
        ("submission", postfix::STANDARD_SMTPD),
        ("submissions", postfix::STANDARD_WRAPPED),
        ("starttls", postfix::STANDARD_ENCRYPTED),
    ];
    let listeners = services.map(|(name, port)| {
        let protocol = if name == "starttls" { "submission" } else { name };
        listener(name, protocol, &[ipv4(port)])
    });
    let seen = run_json(&testbed.topology.edge, &listeners, &[])?;
    let expected: Vec<_> = services
        .iter()
        .map(|(name, port)| format!("{name}/{} note relays_for_localhost", ipv4(*port)))
        .collect();
    seen.expect(&expected.iter().map(String::as_str).collect::<Vec<_>>())?;
    ensure!(seen.relay_answers() == ["accepted", "refused"].repeat(4), "{:?}", seen.relay_answers());
    // Closed to untrusted hosts, it does not relay for them.
    run_json(&testbed.topology.client, &listeners, &["--untrusted"])?.expect(&[])?;
    nothing_sent(testbed)
}

fn open_relay(testbed: &Testbed) -> anyhow::Result<()> {
    let port = postfix::OPEN_RELAY;
    let seen = one(testbed, "submission", port)?;
    seen.expect(&[&format!("l/{} open_relay", ipv4(port))])?;
    ensure!(seen.relay_answers() == ["accepted", "accepted"], "{:?}", seen.relay_answers());
    nothing_sent(testbed)
}

fn greylisted(testbed: &Testbed) -> anyhow::Result<()> {
    let seen = one(testbed, "submission", postfix::GREYLISTED)?;
    seen.expect(&[&format!("l/{} note relay_unknown", ipv4(postfix::GREYLISTED))])?;
    ensure!(seen.relay_answers() == ["unknown"], "{:?}", seen.relay_answers());
    Ok(())
}

fn trusts_localhost(testbed: &Testbed) -> anyhow::Result<()> {
    let ports = [dovecot::TRUSTING_IMAP, dovecot::TRUSTING_POP3];
    let listeners =
        [listener("imap", "imap", &[ipv4(ports[0])]), listener("pop3", "pop3", &[ipv4(ports[1])])];
    let seen = run_json(&testbed.topology.edge, &listeners, &[])?;
    seen.expect(&[
        &format!("imap/{} note trusts_localhost", ipv4(ports[0])),
        &format!("pop3/{} note trusts_localhost", ipv4(ports[1])),
    ])?;
    seen.advises("login_trusted_networks =")
}

fn untrusted(testbed: &Testbed) -> anyhow::Result<()> {
    let listeners = [
        listener("imaps", "imaps", &both(dovecot::UNTRUSTED_IMAPS)),
        listener("pop3", "pop3", &both(dovecot::UNTRUSTED_POP3)),
    ];
    let seen = run_json(&testbed.topology.edge, &listeners, &[])?;
    let [imaps4, imaps6] =
        Family::ALL.map(|family| format!("imaps/{} untrusted", at(family, dovecot::UNTRUSTED_IMAPS)));
    let [pop4, pop6] =
        Family::ALL.map(|family| format!("pop3/{} untrusted", at(family, dovecot::UNTRUSTED_POP3)));
    seen.expect(&[&imaps4, &imaps6, &pop4, &pop6])?;
    seen.advises("haproxy_trusted_networks = 10.25.0.1")?;
    seen.advises("haproxy_trusted_networks = fd25::1")?;
    let dovecot = &testbed.distrustful_dovecot;
    dovecot.log().wait_for(Mark::default(), &["haproxy: Client not trusted (rip=10.25.0.1)"], LIMIT)?;

    let name = "haproxy_trusted_networks = ";
    let mut addresses: Vec<_> =
        seen.lines().iter().filter_map(|line| line.strip_prefix(name)).map(str::to_owned).collect();
    addresses.sort();
    addresses.dedup();
    dovecot::set(&testbed.topology.mail, dovecot, &format!("{name}{}", addresses.join(" ")))?;
    patiently(|| run_json(&testbed.topology.edge, &listeners, &[]), |seen| seen.findings().is_empty())?
        .expect(&[])
}

/// A server reloads some time after the signal.
pub(crate) fn patiently(
    run_json: impl Fn() -> anyhow::Result<DoctorRun>,
    done: impl Fn(&DoctorRun) -> bool,
) -> anyhow::Result<DoctorRun> {
    let deadline = Instant::now() + LIMIT;
    loop {
        thread::sleep(Duration::from_millis(300));
        let seen = run_json()?;
        if done(&seen) || Instant::now() > deadline {
            return Ok(seen);
        }
    }
}

fn no_haproxy(testbed: &Testbed) -> anyhow::Result<()> {
    let ports = [dovecot::BARE_IMAPS, dovecot::BARE_POP3];
    let listeners =
        [listener("imaps", "imaps", &[ipv4(ports[0])]), listener("pop3", "pop3", &[ipv4(ports[1])])];
    let seen = run_json(&testbed.topology.edge, &listeners, &[])?;
    seen.expect(&[
        &format!("imaps/{} no_proxy", ipv4(ports[0])),
        &format!("pop3/{} no_proxy", ipv4(ports[1])),
    ])?;
    ensure!(seen.servers() == ["Dovecot", "Dovecot"], "{:?}", seen.servers());
    for line in [
        "service imap-login {",
        "service pop3-login {",
        "haproxy = yes",
        "haproxy_trusted_networks = 10.25.0.1",
    ] {
        seen.advises(line)?;
    }
    Ok(())
}

fn v1_only(testbed: &Testbed) -> anyhow::Result<()> {
    let seen = one(testbed, "smtp", receivers::V1_ONLY)?;
    seen.expect(&[&format!("l/{} wants_v1", ipv4(receivers::V1_ONLY))])?;
    seen.advises("version = \"v1\"")?;
    let more = "[listener.receiver]\nversion = \"v1\"\n";
    let mended = Listener { more, ..listener("l", "smtp", &[ipv4(receivers::V1_ONLY)]) };
    run_json(&testbed.topology.edge, &[mended], &[])?.expect(&[])
}

fn v2_only(testbed: &Testbed) -> anyhow::Result<()> {
    let more = "[listener.receiver]\nversion = \"v1\"\n";
    let listener = Listener { more, ..listener("l", "smtp", &[ipv4(receivers::V2_ONLY)]) };
    let seen = run_json(&testbed.topology.edge, &[listener], &[])?;
    seen.expect(&[&format!("l/{} wants_v2", ipv4(receivers::V2_ONLY))])?;
    seen.advises("version = \"v2\"")
}

fn header_optional(testbed: &Testbed) -> anyhow::Result<()> {
    let port = receivers::OPTIONAL;
    let seen = one(testbed, "smtp", port)?;
    seen.expect(&[&format!("l/{} header_optional", ipv4(port))])?;
    seen.advises(&format!(
        "nft 'add rule inet proxy_ports input ip saddr != 10.25.0.1 tcp dport {port} counter drop'"
    ))
}

fn no_tlvs(testbed: &Testbed) -> anyhow::Result<()> {
    let more = "[listener.receiver]\ncrc32c = true\n";
    let listener = Listener { more, ..listener("l", "smtp", &[ipv4(receivers::NO_TLVS)]) };
    let seen = run_json(&testbed.topology.edge, &[listener], &[])?;
    seen.expect(&[&format!("l/{} refuses_tlvs", ipv4(receivers::NO_TLVS))])
}

fn not_listening(testbed: &Testbed) -> anyhow::Result<()> {
    let seen = one(testbed, "submission", NOTHING)?;
    seen.expect(&[&format!("l/{} not_listening", ipv4(NOTHING))])?;
    seen.advises(&format!("{NOTHING} inet n - n - - smtpd"))
}

fn no_answer(testbed: &Testbed) -> anyhow::Result<()> {
    let seen = one(testbed, "smtp", DROPPED)?;
    seen.expect(&[&format!("l/{} no_answer", ipv4(DROPPED))])?;
    seen.advises(&format!("ip saddr 10.25.0.1 tcp dport {DROPPED} accept"))
}

fn no_address(testbed: &Testbed) -> anyhow::Result<()> {
    let backends = ["nowhere.invalid:2525".to_owned()];
    let seen = run_json(&testbed.topology.edge, &[listener("l", "smtp", &backends)], &["--timeout", "2s"])?;
    seen.expect(&["l/nowhere.invalid:2525 no_address"])
}

/// On the mail host itself, `localhost` reaches Postfix by either family; a firewall cannot tell
/// the clients apart.
fn name(testbed: &Testbed) -> anyhow::Result<()> {
    let port = postfix::FORGEABLE_BY_STRANGERS;
    let backends = [format!("localhost:{port}")];
    let seen = run_json(&testbed.topology.mail, &[listener("l", "submission", &backends)], &[])?;
    let expected = ["127.0.0.1", "[::1]"].map(|ip| format!("l/{ip}:{port} note loopback"));
    let got = seen.findings();
    // Where localhost has no IPv6 address, one remains.
    ensure!(got == expected || got == expected[..1], "{got:?}");
    ensure!(seen.code == Some(0), "exit code {:?}", seen.code);
    Ok(())
}

fn exit_codes(testbed: &Testbed) -> anyhow::Result<()> {
    let edge = &testbed.topology.edge;
    let config = configuration(&[
        listener("refusing", "smtp", &[ipv4(NOTHING)]),
        listener("other", "imaps", &[ipv4(dovecot::IMAPS)]),
    ]);
    let output = run(edge, &config, &[])?;
    let printed = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.code() == Some(1), "{:?}: {printed}", output.status);
    for part in
        ["FAULT not_listening", "which sees 10.25.0.1 (Dovecot)", "    ok\n", "2 addresses, 1 fault\n"]
    {
        ensure!(printed.contains(part), "no {part:?} in\n{printed}");
    }
    let output = run(edge, &config, &["--listener", "other"])?;
    ensure!(output.status.code() == Some(0), "{:?}", output.status);
    let output = run(edge, &config, &["--listener", "none"])?;
    let printed = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(2) && printed.contains("refusing, other"),
        "{:?}: {printed}",
        output.status
    );
    let output = run(edge, "nonsense", &[])?;
    ensure!(output.status.code() == Some(2), "{:?}", output.status);
    Ok(())
}
