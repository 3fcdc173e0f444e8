//! Postfix with its own directories: 2525, 4465 and 5587 require a PROXY header, 25, 465 and 587 do
//! not expect one.
//!
//! The log has `postfix/2525/postscreen[…]: CONNECT from [CLIENT]:PORT to [VIP]:25`, and from every
//! smtpd `QUEUE-ID: client=unknown[CLIENT]:PORT`. Every service logs under the number of its port,
//! which identifies the writer of a line.

use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use tempfile::TempDir;

use crate::certificate::{Certificate, MAIL_NAME};
use crate::log_file::{LogFile, Mark};
use crate::message::DOMAIN;
use crate::netns::{self, Family, MAIL, Netns};
use crate::process::Process;
use crate::receivers;
use crate::service::{MATRIX, SMTP, SUBMISSIONS};
use crate::sockets::LIMIT;

/// A running Postfix; stopped on drop.
#[derive(Debug)]
pub struct Postfix {
    // Before the directory: fields are dropped in this order.
    _master: Process,
    log: LogFile,
    dir: TempDir,
}

/// Where Postfix delivers mail and authenticates users.
#[derive(Clone, Copy, Debug)]
pub struct Neighbours<'a> {
    /// Dovecot's LMTP socket.
    pub lmtp_socket: &'a Path,
    /// Dovecot's authentication socket.
    pub auth_socket: &'a Path,
    /// Certificate and key.
    pub certificate: &'a Certificate,
}

impl Postfix {
    /// Starts it and waits until all six ports are open.
    ///
    /// # Errors
    /// When Postfix is not installed, refuses its configuration or does not listen within ten
    /// seconds.
    pub fn start(netns: &Netns, neighbours: Neighbours<'_>) -> anyhow::Result<Self> {
        let smtp_ports = MATRIX.iter().filter(|service| service.protocol != "imaps");
        let ports: Vec<_> = smtp_ports.flat_map(|service| [service.standard, service.proxied]).collect();
        let sockets =
            Family::ALL.map(|family| ports.iter().map(move |port| SocketAddr::new(MAIL.of(family), *port)));
        let sockets: Vec<_> = sockets.into_iter().flatten().collect();
        Self::start_with(netns, "postfix", |dir| main_cf(dir, neighbours), &master_cf()?, &sockets)
    }

