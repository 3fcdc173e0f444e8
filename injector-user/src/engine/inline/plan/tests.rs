//! Plans, written to maps that are only values.

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
        virtual_addresses: Vec::new(),
        translated_sources: Vec::new(),
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
        set(&["10.0.0.1:2525", "10.0.0.2:2525", "[fd00::1]:2525", "10.0.0.1:0", "10.0.0.2:0", "[fd00::1]:0"])
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
fn a_virtual_address_leads_to_the_backends_too() {
    let (mut planner, mut written, now) =
        (Planner::new(&InUse::default()), Written::default(), Instant::now());
    let virtual_addresses = ["192.0.2.10:25", "[2001:db8::10]:25"].map(|it| it.parse().unwrap()).to_vec();
    let one = Service { virtual_addresses, ..service(1, &["10.0.0.1:2525", "[fd00::1]:2525"]) };
    written.write(planner.plan(std::slice::from_ref(&one), now));
    assert_eq!(written.reachable("192.0.2.10:25"), set(&["10.0.0.1:2525"]));
    assert_eq!(written.reachable("[2001:db8::10]:25"), set(&["[fd00::1]:2525"]));
    // It moves on to another listener, and what has a socket stays where it is.
    let two = Service {
        virtual_addresses: ["192.0.2.10:25", "198.51.100.1:25"].map(|it| it.parse().unwrap()).to_vec(),
        ..service(2, &["10.0.0.2:2525"])
    };
    let mut plan = planner.plan(&[two, Service { virtual_addresses: Vec::new(), ..one }], now);
    assert_eq!(std::mem::take(&mut plan.shortages), [(2, TAKEN)]);
    written.write(plan);
    assert_eq!(written.reachable("192.0.2.10:25"), set(&["10.0.0.2:2525"]));
    assert_eq!(written.reachable("198.51.100.1:25"), set(&["10.0.0.1:2525"]));
}

#[test]
fn networks_of_translated_sources_are_the_listeners_own() {
    let (mut planner, now) = (Planner::new(&InUse::default()), Instant::now());
    let networks = |texts: &[&str]| texts.iter().map(|it| it.parse().unwrap()).collect::<Vec<Network>>();
    let one = Service {
        translated_sources: networks(&["10.0.0.0/24", "fd00::/64"]),
        ..service(1, &["10.0.0.1:2525"])
    };
    let two = Service { translated_sources: networks(&["10.0.0.0/24"]), ..service(2, &["10.0.0.1:2525"]) };
    let plan = planner.plan(&[one.clone(), two], now);
    let ipv4 = |id| (32 + 96 + 24, [id, 0, 0, 0xFFFF_u32.to_be(), u32::from_be_bytes([10, 0, 0, 0]).to_be()]);
    let ipv6 = (32 + 64, [1, 0xFD00_0000_u32.to_be(), 0, 0, 0]);
    assert_eq!(plan.translated_sources, HashSet::from([ipv4(1), ipv4(2), ipv6]));
    // A change of them alone is written.
    let other = Service { translated_sources: networks(&["10.0.1.0/24"]), ..one.clone() };
    assert!(planner.plan(&[other], now).differs(&planner.plan(&[one], now)));
}

#[test]
fn a_listener_with_too_many_translated_sources_is_left_to_its_sockets() {
    let (mut planner, now) = (Planner::new(&InUse::default()), Instant::now());
    let network = |number: usize| format!("2001:db8:{number:x}::/48").parse().unwrap();
    let many = |id, count| Service {
        translated_sources: (0..count).map(network).collect(),
        ..service(id, &["10.0.0.1:2525"])
    };
    let plan = planner.plan(&[many(1, MAX_TRANSLATED), many(2, 1)], now);
    assert_eq!(
        (plan.translated_sources.len(), &plan.shortages[..]),
        (MAX_TRANSLATED, &[(2, TOO_MANY_TRANSLATED)][..])
    );
    let tables = |id| plan.listeners.values().find(|it| it.id == id).unwrap().tables;
    assert_ne!(tables(1)[0], 0);
    assert_eq!(tables(2), [0; 2]);
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
    let in_use = InUse { tables: vec![1, 3], backends: vec![0], sources: std::iter::once(0..2).collect() };
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
