//! The networks of a list file.

use std::{
    iter,
    net::{IpAddr, Ipv4Addr},
};

use crate::config::Network;

/// Networks in order, each once. Most lines of a list are single addresses of IPv4, which take 4 bytes
/// here instead of the 18 of a [`Network`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkList {
    /// Networks of one IPv4 address.
    ipv4_hosts: Vec<u32>,
    others: Vec<Network>,
}

impl NetworkList {
    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.ipv4_hosts.len() + self.others.len()
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The networks in order.
    pub fn iter(&self) -> impl Iterator<Item = Network> + Clone {
        let hosts = self.ipv4_hosts.iter().map(|host| Network::host(Ipv4Addr::from_bits(*host).into()));
        let (mut hosts, mut others) = (hosts.peekable(), self.others.iter().copied().peekable());
        iter::from_fn(move || match (hosts.peek(), others.peek()) {
            (Some(host), Some(other)) if other < host => others.next(),
            (Some(_), _) => hosts.next(),
            (None, _) => others.next(),
        })
    }

    /// The networks of several lists in order, each once, with the label of the first list that has it.
    pub(super) fn union<'l, L: Clone>(
        lists: impl IntoIterator<Item = (L, &'l Self)>,
    ) -> impl Iterator<Item = (Network, L)> + Clone {
        let mut lists: Vec<_> =
            lists.into_iter().map(|(label, list)| (label, list.iter().peekable())).collect();
        iter::from_fn(move || {
            let next = lists.iter_mut().filter_map(|(_, networks)| networks.peek().copied()).min()?;
            let having = lists.iter_mut().filter_map(|(label, networks)| {
                networks.next_if_eq(&next)?;
                Some(&*label)
            });
            // The last item of the reversed ones is the first list, and all have moved on.
            Some((next, having.rev().last()?.clone()))
        })
    }
}

impl FromIterator<Network> for NetworkList {
    fn from_iter<I: IntoIterator<Item = Network>>(networks: I) -> Self {
        let mut list = Self::default();
        for network in networks {
            match network.address() {
                IpAddr::V4(address) if network.is_host() => list.ipv4_hosts.push(address.to_bits()),
                _ => list.others.push(network),
            }
        }
        list.ipv4_hosts.sort_unstable();
        list.ipv4_hosts.dedup();
        list.ipv4_hosts.shrink_to_fit();
        list.others.sort_unstable();
        list.others.dedup();
        list.others.shrink_to_fit();
        list
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn any_network() -> impl Strategy<Value = Network> {
        prop_oneof![
            (0..40_u32, prop_oneof![Just(32), 24..=32_u8])
                .prop_map(|(bits, prefix)| Network::around(Ipv4Addr::from_bits(bits).into(), prefix)),
            (0..40_u128, prop_oneof![Just(128), 120..=128_u8])
                .prop_map(|(bits, prefix)| Network::around(Ipv6Addr::from_bits(bits).into(), prefix)),
        ]
    }

    proptest! {
        #[test]
        fn a_union_has_each_network_once_in_order_with_its_first_list(
            lists in proptest::collection::vec(proptest::collection::vec(any_network(), 0..20), 0..4),
        ) {
            let mut expected = BTreeMap::new();
            for (number, networks) in lists.iter().enumerate().rev() {
                expected.extend(networks.iter().map(|network| (*network, number)));
            }
            let lists: Vec<NetworkList> =
                lists.into_iter().map(|networks| networks.into_iter().collect()).collect();
            let union = NetworkList::union(lists.iter().enumerate());
            prop_assert!(union.clone().eq(expected), "{:?}", union.collect::<Vec<_>>());
        }

        #[test]
        fn a_list_has_each_network_once_in_order(mut networks in proptest::collection::vec(any_network(), 0..60)) {
            let list: NetworkList = networks.iter().copied().collect();
            networks.sort_unstable();
            networks.dedup();
            prop_assert_eq!((list.len(), list.is_empty()), (networks.len(), networks.is_empty()));
            prop_assert!(list.iter().eq(networks));
        }
    }

    #[test]
    fn addresses_of_ipv4_take_four_bytes() {
        let list: NetworkList =
            (0..1000).map(|bits| Network::host(Ipv4Addr::from_bits(bits).into())).collect();
        assert_eq!((list.ipv4_hosts.capacity(), list.others.capacity()), (1000, 0));
    }
}
