//! Dovecot with its own directories: 10993 and 10995 require a PROXY header, 993 and 995 do not
//! expect one.
//!
//! The log has `imap-login: … rip=CLIENT rport=PORT lip=VIP …`. Any user may log in with
//! [`PASSWORD`], so that every trial can have its own mailbox.

use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use tempfile::TempDir;

use crate::certificate::Certificate;
use crate::log_file::{LogFile, Mark};
use crate::netns::{self, Family, MAIL, Netns};
use crate::process::Process;
use crate::receivers;
use crate::service::{IMAPS, POP3S};
use crate::sockets::LIMIT;

/// The password of every user.
pub const PASSWORD: &str = "correct-horse";

/// The owner of the mailboxes (the overflow uid; the machine gets no user for them).
const MAIL_UID: u32 = 65534;
/// The mailboxes' group.
const MAIL_GID: u32 = 65534;

/// A running Dovecot; stopped on drop.
#[derive(Debug)]
pub struct Dovecot {
    // Before the directory: fields are dropped in this order.
    _master: Process,
    log: LogFile,
    dir: TempDir,
}

impl Dovecot {
    /// Starts it and waits until all four ports are open.
    ///
    /// # Errors
    /// When Dovecot 2.3 is not installed, refuses its configuration or does not listen within ten
    /// seconds.
    pub fn start(netns: &Netns, certificate: &Certificate) -> anyhow::Result<Self> {
        Self::start_adding(netns, certificate, "")
    }

    /// As [`Self::start`], with these lines after its configuration; later settings override
    /// earlier ones.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_adding(netns: &Netns, certificate: &Certificate, more: &str) -> anyhow::Result<Self> {
        let ports = [IMAPS, POP3S].map(|service| [service.standard, service.proxied]).concat();
        let sockets =
            Family::ALL.map(|family| ports.iter().map(move |port| SocketAddr::new(MAIL.of(family), *port)));
        let sockets: Vec<_> = sockets.into_iter().flatten().collect();
        let documented = receivers::documented("Dovecot 2.3")?;
        Self::start_with(netns, |dir| dovecot_conf(dir, certificate, &documented) + more, &sockets)
    }

    /// Starts Dovecot with this configuration, made for its directory, and waits until it listens.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(
        netns: &Netns,
        conf: impl FnOnce(&Path) -> String,
        sockets: &[SocketAddr],
    ) -> anyhow::Result<Self> {
        ensure_version()?;
        let dir = netns::scratch_dir("dovecot")?;
        // Its processes, and Postfix at its sockets, run as their own users.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755))?;
        let mailboxes = mailboxes(dir.path());
        fs::create_dir(&mailboxes)?;
        chown(&mailboxes, Some(MAIL_UID), Some(MAIL_GID))?;
        let config = dir.path().join("dovecot.conf");
        fs::write(&config, conf(dir.path()))?;

        let log = LogFile::new(dir.path().join("dovecot.log"));
        let mut command = netns.command("dovecot");
        command.arg("-F").arg("-c").arg(&config);
        let output = dir.path().join("master.out");
        let mut master = Process::start("dovecot", netns, command, &output)?;
        master.wait_listening(netns, sockets, LIMIT).with_context(|| {
            let printed = fs::read_to_string(&output).unwrap_or_default();
            format!("Dovecot printed:\n{printed}{}", log.since(Mark::default()))
        })?;
        Ok(Self { _master: master, log, dir })
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> &LogFile {
        &self.log
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("dovecot.conf")
    }

    /// The LMTP socket, for delivery.
    #[must_use]
    pub fn lmtp_socket(&self) -> PathBuf {
        lmtp_socket(self.dir.path())
    }

    /// The authentication socket, for Postfix.
    #[must_use]
    pub fn auth_socket(&self) -> PathBuf {
        auth_socket(self.dir.path())
    }

    /// Waits for the log line of a user's IMAP login, and returns the client in it.
    ///
    /// # Errors
    /// When there is no such line within the limit.
    pub fn client_of(&self, mark: Mark, user: &str, limit: Duration) -> anyhow::Result<SocketAddr> {
        let user = format!("user=<{user}>");
        let line = self.log.wait_for(mark, &["imap-login: ", &user, "rip="], limit)?;
        parse_client(&line).with_context(|| format!("no client address in: {line}"))
    }
}

