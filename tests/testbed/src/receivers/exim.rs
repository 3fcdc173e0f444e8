//! Exim, which expects a header by sender and not by port. Its log has
//! `<= … H=(…) [CLIENT]:PORT … PRX=EDGE`.

use std::fs;
use std::os::unix::fs::chown;

use super::overlay::{self, User};
use super::{Receiver, directory, write};
use crate::certificate::{Certificate, MAIL_NAME};
use crate::message::DOMAIN;
use crate::netns::Netns;

/// The Debian package.
const PACKAGE: &str = "exim4-daemon-heavy";

/// The user that the package's program runs as.
const USER: User = User { name: "Debian-exim", id: 64990 };

/// Starts it with these settings, for example those of `docs/receivers.md`, on a port in clear text
/// and one in TLS. It accepts mail for [`DOMAIN`] and delivers nothing.
///
/// # Errors
/// When the package was not unpacked, or it rejects the settings.
pub fn start(
    netns: &Netns,
    certificate: &Certificate,
    settings: &str,
    [smtp, smtps]: [u16; 2],
) -> anyhow::Result<Receiver> {
    let dir = directory("exim")?;
    let (spool, key) = (dir.path().join("spool"), dir.path().join("mail.key"));
    fs::create_dir(&spool)?;
    // It reads the key without privileges.
    fs::copy(&certificate.key, &key)?;
    for path in [&spool, &key] {
        chown(path, Some(USER.id), Some(USER.id))?;
    }
    let conf = format!(
        "primary_hostname = {MAIL_NAME}
spool_directory = {spool}
log_file_path = {spool}/%slog
{settings}
daemon_smtp_ports = {smtp} : {smtps}
tls_on_connect_ports = {smtps}
tls_advertise_hosts = *
tls_certificate = {chain}
tls_privatekey = {key}
smtp_accept_max_per_host = 100
# There is no DNS in the namespaces.
host_lookup =
rfc1413_query_timeout = 0s
queue_only
keep_environment =
acl_smtp_rcpt = recipient
begin acl
recipient:
  accept domains = {DOMAIN}
  deny message = relay not permitted
",
        spool = spool.display(),
        chain = certificate.chain.display(),
        key = key.display(),
    );
    let conf = write(dir.path(), "exim.conf", &conf)?;
    let mut command = overlay::command(netns, PACKAGE, dir.path(), &[USER], "exim4")?;
    command.arg("-C").arg(conf).arg("-bdf");
    Receiver::start("exim", netns, dir, command, "spool/mainlog", &[smtp, smtps])
}
