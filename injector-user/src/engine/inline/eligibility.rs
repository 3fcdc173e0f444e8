//! Whether the inline engine can serve a listener on this host, and why not.

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::{Context as _, bail};

use super::{
    attach::Role,
    attach_points::attach_points,
    nat_sync::{fresh, ruleset},
    programs::{self, addresses},
    routes::{Interface, LinkKind, Routes},
    sysctl::{self, Finding, Paths, Severity},
};
use crate::{
    config::{Inline as Settings, Listener, Nat},
    telemetry::log::target,
};

/// Why the engine cannot serve each of these listeners; `None` if it can. Finds all reasons for
/// which [`super::runner::start`] would fail, and changes nothing.
#[must_use]
pub fn ineligible_reasons(settings: &Settings, listeners: &[&Listener]) -> Vec<Option<String>> {
    let check = |listener: &&Listener| -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(check_eligible(settings, listener))
    };
    listeners.iter().map(|listener| Some(format!("{:#}", check(listener).err()?))).collect()
}

async fn check_eligible(settings: &Settings, listener: &Listener) -> anyhow::Result<()> {
    let backends = checked_backends(listener).map_err(anyhow::Error::msg)?;
    let routes = Routes::open().context("opening rtnetlink to read routes")?;
    for backend in &backends {
        let device = routes.towards(backend.ip()).await?;
        if let LinkKind::Other(number) = device.kind {
            let name = device.name;
            bail!(
                "{backend} is reached through {name}, whose packet format (ARPHRD {number}) is not supported"
            );
        }
    }
    programs::pins(settings)?;
    let points = attach_points(settings, &backends).await?;
    forwarding_findings(settings, &[listener], &points)?;
    if settings.nat == Nat::Managed {
        // Reading the table needs nft and CAP_NET_ADMIN. Rules that cannot be expressed are an
        // error.
        ruleset(settings, &[fresh(listener)])?.is_applied()?;
    }
    Ok(())
}

/// The backends' addresses, if the listener needs nothing that this engine does not support.
pub(super) fn checked_backends(listener: &Listener) -> Result<Vec<SocketAddr>, String> {
    for ipv6 in [false, true] {
        programs::template(&listener.receiver, ipv6, listener.waits_for_first_bytes())?;
    }
    addresses(listener)
}

/// Whether the engine can apply these changes to a listener that it serves.
///
/// # Errors
/// Why not.
pub fn check_reload(settings: &Settings, listener: &Listener) -> anyhow::Result<()> {
    checked_backends(listener).map_err(anyhow::Error::msg)?;
    if settings.nat == Nat::Managed {
        ruleset(settings, &[fresh(listener)])?;
    }
    Ok(())
}

/// Findings about forwarding between these devices. An error if nothing would be forwarded and the
/// engine may not change the settings.
fn forwarding_findings(
    settings: &Settings,
    listeners: &[&Listener],
    points: &BTreeSet<(Interface, Role)>,
) -> anyhow::Result<Vec<Finding>> {
    let bound = || listeners.iter().flat_map(|listener| &listener.bind);
    let mut interfaces: Vec<_> = points.iter().map(|(device, _)| device.name.clone()).collect();
    interfaces.dedup();
    let paths =
        Paths { interfaces, ipv4: bound().any(SocketAddr::is_ipv4), ipv6: bound().any(SocketAddr::is_ipv6) };
    let findings = sysctl::check(&paths)?;
    let blocks = |finding: &&Finding| finding.severity == Severity::Blocks;
    match findings.iter().find(blocks) {
        Some(finding) if !settings.set_sysctls => {
            bail!("{finding}; or have inline.set_sysctls = true set it")
        }
        _ => Ok(findings),
    }
}

pub(super) fn check_forwarding(
    settings: &Settings,
    listeners: &[&Listener],
    points: &BTreeSet<(Interface, Role)>,
) -> anyhow::Result<()> {
    let findings = forwarding_findings(settings, listeners, points)?;
    for finding in findings.iter().filter(|finding| finding.severity == Severity::MayBlock) {
        tracing::warn!(target: target::ENGINE_INLINE, "{finding}");
    }
    if settings.set_sysctls {
        for setting in sysctl::set(&findings)? {
            tracing::info!(target: target::ENGINE_INLINE, "set {setting}");
        }
    }
    Ok(())
}