/// Reads `rip=ADDRESS, rport=PORT`.
fn parse_client(line: &str) -> Option<SocketAddr> {
    let field = |name: &str| {
        let value = line.split_once(name)?.1;
        value.split([',', ' ']).next()
    };
    Some(SocketAddr::new(field(" rip=")?.parse().ok()?, field(" rport=")?.parse().ok()?))
}

/// The configuration below is for 2.3; 2.4 has another syntax.
fn ensure_version() -> anyhow::Result<()> {
    let output = Command::new("dovecot").arg("--version").output();
    let output =
        output.context("cannot run dovecot (install dovecot-imapd, dovecot-lmtpd and dovecot-pop3d)")?;
    let version = String::from_utf8_lossy(&output.stdout);
    ensure!(version.starts_with("2.3."), "Dovecot 2.3 is needed, this is {}", version.trim());
    Ok(())
}

/// The settings of `docs/receivers.md`, and what they leave out.
fn dovecot_conf(dir: &Path, certificate: &Certificate, documented: &str) -> String {
    format!(
        "base_dir = {dir}/run
state_dir = {dir}/state
log_path = {dir}/dovecot.log
protocols = imap pop3 lmtp
listen = *, ::
ssl = required
ssl_cert = <{chain}
ssl_key = <{key}
{documented}
login_log_format_elements = user=<%u> method=%m rip=%r rport=%b lip=%l lport=%a mpid=%e %c
auth_mechanisms = plain login
mail_location = maildir:~/Maildir
# One client reads many mailboxes at once, and many times.
mail_max_userip_connections = 100
passdb {{
  driver = static
  args = password={PASSWORD}
}}
userdb {{
  driver = static
  args = uid={MAIL_UID} gid={MAIL_GID} home={mailboxes}/%u
}}
service auth {{
  unix_listener {auth} {{
    mode = 0666
  }}
}}
service lmtp {{
  unix_listener {lmtp} {{
    mode = 0666
  }}
}}
# Mailboxes go by the name before the @, at login and delivery alike.
auth_username_format = %Ln
service imap-login {{
  inet_listener imap {{
    port = 0
  }}
}}
service pop3-login {{
  inet_listener pop3 {{
    port = 0
  }}
  inet_listener pop3s {{
    port = {pop3s}
    ssl = yes
  }}
  inet_listener pop3s_proxied {{
    port = {pop3s_proxied}
    ssl = yes
    haproxy = yes
  }}
}}
",
        dir = dir.display(),
        chain = certificate.chain.display(),
        key = certificate.key.display(),
        mailboxes = mailboxes(dir).display(),
        auth = auth_socket(dir).display(),
        lmtp = lmtp_socket(dir).display(),
        pop3s = POP3S.standard,
        pop3s_proxied = POP3S.proxied,
    )
}

fn mailboxes(dir: &Path) -> PathBuf {
    dir.join("mailboxes")
}

fn lmtp_socket(dir: &Path) -> PathBuf {
    dir.join("lmtp")
}

fn auth_socket(dir: &Path) -> PathBuf {
    dir.join("auth")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_read_from_login_lines() {
        let line = "imap-login: Info: Login: user=<u>, method=PLAIN, rip=2001:db8:c::7, rport=4242, lip=2001:db8:a::10";
        assert_eq!(parse_client(line), Some("[2001:db8:c::7]:4242".parse().unwrap()));
        assert_eq!(parse_client("imap-login: Info: Disconnected: user=<>"), None);
    }
}
