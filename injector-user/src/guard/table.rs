//! The table of bans: who wants which.

use std::net::IpAddr;

use injector_common::guard::Ban;

use super::{
    origin::{ListedBan, Origin, WantedBan},
    prefix_map::PrefixMap,
    reasons::{ReasonNumber, Reasons},
};
use crate::config::Network;

/// The bans that each origin wants. A source is banned while one of them wants it.
#[derive(Debug, Default)]
pub(super) struct Table {
    bans: PrefixMap<Origin, Want>,
    /// How many networks are banned, by whomever.
    networks: usize,
    /// How many bans each origin wants.
    counts: [usize; Origin::ALL.len()],
    reasons: Reasons,
}

/// What an origin wants of a network. Small, because there may be a million: packed, it makes an entry
/// of IPv4 one of 20 bytes instead of 24.
#[derive(Clone, Copy, Debug)]
#[repr(C, packed(4))]
struct Want {
    until_ns: u64,
    reason: ReasonNumber,
}

/// What became of a ban that an origin wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inserted {
    /// It is new.
    Added,
    /// It was there, with another end.
    Renewed,
    /// It was there; at most its reason has changed.
    Unchanged,
    /// There is no room for another network.
    Full,
}

impl Table {
    pub(super) fn is_empty(&self) -> bool {
        self.bans.is_empty()
    }

    /// How many bans an origin wants.
    pub(super) const fn count(&self, origin: Origin) -> usize {
        self.counts[origin as usize]
    }

    /// Whether this origin wants exactly this network banned.
    pub(super) fn has(&self, origin: Origin, network: Network) -> bool {
        self.bans.get(network, origin).is_some()
    }

    /// Whether an origin wants exactly this network banned.
    pub(super) fn has_any(&self, network: Network) -> bool {
        self.bans.of(network).next().is_some()
    }

    /// Whether the address is banned now. Asks for the time only if the table has a network with it; for
    /// most clients it has none.
    pub(super) fn bans(&self, address: IpAddr, now_ns: impl FnOnce() -> u64) -> bool {
        if !self.bans.contains(address) {
            return false;
        }
        let until_ns = self.bans.containing(address).map(|(.., want)| want.until_ns).max();
        until_ns.is_some_and(|until_ns| now_ns() < until_ns)
    }

    /// Adds a ban or gives it another end, unless it is of a network more than `max`.
    pub(super) fn insert(&mut self, origin: Origin, ban: WantedBan, max: usize) -> Inserted {
        let is_new = !self.has_any(ban.network);
        if is_new && self.networks >= max {
            return Inserted::Full;
        }
        let want = Want { until_ns: ban.until_ns, reason: self.reasons.add(ban.reason) };
        match self.bans.insert(ban.network, origin, want) {
            Some(before) => {
                self.reasons.remove(before.reason);
                if before.until_ns == ban.until_ns { Inserted::Unchanged } else { Inserted::Renewed }
            }
            None => {
                self.networks += usize::from(is_new);
                self.counts[origin as usize] += 1;
                Inserted::Added
            }
        }
    }

    /// Removes a ban of an origin. Whether there was one.
    pub(super) fn remove(&mut self, origin: Origin, network: Network) -> bool {
        let Some(before) = self.bans.remove(network, origin) else { return false };
        self.reasons.remove(before.reason);
        self.counts[origin as usize] -= 1;
        self.networks -= usize::from(!self.has_any(network));
        true
    }

    /// What the kernel must know of a network, whose lookup finds the smallest network only: the latest
    /// end of its own bans and those of all networks around it, and the origins that want its own ban
    /// until then. `None` if nothing bans exactly this network.
    pub(super) fn effective(&self, network: Network) -> Option<Ban> {
        self.bans.of(network).next()?;
        let until_ns = self.bans.around(network).map(|(.., want)| want.until_ns).max()?;
        let own = self.bans.of(network).filter(|(.., want)| want.until_ns == until_ns);
        Some(Ban { until_ns, origins: own.fold(0, |bits, (_, origin, _)| bits | origin.bit()), reserved: 0 })
    }

