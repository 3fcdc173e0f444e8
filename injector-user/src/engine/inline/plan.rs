//! What the maps of the program contain for a set of listeners. Pure; [`super::maps`] writes it.
//!
//! A program reads several maps for one SYN: the listener names a table, the table a backend, the
//! backend its source addresses. So everything that is new is written to unused places first; then
//! one write of the listener switches to it. What no listener leads to any more is not used again
//! for a while, because programs that had read the listener before may still read it.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    ops::Range,
    time::Instant,
};

use injector_common::inline::{self, Address, BackendTable, Listener, MAX_BACKENDS, Timeouts};

use super::{
    pool::{Full, Pool},
    tables::{self, Member},
};
use crate::config::{Network, accepted};

/// How many addresses `LISTENERS` has room for.
pub(super) const MAX_ADDRESSES: usize = 256;

/// How many networks `TRANSLATED_SOURCES` gets at most. It has room for twice as many: those of a new
/// plan join those of the last one.
const MAX_TRANSLATED: usize = 1024;

/// A listener, as the engine serves it now.
#[derive(Clone, Debug)]
pub(super) struct Service {
    /// [`Listener::id`].
    pub(super) id: u32,
    pub(super) bind: Vec<SocketAddr>,
    /// Addresses that no socket has.
    pub(super) virtual_addresses: Vec<SocketAddr>,
    /// Networks whose SYNs go to the socket, which refuses them.
    pub(super) translated_sources: Vec<Network>,
    pub(super) timeouts: Timeouts,
    /// The backends that get new connections. None if the listener drains.
    pub(super) destinations: Vec<Destination>,
    /// The PROXY ports of all its backends.
    pub(super) proxy_ports: Vec<SocketAddr>,
}

/// An address of a backend that gets new connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Destination {
    pub(super) address: SocketAddr,
    pub(super) weight: u32,
    /// The addresses to connect from; none to keep the client's.
    pub(super) sources: Vec<IpAddr>,
}

/// What the maps must contain, in the order in which to write it.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// New entries of `SOURCES`.
    pub(super) sources: Vec<(u32, [u32; 4])>,
    /// New entries of `BACKENDS`.
    pub(super) backends: Vec<(u32, inline::Backend)>,
    /// New entries of `BACKEND_TABLES`.
    pub(super) tables: Vec<(u32, BackendTable)>,
    /// All of `PROXY_PORTS`: backends, and their hosts with port 0.
    pub(super) proxy_ports: HashSet<Address>,
    /// All of `TRANSLATED_SOURCES`.
    pub(super) translated_sources: HashSet<TranslatedSource>,
    /// All of `LISTENERS`.
    pub(super) listeners: HashMap<Address, Listener>,
    /// Some listener got no table, because no place was left: what it means for it, in words.
    pub(super) shortages: Vec<(u32, &'static str)>,
}

impl Plan {
    /// Whether this one, which follows `before`, changes anything.
    pub(super) fn differs(&self, before: &Self) -> bool {
        let new = !self.sources.is_empty() || !self.backends.is_empty() || !self.tables.is_empty();
        new || self.proxy_ports != before.proxy_ports
            || self.translated_sources != before.translated_sources
            || self.listeners != before.listeners
            || self.shortages != before.shortages
    }
}

const NO_PLACE: &str =
    "no free place for its backends; its new connections go to the sockets until one is free";
const TOO_MANY_ADDRESSES: &str = "too many addresses of all listeners; its new connections go to the sockets";
const TAKEN: &str = "another listener has one of its virtual addresses with the same port, and keeps it";
const TOO_MANY_TRANSLATED: &str =
    "too many translated_sources of all listeners; its new connections go to the sockets";

impl Plan {
    /// Whether there is room for the networks whose connections the listener refuses. They are entered.
    fn refuse_translated(&mut self, service: &Service) -> bool {
        let sources = service.translated_sources.iter().map(|it| translated_source(service.id, *it));
        let fits = self.translated_sources.len() + service.translated_sources.len() <= MAX_TRANSLATED;
        if fits {
            self.translated_sources.extend(sources);
        } else {
            self.shortages.push((service.id, TOO_MANY_TRANSLATED));
        }
        fits
    }

    /// Has an address lead to a listener, if no other one has it.
    fn lead(&mut self, address: SocketAddr, listener: &Listener) {
        let address = map_address(address);
        match self.listeners.get(&address) {
            Some(other) if other.id != listener.id => self.shortages.push((listener.id, TAKEN)),
            None if self.listeners.len() >= MAX_ADDRESSES => {
                self.shortages.push((listener.id, TOO_MANY_ADDRESSES));
            }
            _ => drop(self.listeners.insert(address, *listener)),
        }
    }
}

/// What the maps contain when the daemon starts, by an earlier one: places that are in use.
#[derive(Debug, Default)]
pub(super) struct InUse {
    pub(super) tables: Vec<u32>,
    pub(super) backends: Vec<u32>,
    pub(super) sources: Vec<Range<u32>>,
}

/// Which places of the maps are used, and for what.
#[derive(Debug)]
pub(super) struct Planner {
    tables: Pool<Vec<Member>>,
    backends: Pool<(SocketAddr, Vec<IpAddr>)>,
    sources: Pool<Vec<IpAddr>>,
}

impl Planner {
    pub(super) fn new(in_use: &InUse) -> Self {
        let one = |index: &u32| *index..*index + 1;
        Self {
            // The first is never used: it stands for no table.
            tables: Pool::new(1..BackendTable::COUNT, in_use.tables.iter().map(one)),
            backends: Pool::new(0..MAX_BACKENDS, in_use.backends.iter().map(one)),
            sources: Pool::new(0..MAX_BACKENDS, in_use.sources.iter().cloned()),
        }
    }

