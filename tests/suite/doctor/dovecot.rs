//! Dovecot that trusts the edge, and one that trusts another host.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::ensure;
use injector_testbed::certificate::Certificate;
use injector_testbed::dovecot::Dovecot;
use injector_testbed::netns::{EDGE_INSIDE, MAIL, Netns};

/// IMAP in TLS, with a required header.
pub(crate) const IMAPS: u16 = 10993;
/// IMAP in TLS, without a header.
pub(crate) const BARE_IMAPS: u16 = 993;
/// POP3 in clear text, with a required header.
pub(crate) const POP3: u16 = 10110;
/// POP3 in clear text, without a header.
pub(crate) const BARE_POP3: u16 = 110;
/// As [`IMAPS`], of the Dovecot that trusts another host.
pub(crate) const UNTRUSTED_IMAPS: u16 = 20993;
/// The same in clear text.
pub(crate) const UNTRUSTED_POP3: u16 = 20110;

/// IMAP in clear text, of the Dovecot that trusts clients on its own host.
pub(crate) const TRUSTING_IMAP: u16 = 30143;
/// The same with POP3.
pub(crate) const TRUSTING_POP3: u16 = 30110;

/// As on hosts with webmail: clients on this host are trusted with passwords in clear text.
pub(crate) fn start_trusting_localhost(netns: &Netns, certificate: &Certificate) -> anyhow::Result<Dovecot> {
    let trusted = format!("{} {}", EDGE_INSIDE.v4, EDGE_INSIDE.v6);
    let more = format!(
        "login_trusted_networks = 127.0.0.0/8 ::1
service imap-login {{\n  inet_listener imaps {{\n    port = 0\n  }}
  inet_listener imap_proxied {{\n    port = {TRUSTING_IMAP}\n    haproxy = yes\n  }}\n}}
service pop3-login {{\n  inet_listener pop3 {{\n    port = 0\n  }}\n}}\n"
    );
    start_on(netns, certificate, &trusted, [30993, TRUSTING_POP3], &more)
}

pub(crate) fn start(netns: &Netns, certificate: &Certificate) -> anyhow::Result<Dovecot> {
    let trusted = format!("{} {}", EDGE_INSIDE.v4, EDGE_INSIDE.v6);
    let bare = format!(
        "service imap-login {{\n  inet_listener imaps {{\n    port = {BARE_IMAPS}\n    ssl = yes\n  }}\n}}
service pop3-login {{\n  inet_listener pop3 {{\n    port = {BARE_POP3}\n  }}\n}}\n"
    );
    start_on(netns, certificate, &trusted, [IMAPS, POP3], &bare)
}

pub(crate) fn start_distrustful(netns: &Netns, certificate: &Certificate) -> anyhow::Result<Dovecot> {
    let off = "service imap-login {\n  inet_listener imaps {\n    port = 0\n  }\n}
service pop3-login {\n  inet_listener pop3 {\n    port = 0\n  }\n}\n";
    start_on(netns, certificate, "10.25.0.77", [UNTRUSTED_IMAPS, UNTRUSTED_POP3], off)
}

fn start_on(
    netns: &Netns,
    certificate: &Certificate,
    trusted: &str,
    [imaps, pop3]: [u16; 2],
    more: &str,
) -> anyhow::Result<Dovecot> {
    let ips: [IpAddr; 2] = [MAIL.v4.into(), MAIL.v6.into()];
    let sockets = ips.map(|ip| [imaps, pop3].map(|port| SocketAddr::new(ip, port))).concat();
    let conf = |dir: &Path| {
        format!(
            "base_dir = {dir}/run
state_dir = {dir}/state
log_path = {dir}/dovecot.log
protocols = imap pop3
listen = *, ::
ssl = yes
ssl_cert = <{chain}
ssl_key = <{key}
haproxy_trusted_networks = {trusted}
passdb {{
  driver = static
  args = password=none
}}
service imap-login {{
  inet_listener imap {{
    port = 0
  }}
  inet_listener imaps_proxied {{
    port = {imaps}
    ssl = yes
    haproxy = yes
  }}
}}
service pop3-login {{
  inet_listener pop3s {{
    port = 0
  }}
  inet_listener pop3_proxied {{
    port = {pop3}
    haproxy = yes
  }}
}}
{more}",
            dir = dir.display(),
            chain = certificate.chain.display(),
            key = certificate.key.display(),
        )
    };
    Dovecot::start_with(netns, conf, &sockets)
}

/// Appends a line, which overrides an earlier one of that name, and reloads.
pub(crate) fn set(netns: &Netns, dovecot: &Dovecot, line: &str) -> anyhow::Result<()> {
    let config = dovecot.config();
    let text = fs::read_to_string(&config)?;
    fs::write(&config, format!("{text}{line}\n"))?;
    let mut reload = netns.command("dovecot");
    let output = reload.arg("-c").arg(&config).arg("reload").output()?;
    ensure!(output.status.success(), "dovecot reload: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