    /// The networks whose [`effective`](Self::effective) ban may be another one after a change of those
    /// in `changed`: they themselves, and the networks in them.
    pub(super) fn affected(&self, mut changed: Vec<Network>) -> Vec<Network> {
        changed.sort_unstable();
        let mut inner = Vec::new();
        let mut around: Option<Network> = None;
        for network in changed.iter().copied().filter(|network| !network.is_host()) {
            if !around.is_some_and(|around| around.contains_network(network)) {
                inner.extend(self.bans.within(network).map(|(inner, ..)| inner));
                around = Some(network);
            }
        }
        changed.append(&mut inner);
        changed.sort_unstable();
        changed.dedup();
        changed
    }

    /// The networks that an origin wants banned, in order.
    pub(super) fn networks_of(&self, origin: Origin) -> impl Iterator<Item = Network> {
        self.bans.iter().filter(move |(_, by, _)| *by == origin).map(|(network, ..)| network)
    }

    /// All networks that are banned, in order.
    pub(super) fn networks(&self) -> Vec<Network> {
        let mut networks: Vec<_> = self.bans.iter().map(|(network, ..)| network).collect();
        networks.dedup();
        networks
    }

    /// The bans that are over, and the earliest end of the others ([`Ban::FOREVER`] if none ends).
    pub(super) fn expired(&self, now_ns: u64) -> (Vec<(Origin, Network)>, u64) {
        let mut next = Ban::FOREVER;
        let mut expired = Vec::new();
        for (network, origin, want) in self.bans.iter() {
            if want.until_ns <= now_ns {
                expired.push((origin, network));
            } else {
                next = next.min(want.until_ns);
            }
        }
        (expired, next)
    }

    /// Bans that are not over, in the order of addresses.
    pub(super) fn list(&self, now_ns: u64) -> impl Iterator<Item = ListedBan> {
        self.list_of(self.bans.iter(), now_ns)
    }

    /// The bans that are not over of all networks that contain this one, the smallest first.
    pub(super) fn around(&self, network: Network, now_ns: u64) -> impl Iterator<Item = ListedBan> {
        self.list_of(self.bans.around(network), now_ns)
    }

    fn list_of<'a>(
        &'a self,
        bans: impl Iterator<Item = (Network, Origin, &'a Want)>,
        now_ns: u64,
    ) -> impl Iterator<Item = ListedBan> {
        bans.filter(move |(.., want)| now_ns < want.until_ns).map(|ban| self.listed(ban))
    }

