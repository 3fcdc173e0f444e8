//! Rules as kube-proxy writes them for a service with an external address: dozens of chains,
//! backends by probability, masquerade by mark (pkg/proxy/iptables/proxier.go in Kubernetes).

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use injector_testbed::forward::Forward;
use injector_testbed::netns::Netns;

/// Writes them for all forwards into the namespace, where they stay.
pub(crate) fn write(edge: &Netns, forwards: &[Forward]) -> anyhow::Result<()> {
    for (program, ipv6) in [("iptables-nft-restore", false), ("ip6tables-nft-restore", true)] {
        let own: Vec<_> = forwards.iter().filter(|forward| forward.bind.is_ipv6() == ipv6).collect();
        restore(edge, program, &rules(&own)?)?;
    }
    Ok(())
}

fn rules(forwards: &[&Forward]) -> anyhow::Result<String> {
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
    for (number, forward) in forwards.iter().enumerate() {
        let (ip, port) = (forward.bind.ip(), forward.bind.port());
        let (service, endpoint) = (format!("KUBE-SVC-{number}"), format!("KUBE-SEP-{number}"));
        // Two identical endpoints; the rules choose one at random.
        writeln!(text, ":{service} - [0:0]\n:{endpoint}A - [0:0]\n:{endpoint}B - [0:0]")?;
        writeln!(text, "-A KUBE-SERVICES -d {ip} -p tcp -m tcp --dport {port} -j {service}")?;
        writeln!(text, "-A {service} -j KUBE-MARK-MASQ")?;
        writeln!(text, "-A {service} -m statistic --mode random --probability 0.5 -j {endpoint}A")?;
        writeln!(text, "-A {service} -j {endpoint}B")?;
        for endpoint in [format!("{endpoint}A"), format!("{endpoint}B")] {
            writeln!(text, "-A {endpoint} -p tcp -m tcp -j DNAT --to-destination {}", forward.backend)?;
        }
    }
    text.push_str("COMMIT\n");
    Ok(text)
}

fn restore(edge: &Netns, program: &str, rules: &str) -> anyhow::Result<()> {
    let mut command = edge.command(program);
    command.stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| program.to_owned())?;
    child.stdin.take().context("no standard input")?.write_all(rules.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{program}: {}\n{rules}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
