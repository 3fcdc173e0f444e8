//! The three namespaces that every privileged test uses: client, edge and mail.

use super::ip::ip;
use super::{CLIENT, EDGE_INSIDE, EDGE_OUTSIDE, HostAddresses, MAIL, Netns, VIPS};

/// client — edge — mail, joined by veth, with the addresses above.
///
/// The client reaches the public addresses through the edge; the mail servers' default route is the
/// edge, which forwards. Interfaces are `eth0` in client and mail, `outside` and `inside` in the
/// edge.
#[derive(Debug)]
pub struct Topology {
    /// Senders and readers run here.
    pub client: Netns,
    /// The injector runs here; the public addresses are on its `lo`.
    pub edge: Netns,
    /// Postfix and Dovecot run here.
    pub mail: Netns,
}

impl Topology {
    /// Creates the three namespaces. A process can have one such topology at a time.
    ///
    /// # Errors
    /// As [`Netns::new`], and when the kernel has no veth.
    pub fn new() -> anyhow::Result<Self> {
        Self::of(["client", "edge", "mail"].map(Netns::new))
    }

    /// As [`Self::new`]. A process can have one with each name, beside one without.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn named(name: &str) -> anyhow::Result<Self> {
        Self::of(["client", "edge", "mail"].map(|role| Netns::new(&format!("{role}-{name}"))))
    }

    fn of([client, edge, mail]: [anyhow::Result<Netns>; 3]) -> anyhow::Result<Self> {
        let topology = Self { client: client?, edge: edge?, mail: mail? };
        let Self { client, edge, mail } = &topology;
        join((client, "eth0"), (edge, "outside"))?;
        join((edge, "inside"), (mail, "eth0"))?;
        add_address(client, "eth0", CLIENT)?;
        add_address(edge, "outside", EDGE_OUTSIDE)?;
        add_address(edge, "inside", EDGE_INSIDE)?;
        add_address(mail, "eth0", MAIL)?;
        for vip in VIPS {
            edge.ip(&["address", "add", &format!("{}/32", vip.v4), "dev", "lo"])?;
            edge.ip(&["address", "add", &format!("{}/128", vip.v6), "dev", "lo", "nodad"])?;
        }
        edge.sysctl("net/ipv4/ip_forward", "1")?;
        edge.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        client.ip(&["route", "add", "192.0.2.0/24", "via", &EDGE_OUTSIDE.v4.to_string()])?;
        client.ip(&["route", "add", "2001:db8:a::/64", "via", &EDGE_OUTSIDE.v6.to_string()])?;
        mail.ip(&["route", "add", "default", "via", &EDGE_INSIDE.v4.to_string()])?;
        mail.ip(&["route", "add", "default", "via", &EDGE_INSIDE.v6.to_string()])?;
        Ok(topology)
    }
}

/// Joins two namespaces by a veth pair with these names, both up.
fn join(left: (&Netns, &str), right: (&Netns, &str)) -> anyhow::Result<()> {
    let (left_name, right_name) = (left.0.name(), right.0.name());
    let ends = ["link", "add", left.1, "netns", left_name, "type", "veth", "peer", "name", right.1];
    ip(&[&ends[..], &["netns", right_name]].concat())?;
    left.0.ip(&["link", "set", left.1, "up"])?;
    right.0.ip(&["link", "set", right.1, "up"])
}

/// Adds both addresses to an interface; the IPv6 address is usable at once.
fn add_address(netns: &Netns, interface: &str, place: HostAddresses) -> anyhow::Result<()> {
    netns.ip(&["address", "add", &format!("{}/24", place.v4), "dev", interface])?;
    netns.ip(&["address", "add", &format!("{}/64", place.v6), "dev", interface, "nodad"])
}
