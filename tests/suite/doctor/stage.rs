//! The namespaces with all servers, each port with one fault.

use anyhow::{Context as _, ensure};
use injector_testbed::certificate::Certificate;
use injector_testbed::dovecot::Dovecot;
use injector_testbed::log_file::Mark;
use injector_testbed::netns::{self, EDGE_INSIDE, EDGE_OUTSIDE, Topology};
use injector_testbed::postfix::Postfix;
use tempfile::TempDir;

use crate::receivers::Receivers;
use crate::{dovecots, postfixes, receivers};

/// Nobody listens there.
pub(crate) const NOTHING: u16 = 2590;
/// The firewall drops all that comes there.
pub(crate) const DROPPED: u16 = 2591;

/// Ports that believe a header, and that the firewall shuts to all but the edge. Those of [`postfixes::FORGEABLE`],
/// [`postfixes::REPAIRED`] and [`postfixes::STOCK_OPEN`] are left open.
const SHUT: &[u16] = &[
    postfixes::POSTSCREEN,
    postfixes::SMTPD,
    postfixes::WRAPPED,
    postfixes::CLEAR,
    postfixes::IPV4_POSTSCREEN,
    postfixes::IPV4_SMTPD,
    postfixes::STOCK_POSTSCREEN,
    postfixes::STOCK_SMTPD,
    postfixes::STOCK_WRAPPED,
    postfixes::STOCK_ENCRYPTED,
    postfixes::STOCK_REPAIRED,
    postfixes::OPEN_RELAY,
    postfixes::GREYLISTED,
    dovecots::TRUSTING_IMAP,
    dovecots::TRUSTING_POP3,
    receivers::V1_ONLY,
    receivers::V2_ONLY,
    receivers::OPTIONAL,
    receivers::NO_TLVS,
];

/// Everything that trials share.
// Fields are dropped in this order: what runs in a namespace before the namespace.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) postfix: Postfix,
    ipv4_postfix: Postfix,
    pub(crate) stock_postfix: Postfix,
    _dovecot: Dovecot,
    _trusting_dovecot: Dovecot,
    pub(crate) distrustful_dovecot: Dovecot,
    pub(crate) topology: Topology,
    _receivers: Receivers,
    _dir: TempDir,
}

impl Stage {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let topology = Topology::new().context("no namespaces")?;
        let Topology { client, mail, .. } = &topology;
        client.ip(&["route", "add", "10.25.0.0/24", "via", &EDGE_OUTSIDE.v4.to_string()])?;
        client.ip(&["route", "add", "fd25::/64", "via", &EDGE_OUTSIDE.v6.to_string()])?;
        mail.nft(&firewall())?;
        let dir = netns::scratch_dir("certificate")?;
        let certificate = Certificate::new(dir.path())?;
        Ok(Self {
            postfix: postfixes::start(mail, &certificate)?,
            ipv4_postfix: postfixes::start_ipv4(mail)?,
            stock_postfix: postfixes::start_stock(mail, &certificate)?,
            _dovecot: dovecots::start(mail, &certificate)?,
            _trusting_dovecot: dovecots::start_trusting_localhost(mail, &certificate)?,
            distrustful_dovecot: dovecots::start_distrustful(mail, &certificate)?,
            _receivers: Receivers::start(mail)?,
            topology,
            _dir: dir,
        })
    }

    /// No smtpd or postscreen has died of what the doctor did.
    pub(crate) fn nothing_died(&self) -> anyhow::Result<()> {
        for postfix in [&self.postfix, &self.ipv4_postfix, &self.stock_postfix] {
            let log = postfix.log().since(Mark::default());
            let died = log.lines().find(|line| {
                ["fatal:", "panic:", "killed by signal", "bad command startup"]
                    .iter()
                    .any(|word| line.contains(word))
            });
            ensure!(died.is_none(), "Postfix logged: {}", died.unwrap_or_default());
        }
        Ok(())
    }
}

fn firewall() -> String {
    let shut: Vec<_> = SHUT.iter().map(ToString::to_string).collect();
    let shut = shut.join(", ");
    format!(
        "add table inet testbed; add chain inet testbed input {{ type filter hook input priority 0; }}; \
         add rule inet testbed input tcp dport {{ {shut} }} ip saddr != {} reject with tcp reset; \
         add rule inet testbed input tcp dport {{ {shut} }} ip6 saddr != {} reject with tcp reset; \
         add rule inet testbed input tcp dport {DROPPED} drop",
        EDGE_INSIDE.v4, EDGE_INSIDE.v6
    )
}
