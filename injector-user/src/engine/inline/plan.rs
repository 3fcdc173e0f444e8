//! What the maps of the program contain for a set of listeners. Pure; [`super::maps`] writes it.
//!
//! A program reads several maps for one SYN: the listener names a table, the table a backend, the
//! backend its source addresses. So everything that is new is written to unused places first; then
//! one write of the listener switches to it. What no listener leads to any more is not used again
//! for a while, because programs that had read the listener before may still read it.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::Range,
    time::Instant,
};

use injector_common::inline::{self, Address, BackendTable, Listener, MAX_BACKENDS, Timeouts};

use super::{
    pool::{Full, Pool},
    tables::{self, Member},
};

/// How many addresses `LISTENERS` has room for.
pub(super) const MAX_ADDRESSES: usize = 256;

/// A listener, as the engine serves it now.
#[derive(Clone, Debug)]
pub(super) struct Service {
    /// [`Listener::id`].
    pub(super) id: u32,
    pub(super) bind: Vec<SocketAddr>,
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
            || self.listeners != before.listeners
            || self.shortages != before.shortages
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
        for service in services {
            let mut tables = [0; 2];
            for (ipv6, table) in [false, true].into_iter().zip(&mut tables) {
                let of_family = |it: &&Destination| it.address.is_ipv6() == ipv6;
                let destinations: Vec<_> = service.destinations.iter().filter(of_family).collect();
                match self.table(&destinations, &mut used, &mut plan, now) {
                    Ok(index) => *table = index,
                    Err(Full) => plan.shortages.push((
                        service.id,
                        "no free place for its backends; its new connections go to the sockets until one is free",
                    )),
                }
            }
            let listener = Listener { id: service.id, tables, timeouts: service.timeouts };
            for bound in service.bind.iter().flat_map(|bound| addresses(*bound)) {
                if plan.listeners.len() < MAX_ADDRESSES {
                    plan.listeners.insert(map_address(bound), listener);
                } else {
                    plan.shortages.push((
                        service.id,
                        "too many addresses of all listeners; its new connections go to the sockets",
                    ));
                }
            }
            // With port 0 the host alone: fragments say no port.
            let hosts = service.proxy_ports.iter().map(|address| SocketAddr::new(address.ip(), 0));
            plan.proxy_ports.extend(service.proxy_ports.iter().copied().chain(hosts).map(map_address));
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

/// The addresses that a listen socket takes connections to: `[::]` is for IPv4 as well. None
/// without a port, which the kernel chooses.
fn addresses(bound: SocketAddr) -> impl Iterator<Item = SocketAddr> {
    let of_both = bound.is_ipv6() && bound.ip().is_unspecified();
    let ipv4 = of_both.then(|| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), bound.port()));
    [Some(bound), ipv4].into_iter().flatten().filter(|address| address.port() != 0)
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
mod tests {
    use std::time::Duration;

    use super::{super::pool::REST, *};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn destination(address: &str) -> Destination {
        let address: SocketAddr = address.parse().unwrap();
        let source = if address.is_ipv4() { "192.0.2.1" } else { "2001:db8::1" };
        Destination { address, weight: 1, sources: vec![ip(source)] }
    }

    fn service(id: u32, destinations: &[&str]) -> Service {
        Service {
            id,
            bind: vec![
                format!("198.51.100.{id}:25").parse().unwrap(),
                format!("[2001:db8:1::{id}]:25").parse().unwrap(),
            ],
            timeouts: Timeouts { idle: 300, half_closed: 60, client_fin: 15 },
            destinations: destinations.iter().map(|it| destination(it)).collect(),
            proxy_ports: destinations.iter().map(|it| it.parse().unwrap()).collect(),
        }
    }

    /// The maps, as far as plans were written.
    #[derive(Default)]
    struct Written {
        sources: HashMap<u32, [u32; 4]>,
        backends: HashMap<u32, inline::Backend>,
        tables: HashMap<u32, BackendTable>,
        listeners: HashMap<Address, Listener>,
        proxy_ports: HashSet<Address>,
    }

    impl Written {
        fn write(&mut self, plan: Plan) {
            assert_eq!(plan.shortages, []);
            self.sources.extend(plan.sources);
            self.backends.extend(plan.backends);
            self.tables.extend(plan.tables);
            (self.listeners, self.proxy_ports) = (plan.listeners, plan.proxy_ports);
        }

