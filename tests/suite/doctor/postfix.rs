//! Postfix with a service for each fault, and another one without IPv6.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use injector_testbed::certificate::{Certificate, MAIL_NAME};
use injector_testbed::netns::{MAIL, Netns};
use injector_testbed::postfix::Postfix;

/// Correct postscreen.
pub(crate) const POSTSCREEN: u16 = 2525;
/// Correct smtpd.
pub(crate) const SMTPD: u16 = 5587;
/// Correct smtpd in TLS.
pub(crate) const WRAPPED: u16 = 4465;
/// smtpd without the setting.
pub(crate) const BARE_SMTPD: u16 = 2501;
/// smtpd with postscreen's setting.
pub(crate) const SMTPD_AS_POSTSCREEN: u16 = 2502;
/// postscreen in front of an smtpd that has postscreen's setting.
pub(crate) const POSTSCREEN_AS_SMTPD: u16 = 2503;
/// smtpd in TLS without the setting.
pub(crate) const BARE_WRAPPED: u16 = 2504;
/// Correct smtpd, without a firewall.
pub(crate) const FORGEABLE: u16 = 2505;
/// The same, probed from a host that is not the edge.
pub(crate) const FORGEABLE_BY_STRANGERS: u16 = 2506;
/// smtpd without the setting, until the trial adds it.
pub(crate) const REPAIRED: u16 = 2507;
/// Correct smtpd for clear text.
pub(crate) const CLEAR: u16 = 2508;
/// postscreen of the Postfix without IPv6.
pub(crate) const IPV4_POSTSCREEN: u16 = 2511;
/// Its smtpd.
pub(crate) const IPV4_SMTPD: u16 = 2512;

/// postscreen of the Postfix with Debian's `mynetworks` and restrictions.
pub(crate) const STANDARD_POSTSCREEN: u16 = 2521;
/// Its smtpd.
pub(crate) const STANDARD_SMTPD: u16 = 2522;
/// Its smtpd in TLS.
pub(crate) const STANDARD_WRAPPED: u16 = 2523;
/// Its smtpd that requires STARTTLS.
pub(crate) const STANDARD_ENCRYPTED: u16 = 2524;
/// As [`STANDARD_SMTPD`], until the trial changes it.
pub(crate) const STANDARD_REPAIRED: u16 = 2526;
/// As [`STANDARD_SMTPD`], with no firewall before it.
pub(crate) const STANDARD_OPEN: u16 = 2527;
/// Its smtpd that relays for all clients.
pub(crate) const OPEN_RELAY: u16 = 2528;
/// Its smtpd that defers every recipient, as greylisting does.
pub(crate) const GREYLISTED: u16 = 2529;

/// The address of the Postfix that has the setting in `main.cf`; it has 25 there.
pub(crate) const EVERYWHERE: Ipv4Addr = Ipv4Addr::new(10, 25, 0, 3);
/// Its port for the injector.
pub(crate) const EVERYWHERE_SMTPD: u16 = 2541;
/// The address of a Postfix that has only 25, without the setting.
pub(crate) const BARE: Ipv4Addr = Ipv4Addr::new(10, 25, 0, 4);

const STOCK: [u16; 8] = [
    STANDARD_POSTSCREEN,
    STANDARD_SMTPD,
    STANDARD_WRAPPED,
    STANDARD_ENCRYPTED,
    STANDARD_REPAIRED,
    STANDARD_OPEN,
    OPEN_RELAY,
    GREYLISTED,
];

const ALL: [u16; 11] = [
    POSTSCREEN,
    SMTPD,
    WRAPPED,
    BARE_SMTPD,
    SMTPD_AS_POSTSCREEN,
    POSTSCREEN_AS_SMTPD,
    BARE_WRAPPED,
    FORGEABLE,
    FORGEABLE_BY_STRANGERS,
    REPAIRED,
    CLEAR,
];

const SMTPD_PROXY: &str = "-o smtpd_upstream_proxy_protocol=haproxy";
const POSTSCREEN_PROXY: &str = "-o postscreen_upstream_proxy_protocol=haproxy";

