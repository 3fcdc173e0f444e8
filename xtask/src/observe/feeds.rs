//! What the injector of the live run follows: a list of bans, Debian's CrowdSec, and an API of Kubernetes
//! that knows one Service.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use anyhow::Result;
use injector_testbed::{
    crowdsec::{CrowdSec, LAPI},
    kubernetes_api::ApiStub,
    netns::{MAIL, Netns},
    service::SMTP,
};

/// A client that is banned by the list.
pub(super) const BANNED: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 66);

/// The Service that a listener's backend names.
pub(super) const SERVICE: &str = "mail/mailserver-proxy";

/// They run until drop.
pub(super) struct Feeds {
    _crowdsec: CrowdSec,
    _api: ApiStub,
}

impl Feeds {
    /// Starts them on the edge, and writes the files that [`tables`] names.
    pub(super) fn start(edge: &Netns, folder: &Path) -> Result<Self> {
        let crowdsec = CrowdSec::start(edge, None)?;
        fs::write(folder.join("crowdsec.key"), crowdsec.add_bouncer("injector")?)?;
        for decision in [
            &["--ip", "192.0.2.201", "--type", "ban"],
            &["--range", "192.0.2.208/28", "--type", "ban"],
            // Not a ban.
            &["--ip", "192.0.2.202", "--type", "throttle"],
        ] {
            crowdsec.cscli(&[&["decisions", "add", "--duration", "4h"][..], decision].concat())?;
        }
        fs::write(folder.join("deny.txt"), format!("{BANNED}\n203.0.113.0/24\n"))?;
        let api = ApiStub::start(edge)?;
        api.add("mailserver-proxy-1", SocketAddr::new(MAIL.v4.into(), SMTP.proxied), true);
        api.add(
            "mailserver-proxy-2",
            SocketAddr::new(Ipv4Addr::new(10, 25, 0, 3).into(), SMTP.proxied),
            false,
        );
        // JSON is YAML.
        fs::write(folder.join("kubeconfig"), ApiStub::kubeconfig())?;
        Ok(Self { _crowdsec: crowdsec, _api: api })
    }
}

/// The tables of the configuration that name them.
pub(super) fn tables(folder: &Path, pin: &Path) -> String {
    let (folder, pin) = (folder.display(), pin.display());
    format!(
        "\n[guard]\npin = \"{pin}/guard\"\ndeny_files = [\"{folder}/deny.txt\"]\n\
         [guard.crowdsec]\nurl = \"http://{LAPI}\"\napi_key_file = \"{folder}/crowdsec.key\"\n\
         interval = \"1s\"\n\n[kubernetes]\nkubeconfig = \"{folder}/kubeconfig\"\n"
    )
}
