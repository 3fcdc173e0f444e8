//! The kernel's NAT alone: destination NAT and masquerade by nftables, no header. What an edge without the injector does.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use injector_load::service::{ALL, Door};

use super::{Address, NAT, Peer, Running};
use crate::mail_sink;
use injector_testbed::netns::{MAIL, Netns, VIP_HAPROXY};

/// The table, which is there only while this peer is measured: connection tracking would be in the way of the others.
const TABLE: &str = "injector_bench";

pub(super) fn peer() -> Peer {
    let rules = rules();
    Peer {
        name: NAT.to_owned(),
        about: "nftables: destination NAT and masquerade, no header".to_owned(),
        door: Door::Bare,
        config: rules.clone(),
        address: Address::Edge(VIP_HAPROXY),
        start: Box::new(move |stage| Ok(Box::new(Table::load(&stage.topology.edge, &rules)?))),
    }
}

fn rules() -> String {
    let (vip, mail) = (VIP_HAPROXY.v4, MAIL.v4);
    let services = ALL.iter().map(|service| (service.port, service.bare_port()));
    let ports = services.chain([(mail_sink::PROXIED, mail_sink::BARE)]);
    let mut text = format!(
        "table ip {TABLE} {{\n  chain before {{\n    type nat hook prerouting priority dstnat; policy accept;\n"
    );
    for (public, bare) in ports {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "    ip daddr {vip} tcp dport {public} dnat to {mail}:{bare}");
    }
    let _ = write!(
        text,
        "  }}\n  chain after {{\n    type nat hook postrouting priority srcnat; policy accept;\n    \
         ip daddr {mail} masquerade\n  }}\n}}\n"
    );
    text
}

/// The loaded table; deleted on drop.
#[derive(Debug)]
struct Table {
    name: String,
}

impl Table {
    fn load(edge: &Netns, rules: &str) -> anyhow::Result<Self> {
        nft(edge.name(), rules)?;
        // Short sessions by the ten thousand: the table must not fill with those that are over.
        edge.sysctl("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "5")?;
        Ok(Self { name: edge.name().to_owned() })
    }
}

impl Running for Table {}

impl Drop for Table {
    fn drop(&mut self) {
        if let Err(error) = nft(&self.name, &format!("delete table ip {TABLE}\n")) {
            eprintln!("bench: {error:#}");
        }
    }
}

fn nft(netns: &str, commands: &str) -> anyhow::Result<()> {
    let mut child = Command::new("ip")
        .args(["netns", "exec", netns, "nft", "-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run nft (install nftables)")?;
    child.stdin.take().context("nft has no standard input")?.write_all(commands.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
