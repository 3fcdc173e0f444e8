//! Which endpoints of a Service get connections. Pure.
//!
//! The rules are kube-proxy's, so that a client that comes through the injector reaches the same pods
//! as one that uses the Service's address: `CategorizeEndpoints` and `topologyModeFromHints` in
//! `pkg/proxy/topology.go` of Kubernetes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::config::ServicePort;

/// What an endpoint says about itself. The best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Readiness {
    /// It gets connections.
    Ready,
    /// It ends and still serves: it gets connections if none is ready.
    Terminating,
    /// It gets none.
    NotReady,
}

impl Readiness {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ready, Self::Terminating, Self::NotReady];

    /// The value of the label `state` in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Terminating => "terminating",
            Self::NotReady => "not_ready",
        }
    }
}

/// One address of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The address.
    pub address: IpAddr,
    /// The TCP ports by their names. The name of a Service's only port may be empty.
    pub ports: Arc<[(String, u16)]>,
    /// Whether it gets connections.
    pub readiness: Readiness,
    /// The node that the pod is on.
    pub node: Option<String>,
    /// The zone of that node.
    pub zone: Option<String>,
    /// The zones that should use it. Empty: no hint.
    pub for_zones: BTreeSet<String>,
    /// The nodes that should use it. Empty: no hint.
    pub for_nodes: BTreeSet<String>,
}

/// Where the injector runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The node, if it is known.
    pub node: Option<String>,
    /// The node's zone, if it is known.
    pub zone: Option<String>,
}

/// The endpoints of a Service, as the API last listed them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints(Vec<Endpoint>);

/// Why a Service has no address for connections.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAddress {
    /// There is no endpoint.
    #[error("the service has no endpoints: check that it exists and that its selector matches pods")]
    NoEndpoint,
    /// No endpoint has the port.
    #[error(
        "the service has no port named {wanted:?} for TCP: its ports are {}",
        if known.is_empty() { "without a name".to_owned() } else { known.join(", ") }
    )]
    NoPort {
        /// The name in the configuration.
        wanted: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// No endpoint is ready, or ends and still serves.
    #[error("none of the {0} endpoints of the service is ready")]
    NoneReady(usize),
}

impl Endpoints {
    /// The most addresses that one backend gets.
    pub const MAX_ADDRESSES: usize = 500;

    /// Those of all slices.
    #[must_use]
    pub fn new(all: Vec<Endpoint>) -> Self {
        Self(all)
    }

    /// All addresses, ready or not.
    #[must_use]
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        self.0.iter().map(|endpoint| endpoint.address).collect()
    }

    /// The addresses with this readiness. One that is in two slices has the better of both.
    #[must_use]
    pub fn with(&self, readiness: Readiness) -> Vec<IpAddr> {
        let mut best: BTreeMap<IpAddr, Readiness> = BTreeMap::new();
        for Endpoint { address, readiness, .. } in &self.0 {
            best.entry(*address).and_modify(|best| *best = (*best).min(*readiness)).or_insert(*readiness);
        }
        best.into_iter().filter(|(_, it)| *it == readiness).map(|(address, _)| address).collect()
    }

    /// The zone of a node, if one of its pods is an endpoint.
    #[must_use]
    pub fn zone_of(&self, node: &str) -> Option<&str> {
        let there = self.0.iter().filter(|endpoint| endpoint.node.as_deref() == Some(node));
        there.filter_map(|endpoint| endpoint.zone.as_deref()).find(|zone| !zone.is_empty())
    }

    /// The addresses for new connections: of the endpoints that are ready; if there is none, of those
    /// that end and still serve. Of each family only those near `place`, if every ready endpoint of the
    /// family has a hint and one of them is for this node or zone. IPv4 first, in the order of the
    /// addresses, at most [`Self::MAX_ADDRESSES`].
    ///
    /// # Errors
    /// [`NoAddress`].
    pub fn choose(&self, port: &ServicePort, place: &Place) -> Result<Vec<SocketAddr>, NoAddress> {
        if self.0.is_empty() {
            return Err(NoAddress::NoEndpoint);
        }
        let best = self.with_port(port);
        if best.is_empty() {
            return Err(self.no_port(port));
        }
        let of = |readiness: Readiness, ipv6: bool| -> Vec<(SocketAddr, &Endpoint)> {
            let fits = |(address, endpoint): &(&SocketAddr, &&Endpoint)| {
                endpoint.readiness == readiness && address.is_ipv6() == ipv6
            };
            best.iter().filter(fits).map(|(address, endpoint)| (*address, *endpoint)).collect()
        };
        let ready = [false, true].map(|ipv6| near(of(Readiness::Ready, ipv6), place)).concat();
        let mut addresses = match ready.is_empty() {
            false => ready,
            true => [false, true]
                .into_iter()
                .flat_map(|ipv6| of(Readiness::Terminating, ipv6))
                .map(|(address, _)| address)
                .collect(),
        };
        if addresses.is_empty() {
            return Err(NoAddress::NoneReady(best.len()));
        }
        addresses.truncate(Self::MAX_ADDRESSES);
        Ok(addresses)
    }

    /// The endpoints that have the port, by address. While endpoints move from one slice to another,
    /// both have them for a moment: the better one counts.
    fn with_port(&self, port: &ServicePort) -> BTreeMap<SocketAddr, &Endpoint> {
        let mut best: BTreeMap<SocketAddr, &Endpoint> = BTreeMap::new();
        for endpoint in &self.0 {
            let number = match port {
                ServicePort::Number(number) => Some(*number),
                ServicePort::Name(wanted) => {
                    endpoint.ports.iter().find(|(name, _)| name == wanted).map(|(_, number)| *number)
                }
            };
            let Some(number) = number else { continue };
            best.entry(SocketAddr::new(endpoint.address, number))
                .and_modify(|best| {
                    if endpoint.readiness < best.readiness {
                        *best = endpoint;
                    }
                })
                .or_insert(endpoint);
        }
        best
    }

    fn no_port(&self, port: &ServicePort) -> NoAddress {
        let names = self.0.iter().flat_map(|endpoint| endpoint.ports.iter().map(|(name, _)| name.as_str()));
        let known: BTreeSet<_> = names.filter(|name| !name.is_empty()).collect();
        NoAddress::NoPort { wanted: port.to_string(), known: known.into_iter().map(str::to_owned).collect() }
    }
}

