//! What all trials share: namespaces, mail servers, and one front for each column of the matrix.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::OnceLock;

use anyhow::{Context, anyhow};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::{self, Injector};
use injector_testbed::forward::Forward;
use injector_testbed::haproxy::HaProxy;
use injector_testbed::kube_proxy::{self, ServicePort};
use injector_testbed::mail_client::Server;
use injector_testbed::mail_host::{MailHost, Marks};
use injector_testbed::netns::{Family, HostAddresses, Topology};
use injector_testbed::service::{MATRIX, Service};

/// A column of the matrix: a proxy on the edge that sends a header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Front {
    pub(crate) name: &'static str,
    /// The engine's name in the injector's configuration.
    pub(crate) engine: &'static str,
    pub(crate) vip: HostAddresses,
    pub(crate) kind: Kind,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// The reference.
    HaProxy,
    /// A daemon, with metrics at this port of the edge's loopback.
    Injector { metrics_port: u16 },
    /// A daemon with an engine that forwards packets, beside rules like those of kube-proxy or not.
    Inline { metrics_port: u16, kube_proxy: bool },
}

/// A running front.
#[derive(Debug)]
pub(crate) enum Running {
    HaProxy(HaProxy),
    Injector(Injector),
    Inline {
        injector: Injector,
        /// Pins are removed with it; programs and rules with the namespace.
        _bpffs: BpfFs,
    },
}

impl Running {
    pub(crate) fn log(&self) -> String {
        match self {
            Self::HaProxy(haproxy) => haproxy.log(),
            Self::Injector(injector) | Self::Inline { injector, .. } => injector.log(),
        }
    }
}

/// The testbed, created when the first trial needs it.
pub(crate) struct Shared {
    fronts: &'static [Front],
    testbed: OnceLock<Result<Testbed, String>>,
}

impl Shared {
    pub(crate) fn new(fronts: &'static [Front]) -> Self {
        Self { fronts, testbed: OnceLock::new() }
    }

    /// The testbed; if it cannot be created, every trial fails with the reason.
    pub(crate) fn testbed(&self) -> Result<&Testbed, String> {
        let made = self
            .testbed
            .get_or_init(|| Testbed::new(self.fronts).map_err(|error| format!("no testbed: {error:#}")));
        made.as_ref().map_err(Clone::clone)
    }
}

/// Namespaces and servers. Fields are dropped in this order: what runs in a namespace before the
/// namespace.
#[derive(Debug)]
pub(crate) struct Testbed {
    fronts: Vec<(Front, OnceLock<Result<Running, String>>)>,
    pub(crate) host: MailHost,
    pub(crate) topology: Topology,
}

/// The positions of all logs: the servers', and the length of each front's.
pub(crate) struct Start {
    servers: Marks,
    fronts: Vec<usize>,
}

impl Testbed {
    fn new(fronts: &[Front]) -> anyhow::Result<Self> {
        let topology = Topology::new().context("no namespaces")?;
        let host = MailHost::start(&topology.mail)?;
        let fronts = fronts.iter().map(|front| (*front, OnceLock::new())).collect();
        Ok(Self { fronts, host, topology })
    }

    /// A front, started if necessary.
    pub(crate) fn front(&self, index: usize) -> anyhow::Result<(Front, &Running)> {
        let (front, running) = self.fronts.get(index).context("no such front")?;
        let running = running.get_or_init(|| self.start(*front).map_err(|error| format!("{error:#}")));
        let running = running.as_ref().map_err(|error| anyhow!("cannot start {}: {error}", front.name))?;
        Ok((*front, running))
    }

    fn start(&self, front: Front) -> anyhow::Result<Running> {
        let forward =
            |service: Service| Family::ALL.map(|family| Forward::to_mail(front.vip, service, family));
        let forwards: Vec<_> = MATRIX.into_iter().flat_map(forward).collect();
        let edge = &self.topology.edge;
        match front.kind {
            Kind::HaProxy => HaProxy::start(edge, &forwards).map(Running::HaProxy),
            Kind::Injector { metrics_port } => {
                let metrics = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), metrics_port);
                let config = daemon::configuration(&forwards, front.engine, metrics);
                Injector::start(edge, &config).map(Running::Injector)
            }
            Kind::Inline { metrics_port, kube_proxy } => {
                let metrics = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), metrics_port);
                let bpffs = BpfFs::mount()?;
                if kube_proxy {
                    // Two identical endpoints; the rules choose one at random.
                    let port = |forward: &Forward| ServicePort {
                        external: forward.bind,
                        endpoints: vec![forward.backend; 2],
                    };
                    let ports: Vec<_> = forwards.iter().map(port).collect();
                    kube_proxy::write(edge, kube_proxy::Mode::Iptables, &ports)?;
                }
                let listeners = daemon::configuration(&forwards, front.engine, metrics);
                let pin = bpffs.path().display();
                let config = format!("{listeners}\n[inline]\npin = \"{pin}\"\n");
                Ok(Running::Inline { injector: Injector::start(edge, &config)?, _bpffs: bpffs })
            }
        }
    }

    /// A server at a port, for a client that trusts the mail host's certificate.
    pub(crate) fn server(&self, place: HostAddresses, family: Family, port: u16) -> Server<'_> {
        let authority_pem = &self.host.certificate.authority_pem;
        Server { address: SocketAddr::new(place.of(family), port), authority_pem }
    }

    pub(crate) fn mark(&self) -> Start {
        let length = |running: &Running| running.log().len();
        let fronts = self.running().map(|(_, running)| running.map_or(0, length)).collect();
        Start { servers: self.host.mark(), fronts }
    }

    pub(crate) fn logged_since(&self, start: &Start) -> String {
        let mut text = self.host.logged_since(start.servers);
        for ((front, running), from) in self.running().zip(&start.fronts) {
            let log = running.map(Running::log).unwrap_or_default();
            let new = log.get(*from..).unwrap_or_default();
            if !new.is_empty() {
                // Writing to a String cannot fail.
                let _ = write!(text, "{} logged:\n{new}", front.name);
            }
        }
        text
    }

    fn running(&self) -> impl Iterator<Item = (&Front, Option<&Running>)> {
        self.fronts.iter().map(|(front, running)| (front, running.get().and_then(|made| made.as_ref().ok())))
    }
}
