//! The testbed of a measurement: the three namespaces, with the load generator's server in the mail
//! namespace.

use std::net::{IpAddr, SocketAddr};

use injector_load::job::{Job, JobOutcome};

use super::attacker::Attacker;
use super::load_process::{LoadClient, LoadServer};
use injector_testbed::netns::{EDGE_OUTSIDE, MAIL, Topology};

/// Local ports of clients, so many that no client has to wait for one; the services' ports are
/// below.
pub const LOCAL_PORTS: &str = "10000 65000";

/// Local ports of an edge whose program rewrites packets: the ports outside belong to the program.
pub const FEW_LOCAL_PORTS: &str = "60000 65000";

/// The setting.
pub const LOCAL_PORT_RANGE: &str = "net/ipv4/ip_local_port_range";

/// The namespaces and the server; removed on drop.
#[derive(Debug)]
pub struct Testbed {
    // Before the namespaces: fields are dropped in this order.
    /// The load generator's server.
    pub server: LoadServer,
    /// The attacker that floods the edge, with workloads that need it.
    pub attacker: Option<Attacker>,
    /// Client, edge, mail.
    pub topology: Topology,
}

impl Testbed {
    /// # Errors
    /// When not root, or the namespaces cannot be made.
    pub fn new() -> anyhow::Result<Self> {
        Self::on(Topology::new()?)
    }

    /// A second one, beside one made by [`Self::new`].
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn second() -> anyhow::Result<Self> {
        Self::on(Topology::named("second")?)
    }

    fn on(topology: Topology) -> anyhow::Result<Self> {
        // The direct route: through the edge, which only forwards.
        topology.client.ip(&["route", "add", "10.25.0.0/24", "via", &EDGE_OUTSIDE.v4.to_string()])?;
        for netns in [&topology.client, &topology.edge, &topology.mail] {
            netns.sysctl(LOCAL_PORT_RANGE, LOCAL_PORTS)?;
            // For thousands of short sessions a second, from one address to one port.
            netns.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
            netns.sysctl("net/core/somaxconn", "16384")?;
            netns.sysctl("net/ipv4/tcp_max_syn_backlog", "16384")?;
        }
        let server = LoadServer::start(&topology.mail)?;
        Ok(Self { server, attacker: None, topology })
    }

    /// Executes a job with a new client.
    ///
    /// # Errors
    /// When the client fails.
    pub fn run(&self, job: &Job) -> anyhow::Result<JobOutcome> {
        LoadClient::start(&self.topology.client, job)?.outcome()
    }
}

/// A port of the mail host.
#[must_use]
pub fn mail(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(MAIL.v4), port)
}
