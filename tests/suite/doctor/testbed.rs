//! The namespaces with all servers, each port with one fault.

use anyhow::{Context as _, ensure};
use injector_testbed::certificate::Certificate;
use injector_testbed::dovecot::Dovecot;
use injector_testbed::log_file::Mark;
use injector_testbed::netns::{self, EDGE_INSIDE, EDGE_OUTSIDE, Topology};
use injector_testbed::postfix::Postfix;
use injector_testbed::receivers::Receiver;
use tempfile::TempDir;

use crate::receivers::Receivers;
use crate::{dovecot, others, postfix, receivers};

/// No server listens there.
pub(crate) const NOTHING: u16 = 2590;
/// The firewall drops all packets to this port.
pub(crate) const DROPPED: u16 = 2591;

/// Ports that trust a header, and that the firewall closes to all hosts but the edge.
/// [`postfix::FORGEABLE`], [`postfix::REPAIRED`] and [`postfix::STANDARD_OPEN`] stay open.
const SHUT: &[u16] = &[
    postfix::POSTSCREEN,
    postfix::SMTPD,
    postfix::WRAPPED,
    postfix::CLEAR,
    postfix::IPV4_POSTSCREEN,
    postfix::IPV4_SMTPD,
    postfix::STANDARD_POSTSCREEN,
    postfix::STANDARD_SMTPD,
    postfix::STANDARD_WRAPPED,
    postfix::STANDARD_ENCRYPTED,
    postfix::STANDARD_REPAIRED,
    postfix::OPEN_RELAY,
    postfix::GREYLISTED,
    dovecot::TRUSTING_IMAP,
    dovecot::TRUSTING_POP3,
    postfix::EVERYWHERE_SMTPD,
    others::EXIM[0],
    others::EXIM[1],
    others::OPENSMTPD,
    others::OPENSMTPD_TLS,
    receivers::V1_ONLY,
    receivers::V2_ONLY,
    receivers::OPTIONAL,
    receivers::NO_TLVS,
];

/// Everything that trials share.
// Fields are dropped in this order: what runs in a namespace before the namespace.
#[derive(Debug)]
pub(crate) struct Testbed {
    pub(crate) postfix: Postfix,
    ipv4_postfix: Postfix,
    pub(crate) standard_postfix: Postfix,
    pub(crate) setting_everywhere: Postfix,
    _bare_postfix: Postfix,
    _others: [Receiver; 3],
    _dovecot: Dovecot,
    _trusting_dovecot: Dovecot,
    pub(crate) distrustful_dovecot: Dovecot,
    pub(crate) topology: Topology,
    _receivers: Receivers,
    _dir: TempDir,
}

impl Testbed {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let topology = Topology::new().context("no namespaces")?;
        let Topology { client, mail, .. } = &topology;
        client.ip(&["route", "add", "10.25.0.0/24", "via", &EDGE_OUTSIDE.v4.to_string()])?;
        client.ip(&["route", "add", "fd25::/64", "via", &EDGE_OUTSIDE.v6.to_string()])?;
        mail.nft(&firewall())?;
        for address in [postfix::EVERYWHERE, postfix::BARE] {
            mail.ip(&["address", "add", &format!("{address}/24"), "dev", "eth0"])?;
        }
        let dir = netns::scratch_dir("certificate")?;
        let certificate = Certificate::new(dir.path())?;
        Ok(Self {
            postfix: postfix::start(mail, &certificate)?,
            ipv4_postfix: postfix::start_ipv4(mail)?,
            standard_postfix: postfix::start_standard(mail, &certificate)?,
            setting_everywhere: postfix::start_setting_everywhere(mail)?,
            _bare_postfix: postfix::start_bare(mail)?,
            _others: others::start(mail, &certificate)?,
            _dovecot: dovecot::start(mail, &certificate)?,
            _trusting_dovecot: dovecot::start_trusting_localhost(mail, &certificate)?,
            distrustful_dovecot: dovecot::start_distrustful(mail, &certificate)?,
            _receivers: Receivers::start(mail)?,
            topology,
            _dir: dir,
        })
    }

    /// Checks that no smtpd or postscreen died because of the doctor.
    pub(crate) fn nothing_died(&self) -> anyhow::Result<()> {
        for postfix in [&self.postfix, &self.ipv4_postfix, &self.standard_postfix, &self.setting_everywhere] {
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
