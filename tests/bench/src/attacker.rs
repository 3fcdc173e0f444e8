//! The attacker: a namespace beside the client's, whose SYNs reach the edge by a device of its own.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use anyhow::{bail, ensure};
use injector_load::flood::{Flood, HardwareAddress, SOURCE_PREFIX, SOURCES};
use injector_testbed::netns::Netns;

use super::load_process::FloodProcess;

/// The attacker's device.
const DEVICE: &str = "eth0";
/// The edge's device towards the attacker.
const EDGE_DEVICE: &str = "hostile";

const HARDWARE: HardwareAddress = HardwareAddress([2, 0, 0, 0, 0, 2]);
const EDGE_HARDWARE: HardwareAddress = HardwareAddress([2, 0, 0, 0, 0, 1]);
/// Where the edge's answers go: to no device, so that the attacker's host does nothing for them.
const UNUSED: HardwareAddress = HardwareAddress([2, 0, 0, 0, 0, 3]);

/// The next hop towards the forged sources, and the edge's address on the same network
/// (RFC 5737, TEST-NET-3).
const ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
const EDGE_ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

/// The attacker's namespace; removed on drop.
#[derive(Debug)]
pub struct Attacker(Netns);

impl Attacker {
    /// Joins a new namespace to the edge, which gets a route to the forged sources: without one it
    /// would not answer their SYNs, and the flood would cost it less than a real one.
    ///
    /// # Errors
    /// As [`Netns::new`], and when the kernel has no veth.
    pub fn join(edge: &Netns) -> anyhow::Result<Self> {
        let netns = Netns::new("attacker")?;
        let (hardware, edge_hardware) = (HARDWARE.to_string(), EDGE_HARDWARE.to_string());
        let ends = ["link", "add", EDGE_DEVICE, "address", &edge_hardware, "type", "veth"];
        let peer = ["peer", "name", DEVICE, "address", &hardware, "netns", netns.name()];
        edge.ip(&[&ends[..], &peer].concat())?;
        edge.ip(&["link", "set", EDGE_DEVICE, "up"])?;
        netns.ip(&["link", "set", DEVICE, "up"])?;
        edge.ip(&["address", "add", &format!("{EDGE_ADDRESS}/24"), "dev", EDGE_DEVICE])?;
        let (via, unused) = (ADDRESS.to_string(), UNUSED.to_string());
        edge.ip(&["neigh", "add", &via, "lladdr", &unused, "nud", "permanent", "dev", EDGE_DEVICE])?;
        edge.ip(&["route", "add", &format!("{SOURCES}/{SOURCE_PREFIX}"), "via", &via])?;
        Ok(Self(netns))
    }

    /// Starts to flood `target` at this rate, in SYNs per second, for at most this long.
    ///
    /// # Errors
    /// When the target is not an IPv4 address, or the process does not start.
    pub fn flood(&self, target: SocketAddr, rate: f64, seconds: f64) -> anyhow::Result<FloodProcess> {
        let SocketAddr::V4(target) = target else { bail!("{target}: only IPv4 is flooded") };
        FloodProcess::start(&self.0, &flood(target, rate, seconds))
    }
}

fn flood(target: SocketAddrV4, rate: f64, seconds: f64) -> Flood {
    Flood { device: DEVICE.to_owned(), from: HARDWARE, next_hop: EDGE_HARDWARE, target, rate, seconds }
}

/// The networks of the forged sources, as a ban names them: none is shorter than /16.
#[must_use]
pub fn networks() -> Vec<String> {
    const LENGTH: u8 = 16;
    let count = 1_u32 << (LENGTH - SOURCE_PREFIX);
    (0..count)
        .map(|at| format!("{}/{LENGTH}", Ipv4Addr::from(u32::from(SOURCES) + (at << (32 - LENGTH)))))
        .collect()
}

/// Sets what decides how many handshakes the edge keeps before it sends cookies to the defaults of
/// a large host; the testbed has more, for thousands of good sessions a second.
///
/// # Errors
/// When a setting does not exist.
pub fn set_default_backlog(edge: &Netns) -> anyhow::Result<()> {
    edge.sysctl("net/core/somaxconn", "4096")?;
    edge.sysctl("net/ipv4/tcp_max_syn_backlog", "4096")?;
    let cookies = edge.run(|| std::fs::read_to_string("/proc/sys/net/ipv4/tcp_syncookies"))??;
    ensure!(cookies.trim() == "1", "net.ipv4.tcp_syncookies is {}, not its default 1", cookies.trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netstat::TcpCounts;
    use injector_testbed::netns::unavailable;
    use std::net::TcpListener;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn every_forged_syn_is_answered() {
        if let Some(reason) = unavailable() {
            eprintln!("skipped: {reason}");
            return;
        }
        let edge = Netns::new("edge").unwrap();
        edge.ip(&["address", "add", "192.0.2.10/32", "dev", "lo"]).unwrap();
        let attacker = Attacker::join(&edge).unwrap();
        // Cookies without regard to the queue: each is counted.
        edge.sysctl("net/ipv4/tcp_syncookies", "2").unwrap();
        let target: SocketAddrV4 = "192.0.2.10:7003".parse().unwrap();
        let _listener = edge.run(|| TcpListener::bind(target)).unwrap().unwrap();
        let flood = flood(target, 2000.0, 0.1);
        let over = AtomicBool::new(false);
        let sent = attacker.0.run(|| injector_load::flood::execute(&flood, &over)).unwrap().unwrap().sent;
        let answered = TcpCounts::of(&edge).unwrap().cookies_sent;
        assert!(sent > 0 && answered == sent, "{answered} of {sent}");
    }

    #[test]
    fn the_banned_networks_are_the_forged_sources() {
        assert_eq!(networks(), ["198.18.0.0/16", "198.19.0.0/16"]);
    }
}