        /// Where clients of this address may go.
        fn reachable(&self, address: &str) -> HashSet<SocketAddr> {
            let address: SocketAddr = address.parse().unwrap();
            let listener = self.listeners[&map_address(address)];
            let table = listener.tables[usize::from(address.is_ipv6())];
            if table == 0 {
                return HashSet::new();
            }
            let entries = &self.tables[&table].backends[..BackendTable::SIZE as usize];
            let backends = entries.iter().map(|index| {
                let backend = self.backends[&u32::from(*index)];
                assert_eq!(backend.sources, 1);
                assert_ne!(self.sources[&backend.first_source], [0; 4]);
                let bytes: Vec<u8> = backend.ip.iter().flat_map(|word| word.to_ne_bytes()).collect();
                let ip = if address.is_ipv4() {
                    IpAddr::from(<[u8; 4]>::try_from(&bytes[..4]).unwrap())
                } else {
                    IpAddr::from(<[u8; 16]>::try_from(&bytes[..]).unwrap())
                };
                SocketAddr::new(ip, backend.port)
            });
            backends.collect()
        }
    }

    fn set(addresses: &[&str]) -> HashSet<SocketAddr> {
        addresses.iter().map(|it| it.parse().unwrap()).collect()
    }

    #[test]
    fn each_family_has_its_own_backends() {
        let (mut planner, mut written, now) =
            (Planner::new(&InUse::default()), Written::default(), Instant::now());
        let both = service(1, &["10.0.0.1:2525", "10.0.0.2:2525", "[fd00::1]:2525"]);
        written.write(planner.plan(&[both, service(2, &["[fd00::1]:2525"])], now));
        assert_eq!(written.reachable("198.51.100.1:25"), set(&["10.0.0.1:2525", "10.0.0.2:2525"]));
        assert_eq!(written.reachable("[2001:db8:1::1]:25"), set(&["[fd00::1]:2525"]));
        assert_eq!(
            written.proxy_ports,
            set(&[
                "10.0.0.1:2525",
                "10.0.0.2:2525",
                "[fd00::1]:2525",
                "10.0.0.1:0",
                "10.0.0.2:0",
                "[fd00::1]:0"
            ])
            .into_iter()
            .map(map_address)
            .collect()
        );
        // No IPv4 backend: these clients go to the socket.
        assert_eq!(written.reachable("198.51.100.2:25"), set(&[]));
        // The same backends have the same table.
        assert_eq!((written.tables.len(), written.backends.len(), written.sources.len()), (2, 3, 2));
    }

    #[test]
    fn a_wildcard_of_ipv6_is_for_both_families() {
        let (mut planner, mut written, now) =
            (Planner::new(&InUse::default()), Written::default(), Instant::now());
        let bind = ["[::]:25", "0.0.0.0:465", "[::]:0"].map(|it| it.parse().unwrap()).to_vec();
        let service = Service { bind, ..service(1, &["10.0.0.1:2525", "[fd00::1]:2525"]) };
        written.write(planner.plan(&[service], now));
        assert_eq!(written.reachable("0.0.0.0:25"), set(&["10.0.0.1:2525"]));
        assert_eq!(written.reachable("[::]:25"), set(&["[fd00::1]:2525"]));
        assert_eq!(written.reachable("0.0.0.0:465"), set(&["10.0.0.1:2525"]));
        assert_eq!(written.listeners.len(), 3);
    }

    #[test]
    fn an_unchanged_listener_writes_nothing() {
        let (mut planner, now) = (Planner::new(&InUse::default()), Instant::now());
        let services = [service(1, &["10.0.0.1:2525", "10.0.0.2:2525"])];
        let first = planner.plan(&services, now);
        assert_eq!((first.tables.len(), first.backends.len(), first.sources.len()), (1, 2, 1));
        let second = planner.plan(&services, now);
        assert_eq!((second.tables.len(), second.backends.len(), second.sources.len()), (0, 0, 0));
        assert_eq!(first.listeners, second.listeners);
        assert_eq!(first.proxy_ports, second.proxy_ports);
    }

