//! `injector probe` as operators run it: through the injector, to real Postfix and Dovecot.
//!
//! The probe runs in the client's namespace, the injector with the splice engine on the edge. All
//! trials share one testbed.

mod gateway;
mod testbed;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, ensure};
use injector_testbed::dovecot::PASSWORD;
use injector_testbed::mail_client;
use injector_testbed::message::Message;
use injector_testbed::netns::{self, CLIENT, EDGE_INSIDE, Family, MAIL};
use injector_testbed::service::{IMAP, IMAPS, SMTP, SUBMISSION, SUBMISSIONS, Service};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use gateway::Gateway;
use testbed::{Outcome, Testbed};

/// The testbed, created when the first trial needs it.
type Shared = Arc<OnceLock<Result<Testbed, String>>>;

/// A trial.
type Run = fn(&Testbed) -> anyhow::Result<()>;

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(1);
    let shared = Shared::default();
    let mut trials = Vec::new();
    for (smtp, smtp_tls, imap, imap_tls) in [
        (SMTP, "none", IMAP, "none"),
        (SMTP, "starttls", IMAPS, "implicit"),
        (SUBMISSION, "starttls", IMAP, "starttls"),
        (SUBMISSIONS, "implicit", IMAPS, "implicit"),
    ] {
        for family in Family::ALL {
            let name = format!(
                "roundtrip/{}/{} {smtp_tls} and {} {imap_tls}",
                family.name(),
                smtp.standard,
                imap.standard
            );
            trials.push(trial(&shared, name, move |testbed| {
                roundtrip(testbed, family, (smtp, smtp_tls), (imap, imap_tls))
            }));
        }
    }
    let others: [(&str, Run); 12] = [
        ("a wrong password", wrong_password),
        ("mail that never arrives", never_arrives),
        ("connection refused", closed_port),
        ("an untrusted certificate", strange_certificate),
        ("any certificate with --insecure", insecure),
        ("an unexpected client address", other_client),
        ("old probe mail is deleted, other mail stays", leftovers),
        ("metrics are pushed to a Pushgateway", pushed),
        ("a Pushgateway that rejects metrics", refused_by_gateway),
        ("a PROXY port that responds, then one that relays", open_proxy_ports),
        ("a port without PROXY, beside a failed roundtrip", no_proxy_port),
        // The last: it sets up a firewall.
        ("PROXY ports behind a firewall", closed_proxy_ports),
    ];
    trials.extend(others.map(|(name, run)| trial(&shared, name.to_owned(), run)));
    // The testbed is dropped with the last trial. A value that main holds would never be dropped,
    // because main ends by exit(3).
    drop(shared);
    libtest_mimic::run(&arguments, trials).exit();
}

fn trial(
    shared: &Shared,
    name: String,
    run: impl Fn(&Testbed) -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    let shared = Arc::clone(shared);
    Trial::ignorable_test(name, move || {
        if let Some(reason) = netns::unavailable() {
            return Ok(Completion::ignored_with(reason));
        }
        let testbed = shared.get_or_init(|| Testbed::new().map_err(|error| format!("no testbed: {error:#}")));
        let testbed = testbed.as_ref().map_err(Clone::clone)?;
        let marks = testbed.host.mark();
        run(testbed).map(|()| Completion::Completed).map_err(|error| {
            Failed::from(format!("{error:#}\n\nlogged meanwhile:\n{}", testbed.host.logged_since(marks)))
        })
    })
}