    /// Starts Postfix with this `main.cf`, made for its directory, and this `master.cf`, and waits
    /// until it listens.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(
        netns: &Netns,
        role: &str,
        main_cf: impl FnOnce(&Path) -> String,
        master_cf: &str,
        sockets: &[SocketAddr],
    ) -> anyhow::Result<Self> {
        let dir = netns::scratch_dir(role)?;
        // Its processes run as the user postfix and must be able to reach the queue.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755))?;
        let config = dir.path().join("etc");
        for path in [&config, &dir.path().join("queue"), &dir.path().join("data")] {
            fs::create_dir(path)?;
        }
        fs::write(config.join("main.cf"), main_cf(dir.path()))?;
        fs::write(config.join("master.cf"), master_cf)?;
        give_data_to_postfix(&dir.path().join("data"), &config)?;
        make_queue(netns, &config)?;

        let log = LogFile::new(dir.path().join("mail.log"));
        let mut command = netns.command(daemon_directory(&config)?.join("master"));
        // In the foreground, as leader of its process group, which it stops itself.
        command.arg("-d").arg("-c").arg(&config).process_group(0);
        let mut master = Process::start("postfix", netns, command, &dir.path().join("master.out"))?;
        master
            .wait_listening(netns, sockets, LIMIT)
            .with_context(|| format!("Postfix logged:\n{}", log.since(Mark::default())))?;
        Ok(Self { _master: master, log, dir })
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> &LogFile {
        &self.log
    }

    /// The directory with its `main.cf` and `master.cf`.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("etc")
    }

    /// Sets parameters of `main.cf`, each as `NAME=VALUE`, and reloads.
    ///
    /// # Errors
    /// When Postfix rejects them.
    pub fn set(&self, netns: &Netns, settings: &[&str]) -> anyhow::Result<()> {
        let mut change = Command::new("postconf");
        change.arg("-c").arg(self.config()).arg("-e").args(settings);
        let mut reload = netns.command("postfix");
        reload.arg("-c").arg(self.config()).arg("reload");
        for mut command in [change, reload] {
            let output = command.output()?;
            ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// Waits for the log line in which smtpd names a queued message's client, and returns that
    /// client.
    ///
    /// # Errors
    /// When there is no such line within the limit.
    pub fn client_of(
        &self,
        mark: Mark,
        queue_id: &str,
        port: u16,
        limit: Duration,
    ) -> anyhow::Result<SocketAddr> {
        let service = format!("postfix/{port}/smtpd[");
        let line = self.log.wait_for(mark, &[&service, &format!(" {queue_id}: client=")], limit)?;
        let client = line.split_once(": client=").map(|(_, client)| client).and_then(parse_client);
        client.with_context(|| format!("no client address in: {line}"))
    }

    /// Waits until the queued message is in the mailbox.
    ///
    /// # Errors
    /// When it is not within the limit, or delivery fails.
    pub fn wait_delivered(&self, mark: Mark, queue_id: &str, limit: Duration) -> anyhow::Result<()> {
        let line = self.log.wait_for(mark, &[&format!(" {queue_id}: to="), "status="], limit)?;
        ensure!(line.contains("status=sent"), "not delivered: {line}");
        Ok(())
    }
}

/// Reads `NAME[ADDRESS]:PORT`, followed by anything (`smtpd_client_port_logging`).
fn parse_client(text: &str) -> Option<SocketAddr> {
    let (ip, rest) = text.split_once('[')?.1.split_once("]:")?;
    let port = rest.split(|other: char| !other.is_ascii_digit()).next()?;
    Some(SocketAddr::new(ip.parse().ok()?, port.parse().ok()?))
}

fn main_cf(dir: &Path, neighbours: Neighbours<'_>) -> String {
    let dir = dir.display();
    let Neighbours { lmtp_socket, auth_socket, certificate } = neighbours;
    format!(
        "compatibility_level = 3.6
queue_directory = {dir}/queue
data_directory = {dir}/data
maillog_file = {dir}/mail.log
maillog_file_prefixes = {dir}
myhostname = {MAIL_NAME}
mydestination =
inet_interfaces = all
inet_protocols = all
# No client is trusted for its address: a test must not pass because of where it comes from.
mynetworks = 127.0.0.0/8 [::1]/128
alias_maps =
# There is no DNS in the namespaces.
disable_dns_lookups = yes
smtpd_peername_lookup = no
smtpd_client_port_logging = yes
# Many connections from one address are what tests make.
smtpd_client_connection_count_limit = 0
default_process_limit = 50

virtual_mailbox_domains = {DOMAIN}
virtual_mailbox_maps = static:any
virtual_transport = lmtp:unix:{lmtp_socket}

smtpd_tls_security_level = may
smtpd_tls_chain_files = {key}, {chain}
smtpd_tls_session_cache_database =
smtpd_sasl_type = dovecot
smtpd_sasl_path = {auth_socket}
smtpd_tls_auth_only = yes
smtpd_relay_restrictions = permit_sasl_authenticated, reject_unauth_destination

# The greet test stays: postscreen has seen a client that passes, under the address in the header. Shorter than the
# default of 2 to 6 s, for every new client of a run waits for it.
postscreen_greet_wait = 1s
postscreen_greet_action = enforce
postscreen_upstream_proxy_timeout = 5s
",
        lmtp_socket = lmtp_socket.display(),
        auth_socket = auth_socket.display(),
        key = certificate.key.display(),
        chain = certificate.chain.display(),
    )
}

/// The services of `docs/receivers.md`, the standard ports that it leaves out, and Postfix's own.
fn master_cf() -> anyhow::Result<String> {
    Ok(format!(
        "{}465 inet n - n - - smtpd -o syslog_name=postfix/465 -o smtpd_sasl_auth_enable=yes \
             -o smtpd_tls_wrappermode=yes
587 inet n - n - - smtpd -o syslog_name=postfix/587 -o smtpd_sasl_auth_enable=yes \
             -o smtpd_tls_security_level=encrypt
{OWN_SERVICES}",
        receivers::documented("Postfix")?
    ))
}

/// Postfix's own services (the list of its `master.cf`, unchrooted).
pub const OWN_SERVICES: &str = "dnsblog unix - - n - 0 dnsblog
tlsproxy unix - - n - 0 tlsproxy
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
proxywrite unix - - n - 1 proxymap
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
lmtp unix - - n - - lmtp
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
";

/// A Postfix that listens only on 25 and, in TLS, on 465, requires no login, and discards what it
/// accepts: for a receiver in front of it.
///
/// # Errors
/// As [`Postfix::start`].
pub fn start_standard_ports(netns: &Netns, certificate: &Certificate) -> anyhow::Result<Postfix> {
    let none = Path::new("none");
    let neighbours = Neighbours { lmtp_socket: none, auth_socket: none, certificate };
    let main_cf = |dir: &Path| format!("{}virtual_transport = discard:\n", main_cf(dir, neighbours));
    let master_cf = format!(
        "25 inet n - n - - smtpd
465 inet n - n - - smtpd -o smtpd_tls_wrappermode=yes
{OWN_SERVICES}"
    );
    let sockets = [SMTP, SUBMISSIONS]
        .map(|service| Family::ALL.map(|family| SocketAddr::new(MAIL.of(family), service.standard)));
    Postfix::start_with(netns, "postfix", main_cf, &master_cf, &sockets.concat())
}

/// `data_directory` must belong to `mail_owner`; Postfix does not ensure that itself.
fn give_data_to_postfix(data: &Path, config: &Path) -> anyhow::Result<()> {
    let owner = setting(config, "mail_owner")?;
    let status = Command::new("chown").arg(&owner).arg(data).status().context("cannot run chown")?;
    ensure!(status.success(), "cannot give {} to {owner}", data.display());
    Ok(())
}

/// Makes Postfix create the queue directories and check the configuration.
fn make_queue(netns: &Netns, config: &Path) -> anyhow::Result<()> {
    let mut check = netns.command("postfix");
    let output = check.arg("-c").arg(config).arg("check").output().context("cannot run postfix")?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "postfix check: {}", complaints.trim());
    Ok(())
}

/// The directory of the daemons' programs.
fn daemon_directory(config: &Path) -> anyhow::Result<PathBuf> {
    Ok(setting(config, "daemon_directory")?.into())
}

fn setting(config: &Path, name: &str) -> anyhow::Result<String> {
    let mut command = Command::new("postconf");
    let output = command.arg("-c").arg(config).args(["-h", name]).output();
    let output = output.context("cannot run postconf (install postfix)")?;
    ensure!(output.status.success(), "postconf {name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_read_from_log_lines() {
        for (text, client) in [
            ("unknown[198.51.100.7]:40000", "198.51.100.7:40000"),
            ("unknown[2001:db8:c::7]:1, sasl_method=PLAIN", "[2001:db8:c::7]:1"),
        ] {
            assert_eq!(parse_client(text), Some(client.parse().unwrap()));
        }
        assert_eq!(parse_client("unknown[unknown]"), None);
    }
}