    #[test]
    fn a_place_is_not_used_again_at_once() {
        let (mut planner, mut now) = (Planner::new(&InUse::default()), Instant::now());
        let mut last_used: HashMap<u32, Instant> = HashMap::new();
        let mut reused = false;
        for round in 0..64 {
            let service = service(1, &[&format!("10.0.0.{round}:2525")]);
            let plan = planner.plan(&[service], now);
            for (index, _) in &plan.tables {
                let last = last_used.get(index);
                reused |= last.is_some();
                assert!(last.is_none_or(|last| now.duration_since(*last) >= REST), "{round}");
            }
            let [listener] = &plan
                .listeners
                .values()
                .map(|it| it.tables[0])
                .collect::<HashSet<_>>()
                .into_iter()
                .collect::<Vec<_>>()[..]
            else {
                panic!("two tables")
            };
            now += Duration::from_millis(300);
            last_used.insert(*listener, now);
        }
        assert!(reused);
    }

    #[test]
    fn a_full_map_sends_connections_to_the_sockets_until_places_are_free() {
        let (mut planner, now) = (Planner::new(&InUse::default()), Instant::now());
        let backends = |net: u32| -> Vec<Destination> {
            let address = |host: u32| destination(&format!("10.{net}.{}.{}:2525", host / 256, host % 256));
            (0..MAX_BACKENDS - 10).map(address).collect()
        };
        let with = |net| Service { destinations: backends(net), ..service(1, &[]) };
        assert_eq!(planner.plan(&[with(0)], now).shortages, []);
        let full = planner.plan(&[with(1)], now);
        assert_eq!(full.shortages.len(), 1);
        assert!(full.listeners.values().all(|listener| listener.tables == [0, 0]));
        let later = planner.plan(&[with(1)], now + REST);
        assert_eq!(later.shortages, []);
        assert!(later.listeners.values().all(|listener| listener.tables[0] != 0));
    }

    #[test]
    fn places_of_an_earlier_daemon_stay_until_after_the_switch() {
        let in_use =
            InUse { tables: vec![1, 3], backends: vec![0], sources: std::iter::once(0..2).collect() };
        let (mut planner, now) = (Planner::new(&in_use), Instant::now());
        let first = planner.plan(&[service(1, &["10.0.0.1:2525"])], now + REST);
        let indices = |plan: &Plan| {
            let index = |(index, _): &(u32, BackendTable)| *index;
            (plan.tables.iter().map(index).collect::<Vec<_>>(), plan.backends[0].0, plan.sources[0].0)
        };
        assert_eq!(indices(&first), (vec![2], 1, 2));
        let second = planner.plan(&[service(1, &["10.0.0.2:2525"])], now + REST * 2);
        assert_eq!(second.tables[0].0, 1);
    }

    #[test]
    fn more_addresses_than_there_is_room_for() {
        let (mut planner, now) = (Planner::new(&InUse::default()), Instant::now());
        let all = || (1..=64).map(|id| service(id, &["10.0.0.1:2525"]));
        let others = all().map(|mut service| {
            service.bind.iter_mut().for_each(|address| address.set_port(587));
            service
        });
        let services: Vec<_> = all().chain(others).collect();
        let plan = planner.plan(&services, now);
        assert_eq!((plan.listeners.len(), plan.shortages.len()), (MAX_ADDRESSES, 0));
        let mut more = service(1, &[]);
        more.bind = vec!["203.0.113.1:25".parse().unwrap(), "203.0.113.1:0".parse().unwrap()];
        let plan = planner.plan(&[services, vec![more]].concat(), now);
        assert_eq!((plan.listeners.len(), plan.shortages.len()), (MAX_ADDRESSES, 1));
    }

    #[test]
    fn two_names_with_one_address_share_it() {
        let (mut planner, now) = (Planner::new(&InUse::default()), Instant::now());
        let mut twice = service(1, &["10.0.0.1:2525", "10.0.0.1:2525", "10.0.0.2:2525"]);
        twice.destinations[2].weight = 2;
        let plan = planner.plan(&[twice], now);
        let table = plan.tables[0].1.backends;
        let of = |index: u16| table[..BackendTable::SIZE as usize].iter().filter(|it| **it == index).count();
        assert!(of(0).abs_diff(of(1)) <= 1, "{} {}", of(0), of(1));
    }
}
