//! The addresses of one backend: which of them is tried next, by what became of the last attempts.
//! Pure.
//!
//! Connections are spread over the addresses of the preferred family, the first that the resolver
//! lists (RFC 6724). The other family is for the case that they fail: a receiver may trust this
//! host's address of one family alone. An address that failed is tried after all others.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

/// How long an address that failed is tried after all others. Then one connection tries it first.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(30);

/// The addresses of one backend, and what is known of each.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    /// In the resolver's order.
    all: Vec<Known>,
    /// Counts the connections, to spread them.
    turn: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    address: SocketAddr,
    /// Its last health check failed.
    check_failed: bool,
    /// The last connection to it failed: when the next one tries it first.
    retry_at: Option<Instant>,
}

/// What a resolver's answer changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resolved {
    /// Nothing.
    Same,
    /// Only the order: many name servers rotate it with each answer.
    Reordered,
    /// There are other addresses.
    Changed,
}

impl Known {
    const fn new(address: SocketAddr) -> Self {
        Self { address, check_failed: false, retry_at: None }
    }

    fn fails(&self, now: Instant) -> bool {
        self.check_failed || self.retry_at.is_some_and(|at| now < at)
    }
}

impl Addresses {
    /// Of which nothing is known yet.
    pub(super) fn new(addresses: Vec<SocketAddr>) -> Self {
        let mut new = Self::default();
        new.replace(addresses);
        new
    }

    /// Takes over a resolver's answer. What is known of an address that stays is kept.
    pub(super) fn replace(&mut self, mut addresses: Vec<SocketAddr>) -> Resolved {
        // A name in /etc/hosts may have an address twice.
        let mut seen = Vec::new();
        addresses.retain(|address| {
            let new = !seen.contains(address);
            seen.push(*address);
            new
        });
        if self.all().eq(addresses.iter().copied()) {
            return Resolved::Same;
        }
        let known = |address: &SocketAddr| self.all.iter().find(|known| known.address == *address);
        let reordered = addresses.len() == self.all.len() && addresses.iter().all(|it| known(it).is_some());
        let kept = |address| known(&address).copied().unwrap_or(Known::new(address));
        self.all = addresses.into_iter().map(kept).collect();
        if reordered { Resolved::Reordered } else { Resolved::Changed }
    }

    /// All of them, in the resolver's order.
    pub(super) fn all(&self) -> impl Iterator<Item = SocketAddr> {
        self.all.iter().map(|known| known.address)
    }

    /// Those that failed when they were last tried, by a connection or a check.
    pub(super) fn failing(&self, now: Instant) -> Vec<SocketAddr> {
        self.all.iter().filter(|known| known.fails(now)).map(|known| known.address).collect()
    }

    /// Those of one family that do not fail; all of the family if all of them fail.
    pub(super) fn usable(&self, ipv6: bool, now: Instant) -> Vec<SocketAddr> {
        let family: Vec<_> = self.all.iter().filter(|known| known.address.is_ipv6() == ipv6).collect();
        let any = family.iter().any(|known| !known.fails(now));
        let usable = family.into_iter().filter(|known| !any || !known.fails(now));
        usable.map(|known| known.address).collect()
    }

    /// All of them in the order in which the next connection tries them: those that do not fail
    /// before those that do, and in each part the families by turns, the preferred one first
    /// (RFC 8305, section 4). The next connection begins with another address.
    pub(super) fn order(&mut self, now: Instant) -> Vec<SocketAddr> {
        if self.all.len() < 2 {
            return self.all().collect();
        }
        let turn = self.turn;
        self.turn = turn.wrapping_add(1);
        let prefers_ipv6 = self.all.first().is_some_and(|known| known.address.is_ipv6());
        let part = |fails: bool| {
            let family = |ipv6: bool| {
                let fits = |known: &&Known| known.fails(now) == fails && known.address.is_ipv6() == ipv6;
                let mut family: Vec<_> = self.all.iter().filter(fits).map(|known| known.address).collect();
                let begin = turn.checked_rem(family.len()).unwrap_or_default();
                family.rotate_left(begin);
                family.into_iter()
            };
            interleave(family(prefers_ipv6), family(!prefers_ipv6))
        };
        let order = [part(false), part(true)].concat();
        // Only this connection tries a failed address first: it may fail again.
        if let Some(first) = self.all.iter_mut().find(|known| order.first() == Some(&known.address))
            && first.retry_at.is_some()
        {
            first.retry_at = Some(now + RETRY_AFTER);
        }
        order
    }