    /// Plans these listeners. What was planned before must have been written.
    pub(super) fn plan(&mut self, services: &[Service], now: Instant) -> Plan {
        let mut plan = Plan::default();
        let mut used = Used::default();
        let mut listeners = Vec::new();
        for service in services {
            let mut tables = [0; 2];
            if plan.refuse_translated(service) {
                for (ipv6, table) in [false, true].into_iter().zip(&mut tables) {
                    let of_family = |it: &&Destination| it.address.is_ipv6() == ipv6;
                    let destinations: Vec<_> = service.destinations.iter().filter(of_family).collect();
                    match self.table(&destinations, &mut used, &mut plan, now) {
                        Ok(index) => *table = index,
                        Err(Full) => plan.shortages.push((service.id, NO_PLACE)),
                    }
                }
            }
            listeners.push((service, Listener { id: service.id, tables, timeouts: service.timeouts }));
            // With port 0 the host alone: fragments say no port.
            let hosts = service.proxy_ports.iter().map(|address| SocketAddr::new(address.ip(), 0));
            plan.proxy_ports.extend(service.proxy_ports.iter().copied().chain(hosts).map(map_address));
        }
        // What has a socket goes before what a Service says.
        for (service, listener) in &listeners {
            for address in service.bind.iter().flat_map(|bound| accepted(*bound)) {
                plan.lead(address, listener);
            }
        }
        for (service, listener) in &listeners {
            for address in &service.virtual_addresses {
                plan.lead(*address, listener);
            }
        }
        self.tables.keep(&used.tables, now);
        self.backends.keep(&used.backends, now);
        self.sources.keep(&used.sources, now);
        plan
    }

    /// The table for these backends; 0 without any.
    fn table(
        &mut self,
        destinations: &[&Destination],
        used: &mut Used,
        plan: &mut Plan,
        now: Instant,
    ) -> Result<u32, Full> {
        let mut members: Vec<Member> = Vec::new();
        for destination in destinations.iter().filter(|destination| destination.weight > 0) {
            let index = self.backend(destination, used, plan, now)?;
            let index = u16::try_from(index).map_err(|_| Full)?;
            // Two names may have the same address.
            match members.iter_mut().find(|member| member.index == index) {
                Some(same) => same.weight = same.weight.saturating_add(destination.weight),
                None => members.push(Member {
                    identity: destination.address.to_string(),
                    weight: destination.weight,
                    index,
                }),
            }
        }
        if members.is_empty() {
            return Ok(0);
        }
        members.sort();
        let place = self.tables.place(&members, 1, now)?;
        if place.new
            && let Some(table) = tables::backend_table(&members)
        {
            plan.tables.push((place.first, table));
        }
        used.tables.insert(members);
        Ok(place.first)
    }

    fn backend(
        &mut self,
        destination: &Destination,
        used: &mut Used,
        plan: &mut Plan,
        now: Instant,
    ) -> Result<u32, Full> {
        let Destination { address, sources, .. } = destination;
        let count = u16::try_from(sources.len()).map_err(|_| Full)?;
        let first_source = if sources.is_empty() {
            0
        } else {
            let place = self.sources.place(sources, count.into(), now)?;
            if place.new {
                plan.sources.extend((place.first..).zip(sources.iter().map(|source| words(*source))));
            }
            used.sources.insert(sources.clone());
            place.first
        };
        let key = (*address, sources.clone());
        let place = self.backends.place(&key, 1, now)?;
        if place.new {
            let (ip, port) = (words(address.ip()), address.port());
            plan.backends.push((place.first, inline::Backend { ip, port, sources: count, first_source }));
        }
        used.backends.insert(key);
        Ok(place.first)
    }
}

#[derive(Default)]
struct Used {
    tables: HashSet<Vec<Member>>,
    backends: HashSet<(SocketAddr, Vec<IpAddr>)>,
    sources: HashSet<Vec<IpAddr>>,
}

/// A key of `TRANSLATED_SOURCES`: how many bits count, and the listener's id before the address.
pub(super) type TranslatedSource = (u32, [u32; 5]);

fn translated_source(id: u32, network: Network) -> TranslatedSource {
    let (prefix, ip) = trie_prefix(network);
    let (words, _) = ip.as_chunks::<4>();
    let mut key = [id, 0, 0, 0, 0];
    for (word, bytes) in key.iter_mut().skip(1).zip(words) {
        *word = u32::from_ne_bytes(*bytes);
    }
    (32 + prefix, key)
}

/// A network as the program's tries have it: IPv4 is mapped into IPv6.
pub(super) fn trie_prefix(network: Network) -> (u32, [u8; 16]) {
    let mapped = if network.address().is_ipv4() { 96 } else { 0 };
    (u32::from(network.prefix()) + mapped, map_address(SocketAddr::new(network.address(), 0)).ip)
}

/// An address as the program's maps have it.
pub(super) fn map_address(address: SocketAddr) -> Address {
    let ip = match address.ip() {
        IpAddr::V4(ip) => Address::mapped(ip.octets()),
        IpAddr::V6(ip) => ip.octets(),
    };
    Address::new(ip, address.port())
}

/// An address in network order; IPv4 in the first word.
fn words(ip: IpAddr) -> [u32; 4] {
    match ip {
        IpAddr::V4(ip) => [u32::from_ne_bytes(ip.octets()), 0, 0, 0],
        IpAddr::V6(ip) => {
            let octets = ip.octets();
            let (words, _) = octets.as_chunks::<4>();
            let mut all = [0; 4];
            for (word, bytes) in all.iter_mut().zip(words) {
                *word = u32::from_ne_bytes(*bytes);
            }
            all
        }
    }
}

#[cfg(test)]
mod tests;
