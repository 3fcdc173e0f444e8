//! Where the benchmark takes place: the three namespaces, with the load generator's server in the third.

use std::net::{IpAddr, SocketAddr};

use injector_load::order::{Order, Outcome};

use super::ends::{Client, Server};
use injector_testbed::netns::{EDGE_OUTSIDE, MAIL, Topology};

/// Ports for clients' connections, so many that none has to wait for one; the services' are below.
const LOCAL_PORTS: &str = "10000 65000";

/// The namespaces and the server; all is gone when it is dropped.
#[derive(Debug)]
pub struct Stage {
    // Before the namespaces: fields are dropped in this order.
    /// What answers.
    pub server: Server,
    /// Client, edge, mail.
    pub topology: Topology,
}

impl Stage {
    /// # Errors
    /// When not root, or the namespaces cannot be made.
    pub fn new() -> anyhow::Result<Self> {
        let topology = Topology::new()?;
        // The direct route: through the edge, which forwards and does nothing else.
        topology.client.ip(&["route", "add", "10.25.0.0/24", "via", &EDGE_OUTSIDE.v4.to_string()])?;
        for netns in [&topology.client, &topology.edge, &topology.mail] {
            netns.sysctl("net/ipv4/ip_local_port_range", LOCAL_PORTS)?;
            // Thousands of short sessions a second, from one address to one port.
            netns.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
            netns.sysctl("net/core/somaxconn", "16384")?;
            netns.sysctl("net/ipv4/tcp_max_syn_backlog", "16384")?;
        }
        let server = Server::start(&topology.mail)?;
        Ok(Self { server, topology })
    }

    /// Has a client carry out an order.
    ///
    /// # Errors
    /// When it cannot.
    pub fn order(&self, order: &Order) -> anyhow::Result<Outcome> {
        Client::start(&self.topology.client, order)?.outcome()
    }
}

/// A port of the mail host.
#[must_use]
pub fn mail(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(MAIL.v4), port)
}