    /// A connection to it failed, or another address answered before it. Returns whether this is
    /// new.
    pub(super) fn failed(&mut self, address: SocketAddr, now: Instant) -> bool {
        let Some(known) = self.find(address) else { return false };
        known.retry_at.replace(now + RETRY_AFTER).is_none()
    }

    /// A connection to it succeeded. Returns whether the one before failed.
    pub(super) fn connected(&mut self, address: SocketAddr) -> bool {
        self.find(address).is_some_and(|known| known.retry_at.take().is_some())
    }

    /// The result of its health check. One that passes does not show that the backend's own port
    /// accepts connections: the check may use another. Returns whether the one before had another
    /// result.
    pub(super) fn checked(&mut self, address: SocketAddr, passed: bool) -> bool {
        let known = self.find(address);
        known.is_some_and(|known| std::mem::replace(&mut known.check_failed, !passed) == passed)
    }

    /// Discards the results of checks, because the backend is no longer checked.
    pub(super) fn unchecked(&mut self) {
        self.all.iter_mut().for_each(|known| known.check_failed = false);
    }

    fn find(&mut self, address: SocketAddr) -> Option<&mut Known> {
        self.all.iter_mut().find(|known| known.address == address)
    }
}

/// One of each in turns, then the rest of the longer one.
fn interleave<T>(mut one: impl Iterator<Item = T>, mut other: impl Iterator<Item = T>) -> Vec<T> {
    let mut all = Vec::new();
    loop {
        let pair = [one.next(), other.next()];
        if pair.iter().all(Option::is_none) {
            return all;
        }
        all.extend(pair.into_iter().flatten());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    const A: &str = "192.0.2.1:1";
    const B: &str = "192.0.2.2:1";
    const C: &str = "192.0.2.3:1";
    const V6: &str = "[2001:db8::1]:1";

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn addresses(texts: &[&str]) -> Addresses {
        Addresses::new(texts.iter().map(|text| address(text)).collect())
    }

    fn order(addresses: &mut Addresses, now: Instant) -> Vec<String> {
        addresses.order(now).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn connections_are_spread_over_the_preferred_family() {
        let now = Instant::now();
        let mut several = addresses(&[A, V6, B, C]);
        let orders: Vec<_> = (0..4).map(|_| order(&mut several, now)).collect();
        assert_eq!(orders, [[A, V6, B, C], [B, V6, C, A], [C, V6, A, B], [A, V6, B, C]]);
    }

    #[test]
    fn an_address_that_failed_costs_one_connection_and_is_tried_again_later() {
        let start = Instant::now();
        let mut two = addresses(&[V6, A]);
        assert_eq!(order(&mut two, start), [V6, A]);
        assert!(two.failed(address(V6), start), "the first failure is new");
        assert!(!two.failed(address(V6), start), "the second is not");
        assert_eq!(two.failing(start), [address(V6)]);
        for seconds in [0, 29] {
            assert_eq!(order(&mut two, start + Duration::from_secs(seconds)), [A, V6]);
        }
        let later = start + RETRY_AFTER;
        assert_eq!(order(&mut two, later), [V6, A]);
        // Until its result is known, the others do not wait for it.
        assert_eq!(order(&mut two, later), [A, V6]);
        assert!(two.connected(address(V6)));
        assert!(!two.connected(address(V6)));
        assert_eq!(order(&mut two, later), [V6, A]);
    }

    #[test]
    fn an_address_whose_check_fails_is_the_last_until_one_passes() {
        let now = Instant::now();
        let mut two = addresses(&[A, B]);
        assert!(two.checked(address(A), false));
        assert!(!two.checked(address(A), false));
        let long_after = now + 10 * RETRY_AFTER;
        assert_eq!(order(&mut two, long_after), [B, A]);
        assert_eq!(two.usable(false, long_after), [address(B)]);
        // All fail: then all are tried.
        two.checked(address(B), false);
        assert_eq!(two.usable(false, now), [address(A), address(B)]);
        assert_eq!(two.usable(true, now), []);
        two.checked(address(A), true);
        assert_eq!(order(&mut two, now), [A, B]);
        two.unchecked();
        assert_eq!(two.failing(now), []);
    }

    #[test]
    fn an_answer_in_another_order_is_not_a_change() {
        let now = Instant::now();
        let mut known = addresses(&[A, B, C]);
        known.failed(address(B), now);
        let mut replace = |texts: &[&str]| known.replace(texts.iter().map(|text| address(text)).collect());
        assert_eq!(replace(&[A, B, C]), Resolved::Same);
        assert_eq!(replace(&[A, B, B, C]), Resolved::Same);
        assert_eq!(replace(&[B, C, A]), Resolved::Reordered);
        assert_eq!(replace(&[B, C]), Resolved::Changed);
        assert_eq!(replace(&[B, V6]), Resolved::Changed);
        // What is known of an address outlives the answers that have it.
        assert_eq!(known.failing(now), [address(B)]);
        assert_eq!(known.replace(Vec::new()), Resolved::Changed);
        assert_eq!(known.order(now), []);
    }

    proptest! {
        #[test]
        fn every_order_is_complete_and_fair(
            ipv4 in 0_usize..6, ipv6 in 0_usize..6, first_ipv6: bool,
            failed in prop::collection::btree_set(0_usize..12, 0..12), turns in 1_usize..5,
        ) {
            let v4 = (0..ipv4).map(|n| address(&format!("192.0.2.{}:25", n + 1)));
            let v6 = (0..ipv6).map(|n| address(&format!("[2001:db8::{}]:25", n + 1)));
            let all: Vec<_> = if first_ipv6 { v6.chain(v4).collect() } else { v4.chain(v6).collect() };
            let now = Instant::now();
            let mut addresses = Addresses::new(all.clone());
            for index in &failed {
                if let Some(address) = all.get(*index) {
                    addresses.failed(*address, now);
                }
            }
            let failing: BTreeSet<_> = addresses.failing(now).into_iter().collect();
            let preferred = all.first().map(SocketAddr::is_ipv6);
            let best = |fails: bool| {
                let part: Vec<_> = all.iter().filter(|it| failing.contains(it) == fails).collect();
                let family: Vec<_> = part.iter().filter(|it| Some(it.is_ipv6()) == preferred).collect();
                if family.is_empty() { part.len() } else { family.len() }
            };
            // The addresses that share the connections.
            let sharing = if failing.len() == all.len() { best(true) } else { best(false) };
            let mut firsts: BTreeMap<SocketAddr, usize> = BTreeMap::new();
            for _ in 0..turns * sharing {
                let order = addresses.order(now);
                prop_assert_eq!(order.iter().collect::<BTreeSet<_>>(), all.iter().collect::<BTreeSet<_>>());
                prop_assert_eq!(order.len(), all.len());
                // None that fails precedes one that does not.
                prop_assert!(order.iter().map(|it| failing.contains(it)).is_sorted());
                // In each part the families take turns, as long as it has both.
                for fails in [false, true] {
                    let part: Vec<_> = order.iter().filter(|it| failing.contains(it) == fails).collect();
                    let of_one = part.iter().filter(|it| it.is_ipv6()).count();
                    let both = 2 * of_one.min(part.len() - of_one);
                    let families: Vec<_> = part.iter().map(|it| it.is_ipv6()).collect();
                    prop_assert!(families[..both].windows(2).all(|pair| pair[0] != pair[1]));
                    prop_assert!(both == 0 || Some(families[0]) == preferred);
                }
                *firsts.entry(order[0]).or_default() += 1;
            }
            prop_assert!(firsts.values().all(|count| *count == turns), "{:?}", firsts);
            prop_assert_eq!(firsts.len(), sharing);
        }
    }
}