fn roundtrip(
    testbed: &Testbed,
    family: Family,
    (smtp, smtp_tls): (Service, &str),
    (imap, imap_tls): (Service, &str),
) -> anyhow::Result<()> {
    let user = format!("probe-{}-{}-{smtp_tls}", family.name(), smtp.standard);
    let before = testbed.injector.sessions()?.len();
    let outcome = testbed.probe(
        family,
        smtp,
        imap,
        &user,
        &["--smtp-tls", smtp_tls, "--imap-tls", imap_tls, "--expect-client", "local"],
    )?;
    outcome.ensure_passed()?;
    let mut expected = vec!["smtp_connect", "smtp_greeting", "smtp_send", "imap_connect", "imap_greeting"];
    expected.extend(["imap_login", "arrival", "content", "client_address", "cleanup"]);
    expected.extend((smtp_tls != "none").then_some("smtp_tls"));
    expected.extend((imap_tls != "none").then_some("imap_tls"));
    // Postfix offers AUTH only on the submission ports.
    expected.extend((smtp != SMTP).then_some("smtp_login"));
    let mut steps = outcome.steps()?;
    steps.sort_unstable();
    expected.sort_unstable();
    ensure!(steps == expected, "steps {steps:?}, not {expected:?}");
    ensure!(outcome.sample("injector_probe_success", None)? == 1.0, "the textfile reports a failure");
    ensure!(
        outcome.metrics.lines().filter(|line| line.contains("step_failed{") && line.ends_with(" 1")).count()
            == 0
    );
    // Both connections went through the injector, and the mailbox is unchanged.
    let sessions = testbed.injector.sessions_within(before + 2)?;
    for session in sessions.iter().skip(before) {
        let client = session.client().context("no client")?;
        ensure!(client.ip() == CLIENT.of(family), "the injector saw {client}");
    }
    ensure!(testbed.inbox(&user)?.is_empty(), "the message was not deleted");
    Ok(())
}

fn wrong_password(testbed: &Testbed) -> anyhow::Result<()> {
    let file = testbed.folder.path().join("kept.prom");
    let textfile = ["--textfile", &file.display().to_string()].map(str::to_owned);
    let textfile: Vec<_> = textfile.iter().map(String::as_str).collect();
    let good = testbed.probe(Family::V4, SMTP, IMAPS, "wrong", &textfile)?;
    good.ensure_passed()?;
    let passed_at =
        value(&std::fs::read_to_string(&file)?, "injector_probe_last_success_timestamp_seconds", None)?;
    let secret = "not-the-password-7391";
    let outcome = testbed.probe_with_password(Family::V4, SMTP, IMAPS, "wrong", secret, &textfile)?;
    outcome.ensure_failed_at("imap_login")?;
    ensure!(outcome.output.contains("AUTHENTICATIONFAILED"), "not in the server's words: {}", outcome.output);
    ensure!(!outcome.output.contains(secret), "the password is in the output");
    let metrics = std::fs::read_to_string(&file)?;
    ensure!(!metrics.contains(secret), "the password is in the metrics");
    ensure!(value(&metrics, "injector_probe_success", None)? == 0.0);
    ensure!(value(&metrics, "injector_probe_step_failed", Some("imap_login"))? == 1.0);
    ensure!(value(&metrics, "injector_probe_step_failed", Some("arrival"))? == 0.0);
    let kept = value(&metrics, "injector_probe_last_success_timestamp_seconds", None)?;
    ensure!(kept == passed_at, "the last success was at {passed_at}, and is {kept} after a failure");
    let last = value(&metrics, "injector_probe_last_run_timestamp_seconds", None)?;
    ensure!(last > passed_at, "the failed run is not the last");
    let outcome = testbed.probe_with_password(Family::V4, SUBMISSION, IMAPS, "wrong", secret, &[])?;
    outcome.ensure_failed_at("smtp_login")?;
    ensure!(!outcome.output.contains(secret), "the password is in the output");
    Ok(())
}

fn never_arrives(testbed: &Testbed) -> anyhow::Result<()> {
    let to = ["--to", "somebody-else@example.test", "--timeout", "6s"];
    let outcome = testbed.probe(Family::V4, SMTP, IMAPS, "waiting", &to)?;
    outcome.ensure_failed_at("arrival")?;
    ensure!(outcome.output.contains("6s of --timeout"), "{}", outcome.output);
    let seconds = outcome.sample("injector_probe_seconds", None)?;
    ensure!((6.0..9.0).contains(&seconds), "given up after {seconds} s");
    Ok(())
}

fn closed_port(testbed: &Testbed) -> anyhow::Result<()> {
    let closed = Service { standard: 2626, ..SMTP };
    let outcome = testbed.probe(Family::V6, closed, IMAPS, "closed", &[])?;
    outcome.ensure_failed_at("smtp_connect")?;
    ensure!(outcome.output.contains("refused"), "{}", outcome.output);
    Ok(())
}

