//! Values by network, found by an address that is in it.

use std::{collections::BTreeMap, net::IpAddr};

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
/// A tree, because no insertion into it takes long; a hash table of a million entries stops for tens
/// of milliseconds when it grows.
#[derive(Clone, Debug)]
pub(super) struct PrefixMap<T, V> {
    entries: BTreeMap<(Network, T), V>,
    /// How many entries have a prefix of this length, by family.
    ipv4: [u32; 33],
    ipv6: [u32; 129],
}

impl<T: Tag, V> Default for PrefixMap<T, V> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), ipv4: [0; 33], ipv6: [0; 129] }
    }
}

impl<T: Tag, V> PrefixMap<T, V> {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn get(&self, network: Network, tag: T) -> Option<&V> {
        self.entries.get(&(network, tag))
    }

    pub(super) fn insert(&mut self, network: Network, tag: T, value: V) -> Option<V> {
        let before = self.entries.insert((network, tag), value);
        if before.is_none() {
            *self.length_mut(network) += 1;
        }
        before
    }

    pub(super) fn remove(&mut self, network: Network, tag: T) -> Option<V> {
        let before = self.entries.remove(&(network, tag));
        if before.is_some() {
            *self.length_mut(network) -= 1;
        }
        before
    }

    fn length_mut(&mut self, network: Network) -> &mut u32 {
        let prefix = usize::from(network.prefix());
        if network.address().is_ipv4() { &mut self.ipv4[prefix] } else { &mut self.ipv6[prefix] }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Network, T, &V)> {
        self.entries.iter().map(|((network, tag), value)| (*network, *tag, value))
    }

    /// The entries of exactly this network.
    pub(super) fn of(&self, network: Network) -> impl Iterator<Item = (Network, T, &V)> {
        self.within(network).take_while(move |(other, ..)| *other == network)
    }

    /// The entries of this network, then those of the networks in it.
    pub(super) fn within(&self, network: Network) -> impl Iterator<Item = (Network, T, &V)> {
        self.from(network).take_while(move |(other, ..)| network.contains_network(*other))
    }

    /// The entries of this network and of all that come after it.
    pub(super) fn from(&self, network: Network) -> impl Iterator<Item = (Network, T, &V)> {
        self.entries.range((network, T::FIRST)..).map(|((network, tag), value)| (*network, *tag, value))
    }

    /// The entries of all networks that contain this one, the smallest first.
    pub(super) fn around(&self, network: Network) -> impl Iterator<Item = (Network, T, &V)> {
        let address = network.address();
        let lengths = if address.is_ipv4() { &self.ipv4[..] } else { &self.ipv6[..] };
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
