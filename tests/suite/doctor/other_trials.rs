//! Servers other than Postfix and Dovecot, and settings that reach the ports of other clients.

use anyhow::ensure;
use injector_testbed::receivers;

use crate::doctor_run::{listener, run_json};
use crate::testbed::Testbed;
use crate::trials::{Run, both, ipv4, one, patiently};
use crate::{others, postfix};

pub(crate) const ALL: &[(&str, Run)] = &[
    ("opensmtpd/implicit TLS", opensmtpd_in_tls),
    ("postfix/setting in main.cf, then in master.cf alone", setting_in_main_cf),
    ("exim/as documented", exim),
    ("exim/edge not in hosts_proxy", exim_for_others),
    ("opensmtpd/as documented", opensmtpd),
    ("opensmtpd/no proxy-v2", opensmtpd_bare),
    ("postfix/backend on port 25", backend_on_25),
];

/// Exim greets a client without a header, and then refuses its commands.
fn exim(testbed: &Testbed) -> anyhow::Result<()> {
    let [smtp, smtps] = others::EXIM;
    let listeners = [listener("smtp", "smtp", &both(smtp)), listener("smtps", "submissions", &both(smtps))];
    let seen = run_json(&testbed.topology.edge, &listeners, &[])?;
    seen.expect(&[])?;
    ensure!(seen.servers() == ["Exim"; 4], "{:?}", seen.servers());
    Ok(())
}

/// The advice must be a line of the documentation, for either family.
fn exim_for_others(testbed: &Testbed) -> anyhow::Result<()> {
    let [smtp, _] = others::EXIM_FOR_OTHERS;
    let seen = run_json(&testbed.topology.edge, &[listener("l", "smtp", &both(smtp))], &[])?;
    let [v4, v6] = both(smtp).try_into().unwrap_or_default();
    seen.expect(&[&format!("l/{v4} no_proxy"), &format!("l/{v6} no_proxy")])?;
    ensure!(seen.servers() == ["Exim"; 2], "{:?}", seen.servers());
    seen.advises("hosts_proxy = <; 10.25.0.1")?;
    seen.advises("hosts_proxy = <; fd25::1")?;
    let documented = receivers::documented("Exim")?;
    ensure!(documented.contains("hosts_proxy = <; 10.25.0.1 ; fd25::1\n"), "{documented}");
    Ok(())
}

fn opensmtpd(testbed: &Testbed) -> anyhow::Result<()> {
    let listeners = [listener("l", "smtp", &both(others::OPENSMTPD))];
    let seen = run_json(&testbed.topology.edge, &listeners, &["--timeout", "4s"])?;
    seen.expect(&[])?;
    ensure!(seen.servers() == ["OpenSMTPD"; 2], "{:?}", seen.servers());
    Ok(())
}

fn opensmtpd_bare(testbed: &Testbed) -> anyhow::Result<()> {
    let port = others::OPENSMTPD_BARE;
    let seen = one(testbed, "smtp", port)?;
    seen.expect(&[&format!("l/{} no_proxy", ipv4(port))])?;
    seen.advises(&format!("listen on … port {port} proxy-v2"))
}

/// OpenSMTPD waits forever if it reads a header and a ClientHello together.
fn opensmtpd_in_tls(testbed: &Testbed) -> anyhow::Result<()> {
    let port = others::OPENSMTPD_TLS;
    let listeners = [listener("l", "submissions", &[ipv4(port)])];
    let seen = run_json(&testbed.topology.edge, &listeners, &["--timeout", "3s"])?;
    seen.expect(&[&format!("l/{} mute", ipv4(port))])
}

fn setting_in_main_cf(testbed: &Testbed) -> anyhow::Result<()> {
    let backends = [format!("{}:{}", postfix::EVERYWHERE, postfix::EVERYWHERE_SMTPD)];
    let listeners = [listener("l", "smtp", &backends)];
    let seen = run_json(&testbed.topology.edge, &listeners, &[])?;
    seen.expect(&[&format!("l/{} standard_port", backends[0])])?;
    seen.advises(&format!("{} inet n - n - - smtpd", postfix::EVERYWHERE_SMTPD))?;
    seen.advises("-o smtpd_upstream_proxy_protocol=haproxy")?;
    seen.advises("smtpd_upstream_proxy_protocol =")?;
    let everywhere = &testbed.setting_everywhere;
    everywhere.set(&testbed.topology.mail, &["smtpd_upstream_proxy_protocol="])?;
    patiently(|| run_json(&testbed.topology.edge, &listeners, &[]), |seen| seen.findings().is_empty())?
        .expect(&[])
}

/// 25 stays as it is for other clients; the injector gets a port of its own.
fn backend_on_25(testbed: &Testbed) -> anyhow::Result<()> {
    let backend = format!("{}:25", postfix::BARE);
    let seen =
        run_json(&testbed.topology.edge, &[listener("l", "smtp", std::slice::from_ref(&backend))], &[])?;
    seen.expect(&[&format!("l/{backend} no_proxy")])?;
    seen.advises("2525 inet n - n - - smtpd")?;
    seen.advises(&format!("backends = [\"{}:2525\"]", postfix::BARE))?;
    ensure!(!seen.lines().iter().any(|line| line.starts_with("25 ")), "{:#?}", seen.lines());
    Ok(())
}
