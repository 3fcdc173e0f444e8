//! What is compared. One file for each kind; [`all`] is the list.
//!
//! A peer is started for one measurement and ended after it: nothing but the peer under test runs on the edge, and no
//! hook of one lies in the way of another.
//!
//! To add a peer, write a function that returns a [`Peer`] and name it in [`all`]; for one more engine or setting of the
//! injector that is one line.

mod direct;
mod haproxy;
mod injector;
mod nat;
mod nginx;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use injector_load::service::{Door, Service};

pub use self::haproxy::Build;
use super::stage::Stage;
use injector_testbed::netns::Place;

/// What a peer knows of its own work after a measurement: names and values, as they go into the report.
pub type Proof = BTreeMap<String, f64>;

/// A started peer; ended on drop.
pub trait Running {
    /// Its processes.
    fn pids(&self) -> Vec<u32> {
        Vec::new()
    }

    /// What it has logged, for a measurement that failed.
    fn said(&self) -> String {
        String::new()
    }

    /// What it counted itself.
    ///
    /// # Errors
    /// When it does not answer.
    fn proof(&mut self) -> anyhow::Result<Proof> {
        Ok(Proof::new())
    }
}

type Start = Box<dyn Fn(&Stage) -> anyhow::Result<Box<dyn Running>>>;

/// One of those that are compared.
pub struct Peer {
    /// Unique; what `--only` and the reports call it.
    pub name: String,
    /// What it is, for the report.
    pub about: String,
    /// What it puts in front of a connection: the server's port with a header or the one without.
    pub door: Door,
    /// Its configuration, for the report.
    pub config: String,
    /// Where clients find it.
    address: Address,
    start: Start,
}

/// Where clients find a peer.
#[derive(Clone, Copy, Debug)]
enum Address {
    /// At an address of the edge, on a service's own port.
    Edge(Place),
    /// At the mail host itself, on the port without a header.
    Mail,
}

impl Peer {
    /// Where clients find a service.
    #[must_use]
    pub fn target(&self, service: &Service) -> SocketAddr {
        self.target_port(service.port, service.bare_port())
    }

    /// Where clients find what is behind a public port, or behind the mail host's port without a header.
    #[must_use]
    pub fn target_port(&self, port: u16, bare: u16) -> SocketAddr {
        match self.address {
            Address::Edge(vip) => SocketAddr::new(IpAddr::V4(vip.v4), port),
            Address::Mail => super::stage::mail(bare),
        }
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(&self, stage: &Stage) -> anyhow::Result<Box<dyn Running>> {
        (self.start)(stage)
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Programs that not every machine has.
#[derive(Clone, Debug, Default)]
pub struct Programs {
    /// Versions of HAProxy, the newest first.
    pub haproxies: Vec<Build>,
    /// nginx, with the folder of its stream module.
    pub nginx: Option<(PathBuf, PathBuf)>,
}

/// The name of the direct route, which all CPU figures are above.
pub const DIRECT: &str = "direct";
/// The name of kernel NAT alone.
pub const NAT: &str = "nat";
/// What the names of all HAProxy configurations begin with.
pub const HAPROXY: &str = "haproxy";

/// All peers, in the order of the reports.
#[must_use]
pub fn all(programs: &Programs) -> Vec<Peer> {
    let mut peers = vec![direct::peer(), nat::peer()];
    for build in &programs.haproxies {
        peers.extend(haproxy::peers(build));
    }
    peers.extend(programs.nginx.as_ref().map(|(program, modules)| nginx::peer(program, modules)));
    peers.extend(injector::engines());
    peers
}

/// Names of those that `--quick` compares: kernel NAT, the newest HAProxy as its developers would have it, and all our
/// engines.
#[must_use]
pub fn quick(programs: &Programs) -> Vec<String> {
    let mut names = vec![NAT.to_owned()];
    names.extend(best_haproxies(programs));
    names.extend(injector::engines().into_iter().map(|peer| peer.name));
    names
}

/// Names of those by which rules of enrolment are chosen; see [`enrolments`].
#[must_use]
pub fn for_enrolment(programs: &Programs) -> Vec<String> {
    let mut names = vec![NAT.to_owned()];
    names.extend(best_haproxies(programs));
    names.extend(enrolments().into_iter().map(|peer| peer.name));
    names
}

/// The newest HAProxy with splicing, with one thread and two: which is best depends on the work.
fn best_haproxies(programs: &Programs) -> Vec<String> {
    let peers = programs.haproxies.first().map(haproxy::peers).unwrap_or_default();
    peers.into_iter().map(|peer| peer.name).filter(|name| name.contains("-splice-")).collect()
}

/// The splice engine with other rules of enrolment, for choosing the default.
#[must_use]
pub fn enrolments() -> Vec<Peer> {
    injector::enrolments()
}
