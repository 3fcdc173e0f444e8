//! `source_addresses`, of `[inline]` and of a listener.

use std::net::{IpAddr, Ipv4Addr};

use super::parse::section::{Section, Spanned};

pub(super) const FIELD: &str = "source_addresses";

/// Whether addresses of the loopback device may be sources. Packets from them leave no other device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loopback {
    Allowed,
    Refused,
}

/// Reads the addresses. Each invalid one is reported.
pub(super) fn read(section: &Section<'_>, texts: &[Spanned<&str>], loopback: Loopback) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for (at, text) in texts {
        let refused = |why: &str| section.report_field(*at, FIELD, &format!(" {text:?}: {why}"));
        match text.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
            Err(_) => refused("must be an IP address, such as \"192.0.2.10\" or \"2001:db8::10\""),
            Ok(ip) if !is_unicast(ip) || (ip.is_loopback() && loopback == Loopback::Refused) => {
                refused("must be an address of this host that backends can answer to");
            }
            Ok(ip) if addresses.contains(&ip) => refused("is there twice"),
            Ok(ip) => addresses.push(ip),
        }
    }
    addresses
}

fn is_unicast(ip: IpAddr) -> bool {
    !ip.is_unspecified() && !ip.is_multicast() && ip != Ipv4Addr::BROADCAST
}