/// The services that smtpd and postscreen need; mail is not accepted.
const OWN_SERVICES: &str = "smtpd pass - - n - - smtpd
cleanup unix n - n - 0 cleanup
rewrite unix - - n - - trivial-rewrite
tlsmgr unix - - n 1000? 1 tlsmgr
tlsproxy unix - - n - 0 tlsproxy
dnsblog unix - - n - 0 dnsblog
proxymap unix - - n - - proxymap
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
";

pub(crate) fn start(netns: &Netns, certificate: &Certificate) -> anyhow::Result<Postfix> {
    let more = format!("{NO_NETWORKS}{}", tls(certificate));
    let sockets =
        [MAIL.v4.into(), MAIL.v6.into()].map(|ip: IpAddr| ALL.map(|port| SocketAddr::new(ip, port)));
    Postfix::start_with(netns, "postfix", |dir| main_cf(dir, "all", &more), &master_cf(), &sockets.concat())
}

/// main.cf of a host that trusts no client by its address.
const NO_NETWORKS: &str = "mynetworks =\n";

/// The lines that Debian's package writes into main.cf.
const STANDARD_NETWORKS: &str = "mynetworks = 127.0.0.0/8 [::ffff:127.0.0.0]/104 [::1]/128
smtpd_relay_restrictions = permit_mynetworks permit_sasl_authenticated defer_unauth_destination
";

/// A Postfix with the `mynetworks` and restrictions of a fresh installation.
pub(crate) fn start_standard(netns: &Netns, certificate: &Certificate) -> anyhow::Result<Postfix> {
    let more = format!("{STANDARD_NETWORKS}{}", tls(certificate));
    let smtpd = |port: u16, more: &str| {
        format!("{port} inet n - n - - smtpd -o syslog_name=postfix/{port} {SMTPD_PROXY} {more}\n")
    };
    let services = [
        format!(
            "{STANDARD_POSTSCREEN} inet n - n - 1 postscreen -o syslog_name=postfix/{STANDARD_POSTSCREEN} {POSTSCREEN_PROXY}\n"
        ),
        smtpd(STANDARD_SMTPD, ""),
        smtpd(STANDARD_WRAPPED, "-o smtpd_tls_wrappermode=yes"),
        smtpd(STANDARD_ENCRYPTED, "-o smtpd_tls_security_level=encrypt"),
        smtpd(STANDARD_REPAIRED, ""),
        smtpd(STANDARD_OPEN, ""),
        smtpd(OPEN_RELAY, "-o mynetworks=0.0.0.0/0,[::]/0"),
        smtpd(GREYLISTED, "-o smtpd_relay_restrictions=defer"),
    ];
    let master_cf = format!("{}{OWN_SERVICES}", services.concat());
    let sockets = STOCK.map(|port| SocketAddr::new(MAIL.v4.into(), port));
    Postfix::start_with(netns, "standard", |dir| main_cf(dir, "all", &more), &master_cf, &sockets)
}

fn tls(certificate: &Certificate) -> String {
    format!(
        "smtpd_tls_security_level = may\nsmtpd_tls_chain_files = {}, {}\n",
        certificate.key.display(),
        certificate.chain.display()
    )
}

pub(crate) fn start_ipv4(netns: &Netns) -> anyhow::Result<Postfix> {
    let master_cf = format!(
        "{IPV4_POSTSCREEN} inet n - n - 1 postscreen {POSTSCREEN_PROXY}
{IPV4_SMTPD} inet n - n - - smtpd {SMTPD_PROXY}
{OWN_SERVICES}"
    );
    let sockets = [IPV4_POSTSCREEN, IPV4_SMTPD].map(|port| SocketAddr::new(MAIL.v4.into(), port));
    Postfix::start_with(netns, "postfix4", |dir| main_cf(dir, "ipv4", NO_NETWORKS), &master_cf, &sockets)
}

/// The setting reaches every smtpd.
pub(crate) fn start_setting_everywhere(netns: &Netns) -> anyhow::Result<Postfix> {
    let setting = SMTPD_PROXY.trim_start_matches("-o ");
    let services = format!("{EVERYWHERE_SMTPD} inet n - n - - smtpd {SMTPD_PROXY}\n");
    start_at(netns, "everywhere", EVERYWHERE, &services, setting)
}

