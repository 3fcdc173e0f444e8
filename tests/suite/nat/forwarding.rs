//! The kernel's forwarding settings, and whether they have the expected effect.

use anyhow::ensure;
use injector_testbed::netns::{Family, MAIL};
use injector_user::engine::inline::sysctl::{Finding, Paths, Severity, check, set};

use crate::testbed::{Testbed, service, vip};

fn paths() -> Paths {
    Paths { interfaces: ["outside", "inside"].map(str::to_owned).into(), ipv4: true, ipv6: true }
}

pub(crate) fn found_and_set(testbed: &Testbed) -> anyhow::Result<()> {
    let edge = &testbed.topology.edge;
    for key in ["all", "default", "outside", "inside"] {
        edge.sysctl(&format!("net/ipv4/conf/{key}/rp_filter"), "0")?;
    }
    testbed.apply(&[service()])?;
    let findings = testbed.on_edge(|| check(&paths()))??;
    ensure!(findings.is_empty(), "the testbed forwards, and still: {findings:?}");

    edge.sysctl("net/ipv4/ip_forward", "0")?;
    edge.sysctl("net/ipv6/conf/all/forwarding", "0")?;
    let findings = testbed.on_edge(|| check(&paths()))??;
    let texts: Vec<_> = findings.iter().map(ToString::to_string).collect();
    ensure!(findings.len() == 2 && findings.iter().all(|f| f.severity == Severity::Blocks), "{texts:?}");
    let lines = ["net.ipv4.conf.outside.forwarding = 1", "net.ipv4.conf.inside.forwarding = 1"];
    ensure!(
        lines.iter().all(|line| texts[0].contains(line)) && texts[1].contains("net.ipv6.conf."),
        "{texts:?}"
    );
    for family in Family::ALL {
        ensure!(testbed.ask(vip(family)).is_err(), "{}: not needed at all", family.name());
    }

    let settings = testbed.on_edge(|| set(&findings))??;
    ensure!(settings.len() >= 3, "{settings:?}");
    for family in Family::ALL {
        let greeting = testbed.ask(vip(family))?;
        ensure!(greeting.server.ip() == MAIL.of(family), "{greeting:?}");
    }
    let left = testbed.on_edge(|| check(&paths()))??;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Reported, but not changed by `set`.
pub(crate) fn reverse_path(testbed: &Testbed) -> anyhow::Result<()> {
    let edge = &testbed.topology.edge;
    edge.sysctl("net/ipv4/conf/all/rp_filter", "1")?;
    edge.sysctl("net/ipv4/conf/outside/rp_filter", "0")?;
    edge.sysctl("net/ipv4/conf/inside/rp_filter", "2")?;
    let is_advice = |findings: &[Finding]| match findings {
        [only] => {
            let text = only.to_string();
            only.severity == Severity::MayBlock && text.ends_with("; set net.ipv4.conf.outside.rp_filter = 2")
        }
        _ => false,
    };
    let findings = testbed.on_edge(|| check(&paths()))??;
    ensure!(is_advice(&findings), "{findings:?}");
    let settings = testbed.on_edge(|| set(&findings))??;
    ensure!(settings.is_empty(), "{settings:?}");
    edge.sysctl("net/ipv4/conf/outside/rp_filter", "2")?;
    let findings = testbed.on_edge(|| check(&paths()))??;
    ensure!(findings.is_empty(), "{findings:?}");
    Ok(())
}
