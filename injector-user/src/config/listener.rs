//! `[[listener]]`: each one alone, then all of them together.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::{
    backend::{self, Backend, Balance},
    guard::{self, PerSource},
    health::{self, Health},
    network::{self, Network},
    parse::{
        address,
        section::{MAX_CONNECTIONS, Section, Spanned, Zero},
    },
    receiver::{self, Receiver},
    source_addresses::{self, Loopback},
    timeouts::{self, Timeouts},
    virtual_addresses,
    with_services::{self, WithServices},
};
use crate::protocol::{FirstSpeaker, Protocol};

const RESOLVE_INTERVAL: Duration = Duration::from_secs(15);

const MAX_QUEUE: usize = 100;

/// Which engine moves the bytes of a listener.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineChoice {
    /// The best engines whose self-tests pass on this machine.
    #[default]
    Auto,
    /// Packet forwarding, and splice or relay for what it does not take; the daemon does not start if it is
    /// unavailable.
    Inline,
    /// Kernel sockmap; the daemon does not start if it is unavailable.
    Splice,
    /// User space.
    Relay,
}

impl EngineChoice {
    const CHOICES: [(&'static str, Self); 4] =
        [("auto", Self::Auto), ("inline", Self::Inline), ("splice", Self::Splice), ("relay", Self::Relay)];

    /// The name in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Inline => "inline",
            Self::Splice => "splice",
            Self::Relay => "relay",
        }
    }

    /// Whether this choice may select inline.
    #[must_use]
    pub const fn may_be_inline(self) -> bool {
        matches!(self, Self::Auto | Self::Inline)
    }
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// `[[listener]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Unique: 1 to 63 of `[a-z0-9_-]`. The value of the label `listener`.
    pub name: String,
    /// At least one. No two listeners overlap. Port 0 lets the kernel choose.
    pub bind: Vec<SocketAddr>,
    /// Addresses that are not this host's and whose packets come here, such as a load balancer's. No
    /// socket has them: engine inline and the guard take packets to them with the ports of `bind`.
    /// Services add the addresses of their load balancers.
    pub virtual_addresses: WithServices<IpAddr>,
    /// Networks of addresses that translation on the way here puts in place of the client's. Their
    /// connections are refused.
    pub translated_sources: Vec<Network>,
    /// The mail protocol.
    pub protocol: Protocol,
    /// The engine that forwards.
    pub engine: EngineChoice,
    /// At least one, with distinct addresses. At least one primary has a weight above 0.
    pub backends: Vec<Backend>,
    /// Which backend gets the next connection.
    pub balance: Balance,
    /// How many clients may wait for a backend that has reached its `max_connections`.
    pub max_queue: usize,
    /// Health checks and ejection.
    pub health: Health,
    /// Source addresses of connections to backends, by turns. For a family that has none, the address
    /// that the route prefers.
    pub source_addresses: Vec<IpAddr>,
    /// How often the names of backends are resolved again.
    pub resolve_interval: Duration,
    /// The limit of concurrent connections of this listener, besides
    /// [`super::Limits::max_connections`].
    pub max_connections: Option<usize>,
    /// Limits on each source, besides those over all listeners.
    pub per_source: PerSource,
    /// All greater than zero, except `header_wait`.
    pub timeouts: Timeouts,
    /// The header format that the backend expects.
    pub receiver: Receiver,
}

impl Listener {
    /// Why inline can serve no connection of this listener; `None` if it can.
    #[must_use]
    pub fn inline_obstacle(&self) -> Option<String> {
        inline_obstacle(self.balance, &self.backends, &self.receiver)
    }

    /// These virtual addresses, each with every port that the listener takes in its family.
    pub fn virtual_sockets(&self, addresses: &[IpAddr]) -> impl Iterator<Item = SocketAddr> {
        addresses.iter().flat_map(|address| virtual_addresses::sockets(&self.bind, *address))
    }

    /// Whether engine inline sends the header together with the client's first bytes. It does if
    /// the client speaks first and `header_wait` is not zero. The wait ends when the backend
    /// repeats its SYN-ACK, after a second.
    #[must_use]
    pub fn waits_for_first_bytes(&self) -> bool {
        self.protocol.speaks_first() == FirstSpeaker::Client && !self.timeouts.header_wait.is_zero()
    }
}

/// A bind address, its offset in the file and its owner in messages.
struct Bound {
    at: usize,
    address: SocketAddr,
    owner: String,
}

