//! What bpf_fib_lookup needs of the host.
//!
//! It finds the route of the host's own packets if it is asked for `lo`, and `lo` only answers if
//! it forwards (net/core/filter.c). No packet is forwarded because of that: what comes in by `lo`
//! is addressed to this host.

use std::{fs, io, path::PathBuf};

use crate::{os::sysctl, telemetry::log::target};

const IPV4: &str = "net/ipv4/conf/lo/forwarding";
const IPV6: &str = "net/ipv6/conf/lo/forwarding";

/// The directories of the settings that it writes.
pub(super) fn directories() -> impl Iterator<Item = PathBuf> {
    [IPV4, IPV6].into_iter().filter_map(|key| Some(sysctl::path(key).parent()?.to_owned()))
}

/// Allows route look-ups. IPv6 connections are left to the sockets where that would cost the host
/// its default route.
///
/// # Errors
/// When it cannot be set for IPv4.
pub(super) fn allow() -> anyhow::Result<()> {
    set(IPV4)?;
    if let Some(device) = would_lose_default() {
        let name = IPV6.replace('/', ".");
        tracing::warn!(target: target::ENGINE_INLINE,
            "IPv6 connections are left to the sockets: setting {name} = 1 would remove the default route that a router advertised on {device}; set net.ipv6.conf.{device}.accept_ra = 2, or {name} = 1 at boot"
        );
        return Ok(());
    }
    if let Err(error) = set(IPV6) {
        tracing::warn!(target: target::ENGINE_INLINE, error = format!("{error:#}"), "IPv6 connections are left to the sockets");
    }
    Ok(())
}

/// The same, after another tool may have written net.ipv4.ip_forward or
/// net.ipv6.conf.all.forwarding, which set those of `lo` as well. Where that fails, connections go
/// to the sockets.
pub(super) fn allow_again() {
    let _ = set(IPV4);
    if would_lose_default().is_none() {
        let _ = set(IPV6);
    }
}

/// The device whose default route the host would lose.
fn would_lose_default() -> Option<String> {
    if sysctl::read(IPV6).is_ok_and(|value| value != "0") {
        return None;
    }
    let routes = fs::read_to_string("/proc/net/ipv6_route").ok()?;
    let device = advertised_default(&routes)?;
    let accept_ra = sysctl::read(&format!("net/ipv6/conf/{device}/accept_ra"));
    accept_ra.is_ok_and(|value| value != "2").then(|| device.to_owned())
}

fn set(key: &str) -> anyhow::Result<()> {
    let name = key.replace('/', ".");
    match sysctl::set(key, "1") {
        // The kernel has no IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound && key == IPV6 => {}
        Err(error) => anyhow::bail!(
            "{name} = 1 cannot be set ({error}): set it on the host, or let the daemon write /proc/sys"
        ),
        Ok(true) => tracing::info!(target: target::ENGINE_INLINE, "set {name} = 1"),
        Ok(false) => {}
    }
    Ok(())
}

/// The device of a default route that a router has advertised. The kernel removes those when any
/// device begins to forward (addrconf_fixup_forwarding, net/ipv6/addrconf.c:
/// rt6_purge_dflt_routers), but on devices with `accept_ra = 2`.
fn advertised_default(routes: &str) -> Option<&str> {
    /// `RTF_DEFAULT | RTF_ADDRCONF` (include/uapi/linux/ipv6_route.h).
    const ADVERTISED: u32 = 0x0001_0000 | 0x0004_0000;

    routes.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let length = fields.nth(1)?;
        let (flags, device) = (fields.nth(6)?, fields.next()?);
        let flags = u32::from_str_radix(flags, 16).ok()?;
        (length == "00" && flags & ADVERTISED == ADVERTISED).then_some(device)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_advertised_default_route_is_found() {
        let none = "0".repeat(32);
        let route = |length: &str, flags: &str, device: &str| {
            format!("{none} {length} {none} 00 fe80{none} 00000400 00000002 00000000 {flags}     {device}\n")
        };
        let own = route("00", "00000003", "eth0") + &route("40", "00450003", "eth1");
        assert_eq!(advertised_default(&own), None);
        assert_eq!(advertised_default(&(own + &route("00", "00450003", "eth2"))), Some("eth2"));
        assert_eq!(advertised_default("rubbish\n"), None);
    }
}
