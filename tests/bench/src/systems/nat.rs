//! Kernel NAT alone: destination NAT and masquerade by nftables, no header. This is what an edge
//! without the injector does.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use injector_load::service::{ALL, PortKind};

use super::{Address, NAT, RunningSystem, System};
use crate::mail_sink;
use injector_testbed::netns::{MAIL, Netns, VIP_HAPROXY};

/// The table exists only while this system is measured: connection tracking would slow down the
/// others.
const TABLE: &str = "injector_bench";

pub(super) fn system() -> System {
    let rules = rules();
    System {
        name: NAT.to_owned(),
        about: "nftables: destination NAT and masquerade, no header".to_owned(),
        port_kind: PortKind::Bare,
        config: rules.clone(),
        baseline: None,
        bans_attacker_at: None,
        address: Address::Edge(VIP_HAPROXY),
        start: Box::new(move |testbed| Ok(Box::new(Table::load(&testbed.topology.edge, &rules)?))),
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
        // Tens of thousands of short sessions: closed ones must not fill the table.
        edge.sysctl("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "5")?;
        Ok(Self { name: edge.name().to_owned() })
    }
}

impl RunningSystem for Table {}

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