    fn listed(&self, (network, origin, want): (Network, Origin, &Want)) -> ListedBan {
        let ban = WantedBan { network, until_ns: want.until_ns, reason: self.reasons.text(want.reason) };
        ListedBan { origin, ban }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn ban(network: &str, until_ns: u64) -> WantedBan {
        WantedBan { network: network.parse().unwrap(), until_ns, reason: format!("until {until_ns}").into() }
    }

    #[test]
    fn the_smallest_network_has_the_latest_end_and_the_origins_that_want_it() {
        let mut table = Table::default();
        table.insert(Origin::List, ban("192.0.2.0/24", 100), 10);
        table.insert(Origin::Command, ban("192.0.2.7", 50), 10);
        table.insert(Origin::CrowdSec, ban("192.0.2.8", 200), 10);
        table.insert(Origin::Command, ban("192.0.2.8", 150), 10);
        let effective = |network: &str| table.effective(network.parse().unwrap());
        let ban = |until_ns, origins| Some(Ban { until_ns, origins, reserved: 0 });
        assert_eq!(effective("192.0.2.0/24"), ban(100, Origin::List.bit()));
        assert_eq!(effective("192.0.2.7"), ban(100, 0), "only the network around it wants it until then");
        assert_eq!(effective("192.0.2.8"), ban(200, Origin::CrowdSec.bit()));
        assert_eq!(effective("192.0.2.9"), None);
        // What is over is not listed.
        let networks = |bans: &mut dyn Iterator<Item = ListedBan>| -> Vec<_> {
            bans.map(|listed| (listed.ban.network.to_string(), listed.ban.until_ns)).collect()
        };
        let listed = networks(&mut table.list(100));
        assert_eq!(listed, [("192.0.2.8/32".to_owned(), 150), ("192.0.2.8/32".to_owned(), 200)]);
        assert_eq!(networks(&mut table.around("192.0.2.8".parse().unwrap(), 150)), listed[1..]);
    }

    /// The kernel's programs and the daemon agree about the moment of the end: then it is over.
    #[test]
    fn a_ban_is_over_at_its_end() {
        let mut table = Table::default();
        table.insert(Origin::Command, ban("192.0.2.7", 50), 10);
        table.insert(Origin::List, ban("192.0.2.8", 51), 10);
        let [address, network] = ["192.0.2.7", "192.0.2.7/32"];
        for now_ns in [0, 49, 50, 51] {
            let holds = Ban { until_ns: 50, ..Ban::default() }.holds(now_ns);
            assert_eq!(table.bans(address.parse().unwrap(), || now_ns), holds, "{now_ns}");
            let (expired, _) = table.expired(now_ns);
            assert_eq!(expired.contains(&(Origin::Command, network.parse().unwrap())), !holds, "{now_ns}");
        }
        assert_eq!([0, 50, 51].map(|now_ns| table.expired(now_ns).1), [50, 51, Ban::FOREVER]);
    }

    #[test]
    fn a_full_table_takes_no_other_network_and_renews_those_that_it_has() {
        let mut table = Table::default();
        assert_eq!(table.insert(Origin::List, ban("192.0.2.1", 5), 1), Inserted::Added);
        assert_eq!(table.insert(Origin::List, ban("192.0.2.2", 5), 1), Inserted::Full);
        assert_eq!(table.insert(Origin::List, ban("192.0.2.1", 5), 1), Inserted::Unchanged);
        assert_eq!(table.insert(Origin::List, ban("192.0.2.1", 6), 1), Inserted::Renewed);
        assert_eq!(table.insert(Origin::Command, ban("192.0.2.1", 9), 1), Inserted::Added);
        assert!(table.remove(Origin::List, "192.0.2.1".parse().unwrap()));
        assert_eq!(table.insert(Origin::List, ban("192.0.2.2", 5), 1), Inserted::Full);
        assert!(table.remove(Origin::Command, "192.0.2.1".parse().unwrap()));
        assert_eq!(table.insert(Origin::List, ban("192.0.2.2", 5), 1), Inserted::Added);
    }

    #[test]
    fn a_million_bans_have_no_more_than_they_need() {
        assert_eq!(size_of::<((u32, u8, Origin), Want)>(), 20);
    }

    #[test]
    fn equal_reasons_are_kept_once_and_unused_ones_are_dropped() {
        let mut table = Table::default();
        for number in 0..1000 {
            table.insert(Origin::Command, ban("192.0.2.1", number), 2);
        }
        table.insert(Origin::Command, ban("192.0.2.1", 7), 2);
        table.insert(Origin::Command, ban("192.0.2.2", 7), 2);
        let reasons: Vec<_> = table.list(0).map(|listed| listed.ban.reason).collect();
        assert!(reasons.len() == 2 && Arc::ptr_eq(&reasons[0], &reasons[1]));
        assert_eq!(&*reasons[0], "until 7");
        for network in ["192.0.2.1", "192.0.2.2"] {
            assert!(table.remove(Origin::Command, network.parse().unwrap()));
        }
        assert!(table.reasons.is_empty());
    }
}
