//! The systems under test. One file for each kind; [`all`] is the list.
//!
//! A system is started for one measurement and stopped after it: only the system under test runs on
//! the edge, and no system's hooks affect another.
//!
//! To add a system, write a function that returns a [`System`] and name it in [`all`]. One more
//! engine or setting of the injector takes one line.

mod direct;
mod guard;
mod haproxy;
mod injector;
mod nat;
mod nginx;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use injector_load::service::{PortKind, Service};

pub use self::haproxy::Build;
use super::testbed::{LOCAL_PORT_RANGE, LOCAL_PORTS, Testbed};
use injector_testbed::netns::HostAddresses;

/// What a system counted itself during a measurement: names and values, as in the report.
pub type Counters = BTreeMap<String, f64>;

/// A started system; stopped on drop.
pub trait RunningSystem {
    /// Its processes.
    fn pids(&self) -> Vec<u32> {
        Vec::new()
    }

    /// Its log, for a measurement that failed.
    fn log(&self) -> String {
        String::new()
    }

    /// What it counted itself.
    ///
    /// # Errors
    /// When it does not respond.
    fn counters(&mut self) -> anyhow::Result<Counters> {
        Ok(Counters::new())
    }
}

type Start = Box<dyn Fn(&Testbed) -> anyhow::Result<Box<dyn RunningSystem>>>;

/// A system under test.
pub struct System {
    /// Unique name, for `--only` and the reports.
    pub name: String,
    /// Description for the report.
    pub about: String,
    /// The kind of server port that it connects to.
    pub port_kind: PortKind,
    /// Its configuration, for the report.
    pub config: String,
    /// The system that it is compared with, if it is a variant of one.
    pub baseline: Option<Box<System>>,
    /// The hook at which it drops the packets of a flood, if it bans the attacker: the label of the
    /// guard's metric.
    pub bans_attacker_at: Option<&'static str>,
    /// Where clients connect.
    address: Address,
    start: Start,
}

/// Where clients connect to a system.
#[derive(Clone, Copy, Debug)]
enum Address {
    /// At an address of the edge, on a service's own port.
    Edge(HostAddresses),
    /// The mail host itself, on the port without a header.
    Mail,
}

impl System {
    /// Where clients reach a service.
    #[must_use]
    pub fn target(&self, service: &Service) -> SocketAddr {
        self.target_port(service.port, service.bare_port())
    }

    /// Where clients reach a public port, or the mail host's port without a header.
    #[must_use]
    pub fn target_port(&self, port: u16, bare: u16) -> SocketAddr {
        match self.address {
            Address::Edge(vip) => SocketAddr::new(IpAddr::V4(vip.v4), port),
            Address::Mail => super::testbed::mail(bare),
        }
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(&self, testbed: &Testbed) -> anyhow::Result<Box<dyn RunningSystem>> {
        // The one before it may have had others.
        testbed.topology.edge.sysctl(LOCAL_PORT_RANGE, LOCAL_PORTS)?;
        (self.start)(testbed)
    }
}

impl fmt::Debug for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("System").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Programs that not every machine has.
#[derive(Clone, Debug, Default)]
pub struct Programs {
    /// Versions of HAProxy, the newest first.
    pub haproxies: Vec<Build>,
    /// nginx, with the directory of its stream module.
    pub nginx: Option<(PathBuf, PathBuf)>,
}

/// The name of the direct route, which is subtracted from CPU figures.
pub const DIRECT: &str = "direct";
/// The name of kernel NAT alone.
pub const NAT: &str = "nat";
/// Hooks of the guard: labels of its metric.
pub const HOOKS: [&str; 3] = ["xdp", "tc", "inline"];

/// The name among [`Counters`] of the packets that the guard dropped at a hook.
#[must_use]
pub fn dropped_at(hook: &str) -> String {
    format!("packets dropped by the guard, {hook}")
}

/// The prefix of the names of all HAProxy configurations.
pub const HAPROXY: &str = "haproxy";

/// All systems, in the order of the reports.
#[must_use]
pub fn all(programs: &Programs) -> Vec<System> {
    let mut systems = vec![direct::system(), nat::system()];
    for build in &programs.haproxies {
        systems.extend(haproxy::systems(build));
    }
    systems.extend(programs.nginx.as_ref().map(|(program, modules)| nginx::system(program, modules)));
    systems.extend(injector::engines());
    systems
}

/// Names of the systems that `--quick` compares: the direct route, kernel NAT, the newest HAProxy as its developers
/// would configure it, and all engines of the injector.
#[must_use]
pub fn quick(programs: &Programs) -> Vec<String> {
    let mut names = vec![DIRECT.to_owned(), NAT.to_owned()];
    names.extend(best_haproxies(programs));
    names.extend(injector::engines().into_iter().map(|system| system.name));
    names
}

/// Names of the systems for choosing rules of enrolment; see [`enrolments`].
#[must_use]
pub fn for_enrolment(programs: &Programs) -> Vec<String> {
    let mut names = vec![NAT.to_owned()];
    names.extend(best_haproxies(programs));
    names.extend(enrolments().into_iter().map(|system| system.name));
    names
}

/// The newest HAProxy with splicing, with one thread and with two: which is better depends on the
/// workload.
fn best_haproxies(programs: &Programs) -> Vec<String> {
    let systems = programs.haproxies.first().map(haproxy::systems).unwrap_or_default();
    systems.into_iter().map(|system| system.name).filter(|name| name.contains("-splice-")).collect()
}

/// The engines with the guard, for what it costs clean traffic; each has a [`System::baseline`].
#[must_use]
pub fn guarded() -> Vec<System> {
    guard::clean()
}

/// The engines without and with the guard, for floods.
#[must_use]
pub fn flooded() -> Vec<System> {
    guard::flooded()
}

/// The splice engine with other rules of enrolment, for choosing the default.
#[must_use]
pub fn enrolments() -> Vec<System> {
    injector::enrolments()
}