fn strange_certificate(testbed: &Testbed) -> anyhow::Result<()> {
    let stranger = injector_testbed::certificate::Certificate::new(testbed.strange_folder.path())?;
    let file = testbed.folder.path().join("stranger.pem");
    std::fs::write(&file, &stranger.authority_pem)?;
    let outcome =
        testbed.probe(Family::V4, SUBMISSIONS, IMAPS, "strange", &["--ca", &file.display().to_string()])?;
    outcome.ensure_failed_at("smtp_tls")?;
    let outcome =
        testbed.probe(Family::V4, SUBMISSION, IMAPS, "strange", &["--ca", &file.display().to_string()])?;
    outcome.ensure_failed_at("smtp_tls")?;
    let outcome =
        testbed.probe(Family::V4, SMTP, IMAPS, "strange", &["--ca", &file.display().to_string()])?;
    outcome.ensure_failed_at("imap_tls")
}

fn insecure(testbed: &Testbed) -> anyhow::Result<()> {
    let flags = ["--insecure", "--tls-name", "no-such-name.example.test"];
    testbed.probe_bare(Family::V4, SUBMISSION, IMAPS, "insecure", PASSWORD, &flags)?.ensure_passed()?;
    testbed.probe_bare(Family::V4, SUBMISSIONS, IMAP, "insecure", PASSWORD, &flags)?.ensure_passed()
}

fn other_client(testbed: &Testbed) -> anyhow::Result<()> {
    let right = ["--expect-client", &CLIENT.v4.to_string()];
    testbed.probe(Family::V4, SMTP, IMAPS, "other", &right)?.ensure_passed()?;
    let outcome = testbed.probe(Family::V4, SMTP, IMAPS, "other", &["--expect-client", "203.0.113.9"])?;
    outcome.ensure_failed_at("client_address")?;
    ensure!(outcome.output.contains(&format!("as {}, not as 203.0.113.9", CLIENT.v4)), "{}", outcome.output);
    ensure!(testbed.inbox("other")?.is_empty(), "a message of no use was kept");
    Ok(())
}

/// Four messages are in the mailbox: one of an earlier run, one of a concurrent run, one of another
/// probe, and real mail.
fn leftovers(testbed: &Testbed) -> anyhow::Result<()> {
    let user = "leftovers";
    let mail = Message::new("real", user);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let of = |probe: &str, began: u64| {
        let text = format!("X-Injector-Probe: {probe} {began} 0123\r\nSubject: left\r\n\r\nleft\r\n");
        let mut message = Message::new("left", user);
        message.bytes = text.into_bytes();
        message
    };
    let (left, at_work, others) = (of("mail", now - 3600), of("mail", now), of("mail-v6", now - 3600));
    let server = testbed.standard(Family::V4, IMAPS);
    let append = [&left, &at_work, &others, &mail];
    mail_client::read_inbox(&testbed.topology.edge, server, user, &append)?;

    let outcome = testbed.probe(Family::V4, SMTP, IMAPS, user, &[])?;
    outcome.ensure_passed()?;
    ensure!(outcome.sample("injector_probe_leftovers_deleted", None)? == 1.0, "{}", outcome.metrics);
    let inbox = testbed.inbox(user)?;
    ensure!(inbox.len() == 3, "{} messages, not three", inbox.len());
    let has = |message: &Message| inbox.contains(&message.bytes);
    ensure!(has(&at_work) && has(&others) && has(&mail) && !has(&left), "other messages than these are left");
    Ok(())
}

fn pushed(testbed: &Testbed) -> anyhow::Result<()> {
    let gateway = Gateway::start(&testbed.topology.client, 200, "")?;
    let url = format!("http://{}", gateway.address());
    testbed.probe(Family::V4, SMTP, IMAPS, "pushed", &["--pushgateway", &url])?.ensure_passed()?;
    let failing = ["--pushgateway", &url, "--mailbox", "nowhere"];
    testbed.probe(Family::V4, SMTP, IMAPS, "pushed", &failing)?.ensure_failed_at("imap_login")?;
    let requests = gateway.requests();
    let [success, failure] = &requests[..] else {
        anyhow::bail!("{} requests: {requests:#?}", requests.len())
    };
    ensure!(success.line == "PUT /metrics/job/injector_probe/probe/mail HTTP/1.1", "{success:?}");
    ensure!(success.body.contains("injector_probe_success{probe=\"mail\"} 1\n"), "{success:?}");
    // A failure must not overwrite the time of the last success.
    ensure!(failure.line == "POST /metrics/job/injector_probe/probe/mail HTTP/1.1", "{failure:?}");
    ensure!(failure.body.contains("injector_probe_success{probe=\"mail\"} 0\n"), "{failure:?}");
    ensure!(!failure.body.contains("last_success"), "{failure:?}");
    Ok(())
}