/// Nothing expects a header.
pub(crate) fn start_bare(netns: &Netns) -> anyhow::Result<Postfix> {
    start_at(netns, "bare", BARE, "", "")
}

/// A Postfix at an address of its own, with 25 and these services.
fn start_at(
    netns: &Netns,
    role: &str,
    address: Ipv4Addr,
    services: &str,
    setting: &str,
) -> anyhow::Result<Postfix> {
    let more = format!("{NO_NETWORKS}inet_interfaces = {address}\n{setting}\n");
    let master_cf = format!("25 inet n - n - - smtpd\n{services}{OWN_SERVICES}");
    let sockets = [SocketAddr::new(address.into(), 25)];
    Postfix::start_with(netns, role, |dir| main_cf(dir, "all", &more), &master_cf, &sockets)
}

fn main_cf(dir: &Path, protocols: &str, more: &str) -> String {
    let dir = dir.display();
    format!(
        "compatibility_level = 3.6
queue_directory = {dir}/queue
data_directory = {dir}/data
maillog_file = {dir}/mail.log
maillog_file_prefixes = {dir}
myhostname = {MAIL_NAME}
mydestination =
inet_interfaces = all
inet_protocols = {protocols}
alias_maps =
disable_dns_lookups = yes
smtpd_peername_lookup = no
smtpd_tls_session_cache_database =
# No memory of clients, unless a service has one: several postscreens cannot share a file.
postscreen_cache_map =
# postscreen's clock has whole seconds: with 1s the rest of the greeting may follow its beginning at once.
postscreen_greet_wait = 2s
postscreen_greet_action = enforce
{more}"
    )
}

fn master_cf() -> String {
    let wrapper = "-o smtpd_tls_wrappermode=yes";
    format!(
        "{POSTSCREEN} inet n - n - 1 postscreen -o syslog_name=postfix/{POSTSCREEN} {POSTSCREEN_PROXY}
{SMTPD} inet n - n - - smtpd -o syslog_name=postfix/{SMTPD} {SMTPD_PROXY}
{WRAPPED} inet n - n - - smtpd -o syslog_name=postfix/{WRAPPED} {wrapper} {SMTPD_PROXY}
{BARE_SMTPD} inet n - n - - smtpd -o syslog_name=postfix/{BARE_SMTPD}
{SMTPD_AS_POSTSCREEN} inet n - n - - smtpd -o syslog_name=postfix/{SMTPD_AS_POSTSCREEN} {POSTSCREEN_PROXY}
{POSTSCREEN_AS_SMTPD} inet n - n - 1 postscreen -o syslog_name=postfix/{POSTSCREEN_AS_SMTPD}
  -o smtpd_service_name=smtpd_proxied -o postscreen_cache_map=btree:$data_directory/known
smtpd_proxied pass - - n - - smtpd -o syslog_name=postfix/{POSTSCREEN_AS_SMTPD} {SMTPD_PROXY}
{BARE_WRAPPED} inet n - n - - smtpd -o syslog_name=postfix/{BARE_WRAPPED} {wrapper}
{FORGEABLE} inet n - n - - smtpd -o syslog_name=postfix/{FORGEABLE} {SMTPD_PROXY}
{FORGEABLE_BY_STRANGERS} inet n - n - - smtpd -o syslog_name=postfix/{FORGEABLE_BY_STRANGERS} {SMTPD_PROXY}
{REPAIRED} inet n - n - - smtpd -o syslog_name=postfix/{REPAIRED}
{CLEAR} inet n - n - - smtpd -o syslog_name=postfix/{CLEAR} {SMTPD_PROXY}
{OWN_SERVICES}"
    )
}

/// Adds `-o NAME=VALUE` to a service of `master.cf`, and reloads.
pub(crate) fn set(netns: &Netns, postfix: &Postfix, port: u16, setting: &str) -> anyhow::Result<()> {
    let setting = setting.trim().strip_prefix("-o ").context("not the setting of a service")?;
    let mut change = Command::new("postconf");
    change.arg("-c").arg(postfix.config()).args(["-P", &format!("{port}/inet/{setting}")]);
    let mut reload = netns.command("postfix");
    reload.arg("-c").arg(postfix.config()).arg("reload");
    for mut command in [change, reload] {
        let output = command.output()?;
        ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
