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

/// The lengths of prefixes that entries have, and how many entries have each; by family, the longest first.
#[derive(Clone, Debug, Default)]
struct Lengths {
    ipv4: Vec<(u8, u32)>,
    ipv6: Vec<(u8, u32)>,
}

impl<T: Tag, V> Default for PrefixMap<T, V> {
    fn default() -> Self {
        Self { ipv4: ChunkMap::default(), ipv6: ChunkMap::default(), lengths: Lengths::default() }
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
            self.lengths.add(network);
        }
        before
    }

    pub(super) fn remove(&mut self, network: Network, tag: T) -> Option<V> {
        let before = match network.address() {
            IpAddr::V4(address) => self.ipv4.remove(&(address.to_bits(), network.prefix(), tag)),
            IpAddr::V6(_) => self.ipv6.remove(&(network, tag)),
        };
        if before.is_some() {
            self.lengths.remove(network);
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
        let lengths = self.lengths.of(address).iter().map(|(prefix, _)| *prefix);
        lengths
            .filter(move |prefix| *prefix <= network.prefix())
            .flat_map(move |prefix| self.of(Network::around(address, prefix)))
    }

    /// The entries of all networks that the address is in.
    pub(super) fn containing(&self, address: IpAddr) -> impl Iterator<Item = (Network, T, &V)> {
        self.around(Network::host(address.to_canonical()))
    }

    /// Whether a network has the address in it. Every client is asked about; of one that is in none, one
    /// search in the entries tells it nearly always.
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let mut lengths = self.lengths.of(address).iter().map(|(prefix, _)| *prefix);
        let mut longest = u8::MAX;
        while let Some(prefix) = lengths.find(|prefix| *prefix <= longest) {
            // The larger networks with the address stand before the one of this length, and what is in one of
            // them follows it at once: the network before is such a one, or is in all of them.
            let Some(before) = self.last_to(Network::around(address, prefix)) else { return false };
            if before.contains(address) {
                return true;
            }
            longest = common_bits(before.address(), address);
        }
        false
    }

    /// This network, or else the last before it.
    fn last_to(&self, network: Network) -> Option<Network> {
        match network.address() {
            IpAddr::V4(first) => {
                // One comparison, not two.
                let rank = |address: u32, prefix: u8| u64::from(address) << 8 | u64::from(prefix);
                let wanted = rank(first.to_bits(), network.prefix());
                self.ipv4
                    .last_where(|(address, prefix, _)| rank(*address, *prefix) <= wanted)
                    .map(|it| ipv4_entry(it).0)
            }
            IpAddr::V6(_) => self.ipv6.last_where(|(other, _)| *other <= network).map(|it| ipv6_entry(it).0),
        }
    }
}

/// How many first bits two addresses of a family have in common.
fn common_bits(one: IpAddr, other: IpAddr) -> u8 {
    let bits = match (one, other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        (IpAddr::V6(one), IpAddr::V6(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        _ => 0,
    };
    // At most 128.
    u8::try_from(bits).unwrap_or(u8::MAX)
}

impl Lengths {
    fn of(&self, address: IpAddr) -> &[(u8, u32)] {
        if address.is_ipv4() { &self.ipv4 } else { &self.ipv6 }
    }

    /// The lengths of the network's family, and where its own is, or would be.
    fn find(&mut self, network: Network) -> (&mut Vec<(u8, u32)>, Result<usize, usize>) {
        let lengths = if network.address().is_ipv4() { &mut self.ipv4 } else { &mut self.ipv6 };
        let found = lengths.binary_search_by(|(prefix, _)| network.prefix().cmp(prefix));
        (lengths, found)
    }

    fn add(&mut self, network: Network) {
        match self.find(network) {
            (lengths, Ok(at)) => lengths[at].1 += 1,
            (lengths, Err(at)) => lengths.insert(at, (network.prefix(), 1)),
        }
    }

    fn remove(&mut self, network: Network) {
        let (lengths, Ok(at)) = self.find(network) else { return };
        lengths[at].1 -= 1;
        if lengths[at].1 == 0 {
            lengths.remove(at);
        }
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
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::guard::origin::Origin;

    impl Tag for bool {
        const FIRST: Self = false;
    }

    /// Few bits differ, so that many networks are in others.
    fn address() -> impl Strategy<Value = IpAddr> {
        let bits = (0..4_u8, 0..4_u8, 0..4_u8);
        (any::<bool>(), bits).prop_map(|(ipv6, (high, middle, low))| {
            let ipv4 = Ipv4Addr::new(high << 6, 0, middle, low);
            let [a, b, c, d] = ipv4.octets().map(u16::from);
            if ipv6 { std::net::Ipv6Addr::new(a << 8, b, 0, c << 8, 0, 0, 0, d).into() } else { ipv4.into() }
        })
    }

    fn network() -> impl Strategy<Value = Network> {
        let prefix = prop_oneof![
            Just(0_u8),
            Just(1),
            Just(2),
            Just(24),
            Just(31),
            Just(32),
            Just(64),
            Just(128),
            0..=128_u8
        ];
        (address(), prefix).prop_map(|(address, prefix)| Network::around(address, prefix))
    }

    proptest! {
        #[test]
        fn an_address_is_in_the_networks_that_contain_it(
            steps in proptest::collection::vec((network(), any::<bool>(), 0..3_u8), 0..60),
            addresses in proptest::collection::vec(address(), 20),
        ) {
            let (mut map, mut oracle) = (PrefixMap::default(), BTreeMap::new());
            for (network, tag, value) in steps {
                // One of three removes, most often something that is there.
                if value == 0 {
                    let network = oracle.keys().nth(oracle.len() / 2).map_or(network, |(network, _)| *network);
                    prop_assert_eq!(map.remove(network, tag), oracle.remove(&(network, tag)));
                } else {
                    prop_assert_eq!(map.insert(network, tag, value), oracle.insert((network, tag), value));
                }
                for address in &addresses {
                    let mut around: Vec<_> = oracle.keys().filter(|(network, _)| network.contains(*address)).collect();
                    around.sort_by_key(|(network, tag)| (std::cmp::Reverse(network.prefix()), *tag));
                    prop_assert_eq!(map.contains(*address), !around.is_empty());
                    prop_assert!(map.containing(*address).map(|(network, tag, _)| (network, tag)).eq(around.into_iter().copied()));
                    if let IpAddr::V4(ipv4) = address {
                        prop_assert_eq!(map.contains(ipv4.to_ipv6_mapped().into()), map.contains(*address));
                    }
                }
            }
        }
    }

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
