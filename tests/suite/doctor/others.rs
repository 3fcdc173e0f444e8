//! Exim and OpenSMTPD, set as documented and otherwise.

use anyhow::Context as _;
use injector_testbed::certificate::Certificate;
use injector_testbed::netns::Netns;
use injector_testbed::receivers::{self, Receiver};

/// Exim with the documented settings, in clear text and in TLS.
pub(crate) const EXIM: [u16; 2] = [2701, 2702];
/// Exim that expects a header from another host.
pub(crate) const EXIM_FOR_OTHERS: [u16; 2] = [2703, 2704];
/// OpenSMTPD with the documented setting.
pub(crate) const OPENSMTPD: u16 = 2711;
/// OpenSMTPD without it.
pub(crate) const OPENSMTPD_BARE: u16 = 2712;
/// OpenSMTPD with it, in implicit TLS.
pub(crate) const OPENSMTPD_TLS: u16 = 2713;

pub(crate) fn start(netns: &Netns, certificate: &Certificate) -> anyhow::Result<[Receiver; 3]> {
    let exim = receivers::documented("Exim")?;
    let listeners = receivers::documented("OpenSMTPD")?
        .replace("port 25\n", &format!("port {OPENSMTPD_BARE}\n"))
        .replace("port 2525", &format!("port {OPENSMTPD}"));
    let in_tls = ["0.0.0.0", "::"]
        .map(|address| format!("listen on {address} port {OPENSMTPD_TLS} smtps pki mail proxy-v2\n"));
    let opensmtpd = format!("{listeners}{}", in_tls.concat());
    let ports = [OPENSMTPD, OPENSMTPD_BARE, OPENSMTPD_TLS];
    Ok([
        receivers::exim::start(netns, certificate, &exim, EXIM).context("Exim")?,
        receivers::exim::start(netns, certificate, "hosts_proxy = <; 10.25.0.77", EXIM_FOR_OTHERS)
            .context("Exim")?,
        receivers::opensmtpd::start(netns, certificate, &opensmtpd, &ports).context("OpenSMTPD")?,
    ])
}