/// Reads all listeners. `operator` are the operator's addresses, by their names in the file. `None` if
/// a listener is invalid; the error has been reported.
pub(super) fn read_all(
    root: &Section<'_>,
    operator: &[(&str, Option<Spanned<SocketAddr>>)],
) -> Option<Vec<Listener>> {
    let Some(sections) = root.sections("listener") else {
        if !root.has("listener") {
            root.report(0, "no [[listener]]: at least one is needed");
        }
        return None;
    };
    if sections.is_empty() {
        root.report(0, "no [[listener]]: at least one is needed");
    }
    let mut names = BTreeMap::new();
    let operator = operator.iter().filter_map(|(owner, address)| Some((owner, (*address)?)));
    let mut bound: Vec<Bound> =
        operator.map(|(owner, (at, address))| Bound { at, address, owner: (*owner).to_owned() }).collect();
    let listeners: Vec<_> = sections
        .into_iter()
        .enumerate()
        .map(|(index, section)| read(section, index + 1, root.has("guard"), &mut names, &mut bound))
        .collect();
    listeners.into_iter().collect()
}

fn read(
    mut section: Section<'_>,
    number: usize,
    has_guard: bool,
    names: &mut BTreeMap<String, usize>,
    bound: &mut Vec<Bound>,
) -> Option<Listener> {
    section.set_listener(format!("#{number}"));
    let name = name(&mut section, names);
    let protocol = section.required("protocol", |section, field| {
        let other_names = Protocol::OTHER_NAMES.map(|(other, protocol)| (other, protocol.name()));
        section.choice_or_other_name(field, &Protocol::ALL.map(|p| (p.name(), p)), &other_names)
    });
    let engine = engine(&section);
    let bind = binds(&section, protocol, bound);
    let virtual_addresses = virtual_addresses(&section, &bind, bound);
    let translated_sources = translated_sources(&section);
    let backends = backend::read_all(&section, &bind);
    let source_addresses = section.strings(source_addresses::FIELD).unwrap_or_default();
    let source_addresses = source_addresses::read(&section, &source_addresses, Loopback::Allowed);
    let resolve_interval = section.duration("resolve_interval", Zero::Rejected);
    let max_connections = section.count("max_connections");
    // Without a valid protocol the rest is still checked, against the least restrictive protocol.
    let timeouts =
        timeouts::read(section.section("timeouts"), protocol.unwrap_or(Protocol::Plain), protocol.is_some());
    let receiver = receiver::read(section.section("receiver"));
    let health = health::read(section.section("health"), protocol.unwrap_or(Protocol::Plain), &receiver);
    let balance = balance(&section).unwrap_or_default();
    let limits = section.section("guard");
    if let Some(limits) = limits.as_ref().filter(|_| !has_guard) {
        section.report(
            limits.at(),
            "[listener.guard] has no effect without [guard]: add a table [guard], which may be empty",
        );
    }
    let per_source = limits.map(guard::read_listener).unwrap_or_default();
    let max_queue = section.integer("max_queue", 0, MAX_CONNECTIONS as u64);
    if let Some((at, EngineChoice::Inline)) = engine
        && let Some(obstacle) = inline_obstacle(balance, &backends, &receiver)
    {
        section.report_field(at, "engine", &format!(" \"inline\": {obstacle}"));
    }
    section.finish();
    Some(Listener {
        name: name?,
        bind,
        virtual_addresses,
        translated_sources,
        protocol: protocol?,
        engine: engine.map_or_else(EngineChoice::default, |(_, engine)| engine),
        backends,
        health,
        source_addresses,
        resolve_interval: resolve_interval.map_or(RESOLVE_INTERVAL, |(_, interval)| interval),
        max_connections,
        per_source,
        balance,
        max_queue: max_queue.map_or(MAX_QUEUE, |(_, count)| usize::try_from(count).unwrap_or(MAX_QUEUE)),
        timeouts,
        receiver,
    })
}

fn inline_obstacle(balance: Balance, backends: &[Backend], receiver: &Receiver) -> Option<String> {
    if balance != Balance::Weighted {
        return Some(format!("balance = \"{}\" needs splice or relay", balance.name()));
    }
    if backends.iter().any(|backend| backend.max_connections.is_some()) {
        return Some("max_connections of a backend needs splice or relay".to_owned());
    }
    receiver.inline_obstacle()
}

fn balance(section: &Section<'_>) -> Option<Balance> {
    let balance = section.string("balance")?;
    section.choose("balance", balance, &Balance::CHOICES)
}