fn refused_by_gateway(testbed: &Testbed) -> anyhow::Result<()> {
    let gateway = Gateway::start(&testbed.topology.client, 400, "pushed metrics are invalid")?;
    let url = format!("http://{}", gateway.address());
    let outcome = testbed.probe(Family::V4, SMTP, IMAPS, "refused", &["--pushgateway", &url])?;
    ensure!(!outcome.succeeded, "the exit code reports success");
    ensure!(outcome.output.contains("400") && outcome.output.contains("are invalid"), "{}", outcome.output);
    Ok(())
}

/// A sample of an exposition of one probe.
fn value(metrics: &str, name: &str, step: Option<&str>) -> anyhow::Result<f64> {
    let step = step.map(|step| format!(",step=\"{step}\"")).unwrap_or_default();
    let series = format!("{name}{{probe=\"mail\"{step}}} ");
    let found = metrics.lines().find_map(|line| line.strip_prefix(&series));
    Ok(found.with_context(|| format!("no {series}in:\n{metrics}"))?.parse()?)
}

fn port_value(metrics: &str, name: &str, port: &str) -> anyhow::Result<f64> {
    let series = format!("{name}{{probe=\"mail\",proxy_port=\"{port}\"}} ");
    let found = metrics.lines().find_map(|line| line.strip_prefix(&series));
    Ok(found.with_context(|| format!("no {series}in:\n{metrics}"))?.parse()?)
}

/// `--proxy-port` for ports of the mail host.
fn proxy_ports(ports: &[(Family, u16)]) -> Vec<String> {
    let server = |(family, port): &(Family, u16)| SocketAddr::new(MAIL.of(*family), *port).to_string();
    ports.iter().flat_map(|port| ["--proxy-port".to_owned(), server(port)]).collect()
}

