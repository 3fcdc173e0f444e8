//! The demo's hosts: three network namespaces, or loopback.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use anyhow::{Context as _, Result};
use injector_testbed::netns::{CLIENT, EDGE_INSIDE, Family, MAIL, Netns, Topology};
use tokio::runtime::{Builder, Runtime};

use super::service::Service;

/// The hosts and their addresses.
pub(super) struct Testbed {
    /// The host of the mail client.
    pub(super) client: Host,
    /// The host of the injector.
    pub(super) edge: Host,
    /// The host of the backend.
    pub(super) mail: Host,
    /// Both, except on loopback of a machine without IPv6.
    pub(super) families: &'static [Family],
    ports: Ports,
    /// Last: the runtimes above have sockets inside.
    topology: Option<Topology>,
}

/// The edge's ports: the standard ones in namespaces, any free ones on loopback.
struct Ports {
    smtp: u16,
    imap: u16,
    metrics: u16,
}

impl Testbed {
    /// Creates the namespaces if this process may, and uses loopback otherwise.
    pub(super) fn new() -> Result<Self> {
        if injector_testbed::netns::unavailable().is_some() {
            let here = || Host::new(None);
            let [smtp, imap, metrics] = free_ports()?;
            let ports = Ports { smtp, imap, metrics };
            let has_v6 = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
            let families = if has_v6 { &Family::ALL[..] } else { &[Family::V4] };
            return Ok(Self {
                client: here()?,
                edge: here()?,
                mail: here()?,
                families,
                ports,
                topology: None,
            });
        }
        let topology = Topology::new().context("cannot create the three network namespaces")?;
        Ok(Self {
            client: Host::new(Some(&topology.client))?,
            edge: Host::new(Some(&topology.edge))?,
            mail: Host::new(Some(&topology.mail))?,
            families: &Family::ALL,
            ports: Ports { smtp: 25, imap: 143, metrics: 9145 },
            topology: Some(topology),
        })
    }

    /// The injector's namespace; `None` on loopback.
    pub(super) fn edge_netns(&self) -> Option<&Netns> {
        self.topology.as_ref().map(|topology| &topology.edge)
    }

    /// Whether there are three hosts, and not only loopback.
    pub(super) fn has_namespaces(&self) -> bool {
        self.topology.is_some()
    }

    /// The address that mail is sent from.
    pub(super) fn client_ip(&self, family: Family) -> IpAddr {
        match (&self.topology, family) {
            (Some(_), _) => CLIENT.of(family),
            // All of 127.0.0.0/8 is local, so IPv4 can have a client of its own; IPv6 has ::1 and
            // nothing else.
            (None, Family::V4) => Ipv4Addr::new(127, 0, 0, 2).into(),
            (None, Family::V6) => Ipv6Addr::LOCALHOST.into(),
        }
    }

    /// The edge's address towards the backend, which is the peer of the TCP connection.
    pub(super) fn edge_ip(&self, family: Family) -> IpAddr {
        self.or_loopback(EDGE_INSIDE.of(family), family)
    }

    /// The address that clients connect to.
    pub(super) fn listener(&self, service: Service, family: Family) -> SocketAddr {
        let port = match service.protocol {
            injector_testbed::demo_backend::Protocol::Smtp => self.ports.smtp,
            injector_testbed::demo_backend::Protocol::Imap => self.ports.imap,
        };
        SocketAddr::new(self.or_loopback(service.address.of(family), family), port)
    }

    /// The backend's listen addresses of a service, by family; on loopback with any free port.
    pub(super) fn backends(&self, service: Service) -> Vec<SocketAddr> {
        let port = if self.has_namespaces() { service.backend_port } else { 0 };
        let address = |family: &Family| SocketAddr::new(self.or_loopback(MAIL.of(*family), *family), port);
        self.families.iter().map(address).collect()
    }

    /// The address of the injector's metrics, on the edge's loopback.
    pub(super) fn metrics(&self) -> SocketAddr {
        SocketAddr::new(Ipv4Addr::LOCALHOST.into(), self.ports.metrics)
    }

    fn or_loopback(&self, real: IpAddr, family: Family) -> IpAddr {
        match (&self.topology, family) {
            (Some(_), _) => real,
            (None, Family::V4) => Ipv4Addr::LOCALHOST.into(),
            (None, Family::V6) => Ipv6Addr::LOCALHOST.into(),
        }
    }
}

/// One host: a runtime whose threads, and so whose sockets, are in its namespace.
pub(super) struct Host(Option<Runtime>);

impl Host {
    fn new(netns: Option<&Netns>) -> Result<Self> {
        // One worker, started here: a thread begins in the namespace of the thread that starts it.
        let build = || Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = match netns {
            Some(netns) => netns.run(build)?,
            None => build(),
        };
        Ok(Self(Some(runtime.context("cannot start a host's runtime")?)))
    }

    /// Runs `work` on this host.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T> {
        let runtime = self.0.as_ref().context("this host is gone")?;
        runtime.spawn(work).await.context("work on a host of the demo panicked")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // A runtime must not block inside another one. Its sockets are closed nevertheless.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Ports that are free on loopback in both families at this moment.
fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut held = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        let v4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port on loopback")?;
        *port = v4.local_addr()?.port();
        // Held until all are chosen, so that no port is chosen twice.
        let v6 = TcpListener::bind((Ipv6Addr::LOCALHOST, *port));
        held.push((v4, v6));
    }
    Ok(ports)
}
