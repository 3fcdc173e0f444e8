//! Rules as kube-proxy writes them for a Service with an external address and
//! `externalTrafficPolicy: Cluster`: dozens of chains, endpoints by probability, masquerade by mark
//! (pkg/proxy/iptables/proxier.go and pkg/proxy/nftables/proxier.go in Kubernetes).

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::process::Stdio;

use anyhow::{Context as _, ensure};

use crate::netns::{Family, Netns};

/// How kube-proxy translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `--proxy-mode iptables`.
    Iptables,
    /// `--proxy-mode nftables`.
    Nftables,
}

/// A port of a Service.
#[derive(Clone, Debug)]
pub struct ServicePort {
    /// The external address and the port.
    pub external: SocketAddr,
    /// Where the rules lead, one at random. All of one family.
    pub endpoints: Vec<SocketAddr>,
}

/// Writes the rules for all ports into the namespace, where they stay. They replace earlier ones of the
/// same mode.
///
/// # Errors
/// When the program is missing, or refuses the rules.
pub fn write(node: &Netns, mode: Mode, ports: &[ServicePort]) -> anyhow::Result<()> {
    for family in Family::ALL {
        let own: Vec<_> =
            ports.iter().filter(|port| port.external.is_ipv6() == (family == Family::V6)).collect();
        match mode {
            Mode::Iptables => {
                let program = match family {
                    Family::V4 => "iptables-nft-restore",
                    Family::V6 => "ip6tables-nft-restore",
                };
                restore(node, program, &iptables(&own)?)?;
            }
            Mode::Nftables => node.nft(&nftables(&own, family)?)?,
        }
    }
    Ok(())
}

fn iptables(ports: &[&ServicePort]) -> anyhow::Result<String> {
    let mut text = String::from(
        "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n\
         -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
         -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n",
    );
    for (number, port) in ports.iter().enumerate() {
        let (ip, external) = (port.external.ip(), port.external.port());
        let service = format!("KUBE-SVC-{number}");
        writeln!(text, ":{service} - [0:0]")?;
        writeln!(text, "-A KUBE-SERVICES -d {ip} -p tcp -m tcp --dport {external} -j {service}")?;
        writeln!(text, "-A {service} -j KUBE-MARK-MASQ")?;
        for (index, endpoint) in port.endpoints.iter().enumerate() {
            let chain = format!("KUBE-SEP-{number}-{index}");
            let left = port.endpoints.len() - index;
            let chance = match left {
                1 => String::new(),
                _ => format!("-m statistic --mode random --probability {:.10} ", 1.0 / left as f64),
            };
            writeln!(text, ":{chain} - [0:0]")?;
            writeln!(text, "-A {service} {chance}-j {chain}")?;
            writeln!(text, "-A {chain} -p tcp -m tcp -j DNAT --to-destination {endpoint}")?;
        }
    }
    text.push_str("COMMIT\n");
    Ok(text)
}

fn nftables(ports: &[&ServicePort], family: Family) -> anyhow::Result<String> {
    let (table, ip) = match family {
        Family::V4 => ("ip kube-proxy", "ip"),
        Family::V6 => ("ip6 kube-proxy", "ip6"),
    };
    let mut text = format!(
        "add table {table}\ndelete table {table}\ntable {table} {{\n\
         chain mark-for-masquerade {{ meta mark set meta mark | 0x4000; }}\n\
         chain masquerading {{ meta mark & 0x4000 == 0 return; meta mark set meta mark ^ 0x4000; \
         masquerade fully-random; }}\n"
    );
    let mut elements = Vec::new();
    for (number, port) in ports.iter().enumerate() {
        let mut verdicts = Vec::new();
        for (index, endpoint) in port.endpoints.iter().enumerate() {
            writeln!(text, "chain endpoint-{number}-{index} {{ meta l4proto tcp dnat to {endpoint}; }}")?;
            verdicts.push(format!("{index} : goto endpoint-{number}-{index}"));
        }
        let (count, verdicts) = (verdicts.len(), verdicts.join(", "));
        writeln!(text, "chain service-{number} {{ numgen random mod {count} vmap {{ {verdicts} }}; }}")?;
        writeln!(text, "chain external-{number} {{ jump mark-for-masquerade; goto service-{number}; }}")?;
        let (address, external) = (port.external.ip(), port.external.port());
        elements.push(format!("{address} . tcp . {external} : goto external-{number}"));
    }
    let elements = if elements.is_empty() {
        String::new()
    } else {
        format!("elements = {{ {} }};", elements.join(", "))
    };
    write!(
        text,
        "map service-ips {{ type {}_addr . inet_proto . inet_service : verdict; {elements} }}\n\
         chain services {{ {ip} daddr . meta l4proto . th dport vmap @service-ips; }}\n\
         chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}\n\
         chain nat-output {{ type nat hook output priority -100; jump services; }}\n\
         chain nat-postrouting {{ type nat hook postrouting priority srcnat; jump masquerading; }}\n}}\n",
        if family == Family::V4 { "ipv4" } else { "ipv6" }
    )?;
    Ok(text)
}

fn restore(node: &Netns, program: &str, rules: &str) -> anyhow::Result<()> {
    let mut command = node.command(program);
    command.stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| program.to_owned())?;
    child.stdin.take().context("no standard input")?.write_all(rules.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{program}: {}\n{rules}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