fn open_proxy_ports(testbed: &Testbed) -> anyhow::Result<()> {
    const STOCK: &str =
        "smtpd_relay_restrictions=permit_mynetworks,permit_sasl_authenticated,defer_unauth_destination";
    const SAFE: &str = "smtpd_relay_restrictions=permit_sasl_authenticated,reject_unauth_destination";
    let flags = proxy_ports(&[
        (Family::V4, SMTP.proxied),
        (Family::V6, SMTP.proxied),
        (Family::V4, SUBMISSIONS.proxied),
        (Family::V4, IMAPS.proxied),
    ]);
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    // A shorter timeout for the port that waits for TLS.
    let all = [&flags[..], &["--timeout", "15s"]].concat();
    let tried = || testbed.probe(Family::V4, SMTP, IMAPS, "ports", &all);
    let [smtp, smtp6, submissions, imaps] = [&flags[1], &flags[3], &flags[5], &flags[7]];
    let states = |outcome: &Outcome| -> anyhow::Result<Vec<(f64, f64)>> {
        let gauges = [smtp, smtp6, submissions, imaps].map(|port| {
            let of = |name| port_value(&outcome.metrics, name, port);
            Ok((of("injector_probe_proxy_port_open")?, of("injector_probe_proxy_port_relays")?))
        });
        gauges.into_iter().collect()
    };
    let outcome = tried()?;
    outcome.ensure_failed_at("proxy_port")?;
    // Dovecot has a list of trusted hosts. The mail roundtrip succeeds all the same.
    ensure!(states(&outcome)? == [(1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (0.0, 0.0)], "{}", outcome.output);
    ensure!(outcome.steps()?.contains(&"cleanup"), "{}", outcome.output);
    ensure!(outcome.sample("injector_probe_step_failed", Some("proxy_port"))? == 1.0);

    let postfix = &testbed.host.postfix;
    postfix.set(&testbed.topology.mail, &[STOCK])?;
    let mark = postfix.log().mark();
    let outcome = tried();
    postfix.set(&testbed.topology.mail, &[SAFE])?;
    let outcome = outcome?;
    outcome.ensure_failed_at("proxy_port")?;
    // The submission ports have their own restrictions, which reject clients without login.
    ensure!(states(&outcome)? == [(1.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)], "{}", outcome.output);
    ensure!(outcome.output.contains("OPEN RELAY"), "{}", outcome.output);
    let logged = postfix.log().since(mark);
    ensure!(logged.contains("client=unknown[127.0.0.1]"), "{logged}");
    ensure!(!logged.contains("to=<relay-test@example.com>, "), "a message was made:\n{logged}");
    Ok(())
}

fn no_proxy_port(testbed: &Testbed) -> anyhow::Result<()> {
    let flags = proxy_ports(&[(Family::V4, SMTP.standard)]);
    let mut flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let outcome = testbed.probe(Family::V4, SMTP, IMAPS, "standard", &flags)?;
    outcome.ensure_failed_at("proxy_port")?;
    ensure!(outcome.output.contains("it is not a PROXY port"), "{}", outcome.output);
    // A failed roundtrip is reported first, and hides nothing.
    flags.extend(["--mailbox", "nowhere"]);
    let outcome = testbed.probe(Family::V4, SMTP, IMAPS, "standard", &flags)?;
    outcome.ensure_failed_at("imap_login")?;
    ensure!(outcome.sample("injector_probe_step_failed", Some("proxy_port"))? == 1.0);
    Ok(())
}

fn closed_proxy_ports(testbed: &Testbed) -> anyhow::Result<()> {
    let ports = [(Family::V4, SMTP.proxied), (Family::V6, SMTP.proxied), (Family::V4, SUBMISSION.proxied)];
    testbed.topology.mail.nft(&format!(
        "add table inet ports; add chain inet ports input {{ type filter hook input priority 0; }}; \
         add rule inet ports input ip saddr != {} tcp dport {{ {}, {} }} drop; \
         add rule inet ports input ip6 saddr != {} tcp dport {} reject with tcp reset",
        EDGE_INSIDE.v4, SMTP.proxied, SUBMISSION.proxied, EDGE_INSIDE.v6, SMTP.proxied
    ))?;
    let flags = proxy_ports(&ports);
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let outcome = testbed.probe(Family::V4, SMTP, IMAPS, "closed", &flags)?;
    outcome.ensure_passed()?;
    for port in [flags[1], flags[3], flags[5]] {
        ensure!(port_value(&outcome.metrics, "injector_probe_proxy_port_open", port)? == 0.0);
    }
    // The probe does not wait twice: the ports are tested beside the roundtrip, and the reported
    // time is the roundtrip's.
    ensure!(outcome.sample("injector_probe_seconds", None)? < 5.0, "{}", outcome.metrics);
    Ok(())
}

impl Outcome {
    fn ensure_passed(&self) -> anyhow::Result<()> {
        ensure!(self.succeeded, "the probe failed:\n{}", self.output);
        Ok(())
    }

    fn ensure_failed_at(&self, step: &str) -> anyhow::Result<()> {
        ensure!(!self.succeeded, "the probe passed:\n{}", self.output);
        let failed = self.report.as_ref().and_then(|report| report["failure"]["step"].as_str());
        ensure!(failed == Some(step), "failed at {failed:?}, not at {step}:\n{}", self.output);
        let advice = self.report.as_ref().and_then(|report| report["failure"]["advice"].as_str());
        ensure!(advice.is_some_and(|advice| !advice.is_empty()), "no advice:\n{}", self.output);
        Ok(())
    }

    fn steps(&self) -> anyhow::Result<Vec<&str>> {
        let steps =
            self.report.as_ref().and_then(|report| report["steps"].as_array()).context("no report")?;
        Ok(steps.iter().filter_map(|step| step["step"].as_str()).collect())
    }

    fn sample(&self, name: &str, step: Option<&str>) -> anyhow::Result<f64> {
        value(&self.metrics, name, step)
    }
}
