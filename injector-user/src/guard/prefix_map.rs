//! Values by network, found by an address that is in it.

use std::net::{IpAddr, Ipv4Addr};

use super::chunk_map::ChunkMap;
use crate::config::Network;

/// Tells apart the values of one network.
pub(super) trait Tag: Copy + Ord {
    /// The smallest.
    const FIRST: Self;
}

impl Tag for () {
    const FIRST: Self = ();
}

/// Values by network and tag, in the order of addresses: first a network, then the networks in it.
///
/// IPv4 has a map of its own, whose keys take 8 bytes instead of 19: most bans are of IPv4 addresses.
#[derive(Clone, Debug)]
pub(super) struct PrefixMap<T, V> {
    /// By address, length of the prefix, and tag.
    ipv4: ChunkMap<(u32, u8, T), V>,
    ipv6: ChunkMap<(Network, T), V>,
    lengths: Lengths,
}

/// How many entries have a prefix of this length, by family.
#[derive(Clone, Debug)]
struct Lengths {
    ipv4: [u32; 33],
    ipv6: [u32; 129],
}

impl<T: Tag, V> Default for PrefixMap<T, V> {
    fn default() -> Self {
        let lengths = Lengths { ipv4: [0; 33], ipv6: [0; 129] };
        Self { ipv4: ChunkMap::default(), ipv6: ChunkMap::default(), lengths }
    }
}

impl<T: Tag, V> PrefixMap<T, V> {
    pub(super) fn is_empty(&self) -> bool {
        self.ipv4.is_empty() && self.ipv6.is_empty()
    }

    pub(super) fn get(&self, network: Network, tag: T) -> Option<&V> {
        match network.address() {
            IpAddr::V4(address) => self.ipv4.get(&(address.to_bits(), network.prefix(), tag)),
            IpAddr::V6(_) => self.ipv6.get(&(network, tag)),
        }
    }

    pub(super) fn insert(&mut self, network: Network, tag: T, value: V) -> Option<V> {
        let before = match network.address() {
            IpAddr::V4(address) => self.ipv4.insert((address.to_bits(), network.prefix(), tag), value),
            IpAddr::V6(_) => self.ipv6.insert((network, tag), value),
        };
        if before.is_none() {
            *self.lengths.of(network) += 1;
        }
        before
    }

    pub(super) fn remove(&mut self, network: Network, tag: T) -> Option<V> {
        let before = match network.address() {
            IpAddr::V4(address) => self.ipv4.remove(&(address.to_bits(), network.prefix(), tag)),
            IpAddr::V6(_) => self.ipv6.remove(&(network, tag)),
        };
        if before.is_some() {
            *self.lengths.of(network) -= 1;
        }
        before
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Network, T, &V)> {
        self.ipv4.iter().map(ipv4_entry).chain(self.ipv6.iter().map(ipv6_entry))
    }

    /// The entries of exactly this network.
    pub(super) fn of(&self, network: Network) -> impl Iterator<Item = (Network, T, &V)> {
        self.within(network).take_while(move |(other, ..)| *other == network)
    }

    /// The entries of this network, then those of the networks in it.
    pub(super) fn within(&self, network: Network) -> impl Iterator<Item = (Network, T, &V)> {
        let (ipv4, ipv6) = match network.address() {
            IpAddr::V4(address) => {
                (Some(self.ipv4.from((address.to_bits(), network.prefix(), T::FIRST))), None)
            }
            IpAddr::V6(_) => (None, Some(self.ipv6.from((network, T::FIRST)))),
        };
        let ipv4 = ipv4.into_iter().flatten().map(ipv4_entry);
        ipv4.chain(ipv6.into_iter().flatten().map(ipv6_entry))
            .take_while(move |(other, ..)| network.contains_network(*other))
    }

    /// The entries of all networks that contain this one, the smallest first.
    pub(super) fn around(&self, network: Network) -> impl Iterator<Item = (Network, T, &V)> {
        let address = network.address();
        let lengths = if address.is_ipv4() { &self.lengths.ipv4[..] } else { &self.lengths.ipv6[..] };
        (0..=network.prefix())
            .rev()
            .filter(|prefix| lengths[usize::from(*prefix)] > 0)
            .flat_map(move |prefix| self.of(Network::around(address, prefix)))
    }

    /// The entries of all networks that the address is in.
    pub(super) fn containing(&self, address: IpAddr) -> impl Iterator<Item = (Network, T, &V)> {
        self.around(Network::host(address.to_canonical()))
    }
}

impl Lengths {
    fn of(&mut self, network: Network) -> &mut u32 {
        let prefix = usize::from(network.prefix());
        if network.address().is_ipv4() { &mut self.ipv4[prefix] } else { &mut self.ipv6[prefix] }
    }
}

fn ipv4_entry<T: Copy, V>(((address, prefix, tag), value): &((u32, u8, T), V)) -> (Network, T, &V) {
    (Network::around(Ipv4Addr::from_bits(*address).into(), *prefix), *tag, value)
}

fn ipv6_entry<T: Copy, V>(((network, tag), value): &((Network, T), V)) -> (Network, T, &V) {
    (*network, *tag, value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::origin::Origin;

    #[test]
    fn a_key_of_ipv4_has_eight_bytes() {
        assert_eq!(size_of::<(u32, u8, Origin)>(), 8);
    }

    #[test]
    fn a_network_stands_before_those_in_it_and_ipv4_before_ipv6() {
        let mut map = PrefixMap::default();
        let networks = [
            "0.0.0.0/0",
            "9.0.0.0/8",
            "10.0.0.0/8",
            "10.0.0.0/24",
            "10.0.0.0/32",
            "192.0.2.7/32",
            "::/0",
            "2001:db8::/32",
            "2001:db8::/64",
        ]
        .map(|text| text.parse::<Network>().unwrap());
        for network in networks.iter().rev() {
            assert_eq!(map.insert(*network, (), ()), None);
        }
        let of = |entries: &mut dyn Iterator<Item = (Network, (), &())>| {
            entries.map(|(network, ..)| network).collect::<Vec<_>>()
        };
        assert_eq!(of(&mut map.iter()), networks);
        assert!(networks.is_sorted(), "as networks are compared");
        assert_eq!(of(&mut map.within(networks[2])), networks[2..5]);
        assert_eq!(of(&mut map.within(networks[0])), networks[..6]);
        assert_eq!(of(&mut map.within(networks[6])), networks[6..]);
        let around = of(&mut map.containing("10.0.0.0".parse().unwrap()));
        assert_eq!(around, [networks[4], networks[3], networks[2], networks[0]]);
        assert_eq!(map.remove(networks[3], ()), Some(()));
        assert_eq!(of(&mut map.of(networks[3])), []);
    }
}