fn name(section: &mut Section<'_>, names: &mut BTreeMap<String, usize>) -> Option<String> {
    let (at, name) = section.required("name", |section, field| section.string(field))?;
    let charset =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_' || byte == b'-';
    if !(1..=63).contains(&name.len()) || !name.bytes().all(charset) {
        section.report_field(at, "name", &format!(" {name:?}: must be 1 to 63 of a-z, 0-9, _ and -"));
        return None;
    }
    section.set_listener(name.to_owned());
    if let Some(first) = names.get(name) {
        let line = section.line(*first);
        section.report_field(at, "name", &format!(" {name:?}: already used by the listener in line {line}"));
        return None;
    }
    names.insert(name.to_owned(), at);
    Some(name.to_owned())
}

fn engine(section: &Section<'_>) -> Option<Spanned<EngineChoice>> {
    let engine = section.string("engine")?;
    Some((engine.0, section.choose("engine", engine, &EngineChoice::CHOICES)?))
}

fn binds(section: &Section<'_>, protocol: Option<Protocol>, bound: &mut Vec<Bound>) -> Vec<SocketAddr> {
    let texts = section.required("bind", |section, field| section.strings(field)).unwrap_or_default();
    let mut addresses = Vec::new();
    for (at, text) in texts {
        match address::socket_address(text, protocol.and_then(Protocol::standard_port)) {
            Ok(address) => {
                reject_overlap(section, at, text, address, bound);
                bound.push(Bound { at, address, owner: format!("listener {:?}", section.listener()) });
                addresses.push(address);
            }
            Err(advice) => section.report_field(at, "bind", &format!(" {text:?}: {advice}")),
        }
    }
    addresses
}

/// Reads `virtual_addresses`. With a port, each belongs to one listener.
fn virtual_addresses(
    section: &Section<'_>,
    bind: &[SocketAddr],
    bound: &mut Vec<Bound>,
) -> WithServices<IpAddr> {
    let (texts, services) = with_services::read(section, virtual_addresses::FIELD);
    let read = virtual_addresses::read(section, &texts, bind);
    for (at, ip) in &read {
        for address in virtual_addresses::sockets(bind, *ip) {
            let other = bound.iter().find(|other| {
                other.address.ip().to_canonical() == *ip && other.address.port() == address.port()
            });
            if let Some(other) = other {
                let (line, owner) = (section.line(other.at), &other.owner);
                section.report_field(
                    *at,
                    virtual_addresses::FIELD,
                    &format!(" \"{ip}\": {address} is already taken by {owner} in line {line}"),
                );
            }
            bound.push(Bound { at: *at, address, owner: format!("listener {:?}", section.listener()) });
        }
    }
    WithServices { listed: read.into_iter().map(|(_, ip)| ip).collect(), services }
}

/// Reads `translated_sources`.
fn translated_sources(section: &Section<'_>) -> Vec<Network> {
    const FIELD: &str = "translated_sources";
    let networks = network::read(section, FIELD);
    for (at, network) in networks.iter().filter(|(_, network)| network.prefix() == 0) {
        section.report_field(*at, FIELD, &format!(" \"{network}\": every client would be refused"));
    }
    networks.into_iter().map(|(_, network)| network).collect()
}

fn reject_overlap(section: &Section<'_>, at: usize, text: &str, address: SocketAddr, bound: &[Bound]) {
    let Some(other) = bound.iter().find(|other| address::overlap(other.address, address)) else { return };
    let line = section.line(other.at);
    let what = if other.address == address {
        format!("already taken by {} in line {line}", other.owner)
    } else {
        let overlaps = format!("overlaps {:?} of {} in line {line}", other.address.to_string(), other.owner);
        format!("{overlaps}: {}", overlap_advice(other.address, address))
    };
    section.report_field(at, "bind", &format!(" {text:?}: {what}"));
}

/// What to write instead of two different addresses that overlap.
fn overlap_advice(one: SocketAddr, other: SocketAddr) -> String {
    let (all, part) = if address::accepts(one, other) { (one, other) } else { (other, one) };
    if !all.ip().is_unspecified() {
        return "they are the same IPv4 address; write one of them".to_owned();
    }
    let families = if all.is_ipv6() { "IPv4 and IPv6" } else { "IPv4" };
    let (all, part) = (all.to_string(), part.to_string());
    format!("{all:?} takes connections to every {families} address, so leave {part:?} out")
}