/// The near ones of the ready endpoints of one family: those for this node, otherwise those for this
/// zone, otherwise all.
fn near(ready: Vec<(SocketAddr, &Endpoint)>, place: &Place) -> Vec<SocketAddr> {
    type Hints = fn(&Endpoint) -> &BTreeSet<String>;
    let hints: [(Hints, &Option<String>); 2] =
        [(|it| &it.for_nodes, &place.node), (|it| &it.for_zones, &place.zone)];
    for (hints, here) in hints {
        let Some(here) = here else { continue };
        let every = ready.iter().all(|(_, endpoint)| !hints(endpoint).is_empty());
        let is_near = |endpoint: &Endpoint| hints(endpoint).contains(here);
        if every && ready.iter().any(|(_, endpoint)| is_near(endpoint)) {
            let near = ready.iter().filter(|(_, endpoint)| is_near(endpoint));
            return near.map(|(address, _)| *address).collect();
        }
    }
    ready.into_iter().map(|(address, _)| address).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoint(address: &str, readiness: Readiness) -> Endpoint {
        Endpoint {
            address: address.parse().unwrap(),
            ports: [("smtp".to_owned(), 2525), ("imap".to_owned(), 10143)].into(),
            readiness,
            node: None,
            zone: None,
            for_zones: BTreeSet::new(),
            for_nodes: BTreeSet::new(),
        }
    }

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    fn smtp() -> ServicePort {
        ServicePort::Name("smtp".to_owned())
    }

    fn place(node: &str, zone: &str) -> Place {
        let known = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Place { node: known(node), zone: known(zone) }
    }

    fn chosen(all: &[Endpoint], place: &Place) -> Vec<String> {
        let addresses = Endpoints::new(all.to_vec()).choose(&smtp(), place).unwrap();
        addresses.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ready_endpoints_come_before_those_that_end() {
        let one = endpoint("10.0.0.1", Readiness::Ready);
        let ends = endpoint("10.0.0.2", Readiness::Terminating);
        let ends_too = endpoint("fd00::2", Readiness::Terminating);
        let not = endpoint("10.0.0.3", Readiness::NotReady);
        let nowhere = Place::default();
        let all = [one, ends.clone(), ends_too.clone(), not.clone()];
        // Not even those of another family, of which none is ready.
        assert_eq!(chosen(&all, &nowhere), ["10.0.0.1:2525"]);
        let none_ready = [ends_too, not.clone(), ends];
        assert_eq!(chosen(&none_ready, &nowhere), ["10.0.0.2:2525", "[fd00::2]:2525"]);
        let none = Endpoints::new(vec![not]).choose(&smtp(), &nowhere);
        assert_eq!(none, Err(NoAddress::NoneReady(1)));
    }

    #[test]
    fn a_port_has_a_name_or_a_number() {
        let mut renumbered = endpoint("10.0.0.2", Readiness::Ready);
        renumbered.ports = [("smtp".to_owned(), 2526)].into();
        let mut without = endpoint("10.0.0.3", Readiness::Ready);
        without.ports = [(String::new(), 25)].into();
        let all = Endpoints::new(vec![endpoint("10.0.0.1", Readiness::Ready), renumbered, without]);
        let choose = |port: ServicePort| {
            let addresses = all.choose(&port, &Place::default())?;
            Ok(addresses.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        let strings = |texts: &[&str]| Ok(texts.iter().map(|&text| text.to_owned()).collect());
        // Pods of two versions may have the port under two numbers.
        assert_eq!(choose(smtp()), strings(&["10.0.0.1:2525", "10.0.0.2:2526"]));
        assert_eq!(choose(ServicePort::Number(7)), strings(&["10.0.0.1:7", "10.0.0.2:7", "10.0.0.3:7"]));
        let error: NoAddress = choose(ServicePort::Name("pop3".to_owned())).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the service has no port named \"pop3\" for TCP: its ports are imap, smtp"
        );
        assert_eq!(Endpoints::default().choose(&smtp(), &Place::default()), Err(NoAddress::NoEndpoint));
    }

    #[test]
    fn an_endpoint_in_two_slices_is_one() {
        let mut here = endpoint("10.0.0.1", Readiness::Ready);
        here.for_zones = set(&["west"]);
        let gone = endpoint("10.0.0.1", Readiness::NotReady);
        let other = Endpoint { for_zones: set(&["east"]), ..endpoint("10.0.0.2", Readiness::Ready) };
        for all in [[gone.clone(), here.clone(), other.clone()], [here, other, gone]] {
            assert_eq!(chosen(&all, &Place::default()), ["10.0.0.1:2525", "10.0.0.2:2525"]);
            // The copy without a hint is not the one that counts.
            assert_eq!(chosen(&all, &place("", "east")), ["10.0.0.2:2525"]);
            let all = Endpoints::new(all.to_vec());
            assert_eq!(Readiness::ALL.map(|readiness| all.with(readiness).len()), [2, 0, 0]);
        }
    }

    #[test]
    fn hints_count_only_if_all_ready_endpoints_have_one() {
        let hinted = |address: &str, zone: &str| Endpoint {
            for_zones: set(&[zone]),
            ..endpoint(address, Readiness::Ready)
        };
        let (west, east) = (hinted("10.0.0.1", "west"), hinted("10.0.0.2", "east"));
        let both = ["10.0.0.1:2525", "10.0.0.2:2525"];
        let all = [west.clone(), east.clone()];
        assert_eq!(chosen(&all, &place("", "west")), ["10.0.0.1:2525"]);
        assert_eq!(chosen(&all, &place("", "north")), both);
        assert_eq!(chosen(&all, &Place::default()), both);
        // One that is not ready needs none.
        let not_ready = endpoint("10.0.0.3", Readiness::NotReady);
        assert_eq!(chosen(&[west.clone(), east.clone(), not_ready], &place("", "west")), ["10.0.0.1:2525"]);
        let without = endpoint("10.0.0.3", Readiness::Ready);
        assert_eq!(chosen(&[west.clone(), east.clone(), without], &place("", "west")).len(), 3);
        // Each family for itself.
        let ipv6 = endpoint("fd00::1", Readiness::Ready);
        assert_eq!(chosen(&[west, east, ipv6], &place("", "west")), ["10.0.0.1:2525", "[fd00::1]:2525"]);
    }

    #[test]
    fn a_node_is_nearer_than_its_zone() {
        let hinted = |address: &str, node: &str| Endpoint {
            for_zones: set(&["west"]),
            for_nodes: set(&[node]),
            ..endpoint(address, Readiness::Ready)
        };
        let all = [hinted("10.0.0.1", "edge-1"), hinted("10.0.0.2", "edge-2")];
        assert_eq!(chosen(&all, &place("edge-2", "west")), ["10.0.0.2:2525"]);
        assert_eq!(chosen(&all, &place("edge-3", "west")).len(), 2);
        assert_eq!(chosen(&all, &place("edge-3", "east")).len(), 2);
    }

    #[test]
    fn the_zone_is_that_of_any_endpoint_on_the_node() {
        let on = |node: &str, zone: &str| Endpoint {
            node: Some(node.to_owned()),
            zone: (!zone.is_empty()).then(|| zone.to_owned()),
            ..endpoint("10.0.0.1", Readiness::NotReady)
        };
        let all = Endpoints::new(vec![on("edge-1", "west"), on("edge-2", ""), on("edge-2", "east")]);
        assert_eq!(all.zone_of("edge-1"), Some("west"));
        assert_eq!(all.zone_of("edge-2"), Some("east"));
        assert_eq!(all.zone_of("edge-3"), None);
    }

    #[test]
    fn a_service_with_very_many_endpoints_is_cut() {
        let all = (0..2000_u32).map(|n| endpoint(&format!("10.0.{}.{}", n / 250, n % 250), Readiness::Ready));
        assert_eq!(chosen(&all.collect::<Vec<_>>(), &Place::default()).len(), Endpoints::MAX_ADDRESSES);
    }

    fn arbitrary() -> impl Strategy<Value = Endpoint> {
        let readiness = prop::sample::select(Readiness::ALL.to_vec());
        let ports = prop::sample::select(vec![vec![], vec![("smtp", 1)], vec![("smtp", 2), ("imap", 3)]]);
        let hints = || prop::collection::btree_set("[ab]", 0..3);
        (0..6_u8, any::<bool>(), readiness, ports, hints(), hints()).prop_map(
            |(host, ipv6, readiness, ports, for_zones, for_nodes)| Endpoint {
                ports: ports.into_iter().map(|(name, port)| (name.to_owned(), port)).collect(),
                for_zones,
                for_nodes,
                ..endpoint(&if ipv6 { format!("fd00::{host}") } else { format!("10.0.0.{host}") }, readiness)
            },
        )
    }

    proptest! {
        /// What is chosen are addresses that the slices have, each once, of the best readiness that
        /// there is; the order of the slices does not matter.
        #[test]
        fn what_is_chosen_are_the_best_addresses(
            mut all in prop::collection::vec(arbitrary(), 0..12),
            node in prop::option::of("[ab]"),
            zone in prop::option::of("[ab]"),
        ) {
            let place = Place { node, zone };
            let endpoints = Endpoints::new(all.clone());
            let result = endpoints.choose(&smtp(), &place);
            let with_port: BTreeMap<SocketAddr, Readiness> = all
                .iter()
                .flat_map(|it| it.ports.iter().filter(|(name, _)| name == "smtp").map(move |(_, port)| {
                    (SocketAddr::new(it.address, *port), it.readiness)
                }))
                .fold(BTreeMap::new(), |mut best, (address, readiness)| {
                    let known = best.entry(address).or_insert(readiness);
                    *known = readiness.min(*known);
                    best
                });
            let best = with_port.values().min().copied();
            match &result {
                Ok(addresses) => {
                    prop_assert!(!addresses.is_empty());
                    prop_assert!(addresses.is_sorted(), "IPv4 first, then by address: {:?}", addresses);
                    let distinct: BTreeSet<_> = addresses.iter().collect();
                    prop_assert_eq!(distinct.len(), addresses.len());
                    prop_assert!(best < Some(Readiness::NotReady));
                    for address in addresses {
                        prop_assert_eq!(with_port.get(address).copied(), best);
                    }
                    // A hint never leaves a family without the addresses that it has.
                    for ipv6 in [false, true] {
                        let has = with_port.iter().any(|(it, state)| it.is_ipv6() == ipv6 && Some(*state) == best);
                        prop_assert_eq!(addresses.iter().any(|it| it.is_ipv6() == ipv6), has);
                    }
                }
                Err(NoAddress::NoEndpoint) => prop_assert!(all.is_empty()),
                Err(NoAddress::NoPort { .. }) => prop_assert!(with_port.is_empty() && !all.is_empty()),
                Err(NoAddress::NoneReady(count)) => {
                    prop_assert_eq!(*count, with_port.len());
                    prop_assert_eq!(best, Some(Readiness::NotReady));
                }
            }
            all.reverse();
            let reversed = Endpoints::new(all).choose(&smtp(), &Place::default());
            prop_assert_eq!(reversed, endpoints.choose(&smtp(), &Place::default()));
            let counted: usize = Readiness::ALL.into_iter().map(|it| endpoints.with(it).len()).sum();
            prop_assert_eq!(counted, endpoints.addresses().len());
        }
    }
}
