//! Postfix in the mail namespace, whose smtpd accepts mail and discards it: with a PROXY header on
//! one port, without on another.

use std::path::Path;

use super::testbed::mail;
use injector_testbed::log_file::LogFile;
use injector_testbed::netns::Netns;
use injector_testbed::postfix::Postfix;

/// The port that requires a header; also the public port.
pub const PROXIED: u16 = 2525;
/// The port without a header.
pub const BARE: u16 = 3525;
/// The domain whose mail it accepts.
pub const DOMAIN: &str = "bench.test";

/// A running Postfix; ended on drop.
#[derive(Debug)]
pub struct MailSink(Postfix);

impl MailSink {
    /// # Errors
    /// When Postfix is not installed, or does not listen within ten seconds.
    pub fn start(netns: &Netns) -> anyhow::Result<Self> {
        Postfix::start_with(netns, "mailsink", main_cf, &master_cf(), &[mail(PROXIED), mail(BARE)]).map(Self)
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> &LogFile {
        self.0.log()
    }
}

fn main_cf(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "compatibility_level = 3.6
queue_directory = {dir}/queue
data_directory = {dir}/data
maillog_file = {dir}/mail.log
maillog_file_prefixes = {dir}
myhostname = mail.{DOMAIN}
mydestination =
inet_interfaces = all
inet_protocols = ipv4
mynetworks =
alias_maps =
local_recipient_maps =
disable_dns_lookups = yes
smtpd_peername_lookup = no
relay_domains = {DOMAIN}
relay_transport = discard
default_transport = discard
smtpd_relay_restrictions = reject_unauth_destination
smtpd_client_connection_count_limit = 0
smtpd_client_connection_rate_limit = 0
# Senders are not slowed down, and every message counts.
in_flow_delay = 0
smtpd_error_sleep_time = 0
default_process_limit = 60
"
    )
}

fn master_cf() -> String {
    format!(
        "{PROXIED} inet n - n - - smtpd -o smtpd_upstream_proxy_protocol=haproxy
{BARE} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"
    )
}
