//! Debian's fail2ban on the log of a real Postfix, with the action of `deploy/fail2ban`.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use injector_testbed::daemon::{ADMIN, Injector, binary, configuration};
use injector_testbed::fail2ban::Fail2Ban;
use injector_testbed::forward::Forward;
use injector_testbed::mail_client::{self, Server};
use injector_testbed::mail_host::MailHost;
use injector_testbed::netns::{CLIENT, Family, VIP_RELAY};
use injector_testbed::service::SUBMISSION;

use crate::Run;
use crate::testbed::Testbed;

pub(crate) const TRIALS: &[(&str, Run)] = &[("fail2ban/a wrong password", wrong_password)];

const ACTION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/fail2ban/action.d/injector.conf");
const JAIL: &str = "injector-postfix-sasl";

/// The jail of `deploy/fail2ban`, with the log and the command of this test, and one try.
fn jail(log: &Path, command: &str) -> anyhow::Result<String> {
    let text = include_str!("../../../deploy/fail2ban/jail.d/injector.conf");
    let (_, jail) = text.split_once(&format!("[{JAIL}]\n")).context("no such jail")?;
    let (jail, _) = jail.split_once("\n[").context("no second jail")?;
    let mut lines = vec![format!("[{JAIL}]")];
    for line in jail.lines() {
        lines.push(match line.split(" = ").next() {
            Some("logpath") => format!("logpath = {}", log.display()),
            Some("action") => format!("action = injector[injector=\"{command}\"]"),
            Some("maxretry") => "maxretry = 1".to_owned(),
            _ => line.to_owned(),
        });
    }
    Ok(lines.join("\n"))
}

fn wrong_password(testbed: &Testbed) -> anyhow::Result<()> {
    let topology = &testbed.topology;
    let mail = MailHost::start(&topology.mail)?;
    let forwards = Family::ALL.map(|family| Forward::to_mail(VIP_RELAY, SUBMISSION, family));
    let config = configuration(&forwards, "relay", "127.0.0.1:9145".parse()?);
    let injector = Injector::start(&topology.edge, &format!("{ADMIN}\n[guard]\n{config}"))?;
    let command =
        format!("env INJECTOR_SOCKET={} {}", injector.admin_socket().display(), binary()?.display());
    let fail2ban =
        Fail2Ban::start(&topology.edge, &jail(mail.postfix.log().path(), &command)?, Path::new(ACTION))?;
    let [v4, v6] = Family::ALL.map(|family| SocketAddr::new(VIP_RELAY.of(family), SUBMISSION.standard));
    ensure!(testbed.is_served_at(v4)? && testbed.is_served_at(v6)?, "banned before the first try");

    let mark = mail.mark();
    let server = Server { address: v4, authority_pem: &mail.certificate.authority_pem };
    let login = mail_client::log_in(&topology.client, server, SUBMISSION.security, "reader", "guessed");
    let refusal = format!("{:#}", login.err().context("a wrong password is accepted")?);
    ensure!(refusal.contains("535"), "{refusal}");
    let tried = Instant::now();
    let banned = testbed.wait_served_at(v4, false, tried).with_context(|| {
        format!("{}{}", mail.logged_since(mark), fail2ban.log().since(Default::default()))
    })?;
    println!("  refused {banned:?} after the wrong login");
    let client = CLIENT.v4.to_string();
    let bans = injector.command(&["bans"])?;
    let listed =
        bans.lines().find(|line| line.contains(&client)).context("the ban is not listed")?.to_owned();
    ensure!(listed.contains(&format!("fail2ban:{JAIL}")), "{listed}");
    ensure!(testbed.is_served_at(v6)?, "another address is banned too");

    fail2ban.client(&["set", JAIL, "unbanip", &client])?;
    testbed.wait_served_at(v4, true, Instant::now())?;

    // Of the other family, and without an end.
    fail2ban.client(&["set", JAIL, "bantime", "-1"])?;
    fail2ban.client(&["set", JAIL, "banip", &CLIENT.v6.to_string()])?;
    testbed.wait_served_at(v6, false, Instant::now())?;
    // A ban that is there already is renewed; one that is not is lifted without an error.
    fail2ban.client(&["set", JAIL, "banip", &client])?;
    testbed.wait_served_at(v4, false, Instant::now())?;
    injector.command(&["unban", &client])?;
    // fail2ban lifts all its bans.
    let log = fail2ban.log().clone();
    fail2ban.stop()?;
    testbed.wait_served_at(v6, true, Instant::now())?;
    testbed.wait_served_at(v4, true, Instant::now())?;
    let errors: Vec<_> = log.lines_with(Default::default(), &[" ERROR "]);
    ensure!(errors.is_empty(), "fail2ban logged {errors:?}");
    Ok(())
}
