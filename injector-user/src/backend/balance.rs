//! The order in which the backends of a listener are tried for a connection. Pure.

use std::{cmp::Ordering, net::IpAddr};

/// The properties of a backend that determine the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Its share of new connections.
    pub weight: u32,
    /// Whether it gets connections only while no primary is available.
    pub backup: bool,
    /// Whether its health allows connections.
    pub up: bool,
    /// Whether the operator has disabled it.
    pub disabled: bool,
    /// Its open sessions.
    pub active: u64,
    /// The hash of its name, which is the same on every edge host.
    pub hash: u64,
}

impl Candidate {
    /// Whether it can get connections now.
    pub(super) fn is_eligible(self) -> bool {
        self.is_selectable() && self.up
    }

    /// Whether it can get connections while no other is up.
    pub(super) fn is_selectable(self) -> bool {
        !self.disabled && self.weight > 0
    }

    /// Compares two candidates by the sessions that each would have for its weight.
    fn compare_load(&self, other: &Self) -> Ordering {
        let load = |it: &Self, of: &Self| u128::from(it.active + 1) * u128::from(of.weight);
        load(self, other).cmp(&load(other, self))
    }

    /// Its score for a client: the highest gets the client (weighted rendezvous hashing; Schindelhauer and Schomaker, SPAA 2005). A
    /// backend that leaves or comes moves no client between the others.
    #[expect(clippy::cast_precision_loss, reason = "a random number")]
    fn score(&self, client: u64) -> f64 {
        let random = (mix(self.hash ^ client) as f64 + 1.0) / (u64::MAX as f64 + 2.0);
        f64::from(self.weight) / -random.ln()
    }
}

/// Orders candidates by their score for the client with this address.
pub(super) fn by_source(candidates: &[Candidate], order: &mut [usize], client: IpAddr) {
    let client = match client {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let client = stable_hash(&client.octets(), 0);
    let score = |index: &usize| candidates.get(*index).map_or(0.0, |it| it.score(client));
    order.sort_by(|one, other| score(other).total_cmp(&score(one)));
}

/// Orders candidates by their load; those with the same load keep their order.
pub(super) fn by_load(candidates: &[Candidate], order: &mut [usize]) {
    let of = |index: &usize| candidates.get(*index);
    order.sort_by(|one, other| match (of(one), of(other)) {
        (Some(one), Some(other)) => one.compare_load(other),
        _ => Ordering::Equal,
    });
}

/// FNV-1a of these bytes behind a seed, mixed. Not the standard library's hash, which may change between versions: all edge hosts must
/// have the same one.
pub(crate) fn stable_hash(bytes: &[u8], seed: u64) -> u64 {
    let start = 0xCBF2_9CE4_8422_2325 ^ seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
    mix(bytes.iter().fold(start, fold))
}

/// The finalizer of SplitMix64.
const fn mix(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ word >> 31
}

/// The candidates that get new connections, by index in the given order: the primaries that are up;
/// if none, the backups that are up; if none, all that are not disabled. A failing check may be
/// wrong, and a connection that may fail is better than rejecting all mail.
#[must_use]
pub(super) fn eligible(candidates: &[Candidate]) -> Vec<usize> {
    let kinds: [fn(&Candidate) -> bool; 4] =
        [|it| it.up && !it.backup, |it| it.up && it.backup, |it| !it.backup, |it| it.backup];
    let of_kind = |kind: fn(&Candidate) -> bool| -> Vec<usize> {
        let fits = |(_, it): &(usize, &Candidate)| it.is_selectable() && kind(it);
        candidates.iter().enumerate().filter(fits).map(|(index, _)| index).collect()
    };
    kinds.into_iter().map(of_kind).find(|indices| !indices.is_empty()).unwrap_or_default()
}

/// The backends to try after all eligible ones failed: the backups that are up.
#[must_use]
pub(super) fn fallbacks(candidates: &[Candidate], eligible: &[usize]) -> Vec<usize> {
    let fits = |(index, it): &(usize, &Candidate)| it.is_selectable() && it.up && !eligible.contains(index);
    candidates.iter().enumerate().filter(fits).map(|(index, _)| index).collect()
}

/// Smooth weighted round robin, as in nginx: spreads connections by weight, evenly over time. With
/// weights 5, 1 and 1 the order is a a b a c a a; a random choice would often repeat one backend.
#[derive(Clone, Debug, Default)]
pub(super) struct SmoothWeightedRoundRobin {
    /// By candidate.
    current_weights: Vec<i64>,
}

impl SmoothWeightedRoundRobin {
    /// Moves the next backend to the front; the others follow in their order.
    pub(super) fn rotate(&mut self, candidates: &[Candidate], eligible: &mut [usize]) {
        if eligible.len() < 2 {
            return;
        }
        self.current_weights.resize(candidates.len(), 0);
        let weight = |index: usize| candidates.get(index).map_or(0, |it| i64::from(it.weight));
        let total: i64 = eligible.iter().map(|index| weight(*index)).sum();
        let mut best: Option<(usize, i64)> = None;
        for (position, index) in eligible.iter().enumerate() {
            let Some(current) = self.current_weights.get_mut(*index) else { continue };
            *current += weight(*index);
            if best.is_none_or(|(_, most)| *current > most) {
                best = Some((position, *current));
            }
        }
        let Some((position, _)) = best else { return };
        if let Some(current) = eligible.get(position).and_then(|index| self.current_weights.get_mut(*index)) {
            *current -= total;
        }
        if let Some(front) = eligible.get_mut(..=position) {
            front.rotate_right(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Candidate =
        Candidate { weight: 1, backup: false, up: true, disabled: false, active: 0, hash: 0 };
    const DOWN: Candidate = Candidate { up: false, ..PLAIN };
    const DISABLED: Candidate = Candidate { up: false, disabled: true, ..PLAIN };
    const BACKUP: Candidate = Candidate { backup: true, ..PLAIN };
    const BACKUP_DOWN: Candidate = Candidate { up: false, ..BACKUP };
    const NEVER: Candidate = Candidate { weight: 0, ..PLAIN };

    #[test]
    fn backups_follow_primaries_and_the_last_resort_is_all_enabled_backends() {
        let cases: &[(&[Candidate], &[usize], &[usize])] = &[
            (&[PLAIN, PLAIN, BACKUP], &[0, 1], &[2]),
            (&[DOWN, PLAIN, BACKUP], &[1], &[2]),
            (&[DOWN, DOWN, BACKUP], &[2], &[]),
            (&[DISABLED, DOWN, BACKUP_DOWN], &[1], &[]),
            (&[DISABLED, DISABLED, BACKUP_DOWN], &[2], &[]),
            (&[DISABLED, DISABLED], &[], &[]),
            (&[NEVER, PLAIN], &[1], &[]),
            (&[NEVER, DOWN], &[1], &[]),
            (&[], &[], &[]),
        ];
        for (candidates, turn, reserve) in cases {
            let found = eligible(candidates);
            assert_eq!(found, *turn, "{candidates:?}");
            assert_eq!(fallbacks(candidates, &found), *reserve, "{candidates:?}");
        }
    }

    fn sequence(weights: &[u32], count: usize) -> Vec<usize> {
        let candidates: Vec<_> =
            weights.iter().map(|weight| Candidate { weight: *weight, ..PLAIN }).collect();
        let mut round_robin = SmoothWeightedRoundRobin::default();
        let next = |_| {
            let mut order = eligible(&candidates);
            round_robin.rotate(&candidates, &mut order);
            order[0]
        };
        (0..count).map(next).collect()
    }

    #[test]
    fn connections_follow_the_weights_evenly() {
        assert_eq!(sequence(&[1, 1, 1], 6), [0, 1, 2, 0, 1, 2]);
        assert_eq!(sequence(&[5, 1, 1], 7), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(sequence(&[7], 3), [0, 0, 0]);
        let many = sequence(&[300, 100, 0], 4000);
        let count = |of| many.iter().filter(|index| **index == of).count();
        assert_eq!([count(0), count(1), count(2)], [3000, 1000, 0]);
    }

    #[test]
    fn the_other_backends_keep_their_order() {
        let candidates = [PLAIN; 3];
        let mut round_robin = SmoothWeightedRoundRobin::default();
        let orders: Vec<_> = (0..3)
            .map(|_| {
                let mut order = eligible(&candidates);
                round_robin.rotate(&candidates, &mut order);
                order
            })
            .collect();
        assert_eq!(orders, [[0, 1, 2], [1, 0, 2], [2, 0, 1]]);
    }

    #[test]
    fn a_recovered_backend_gets_only_its_share() {
        let mut candidates = [PLAIN; 2];
        let mut round_robin = SmoothWeightedRoundRobin::default();
        let mut next = |candidates: &[Candidate]| {
            let mut order = eligible(candidates);
            round_robin.rotate(candidates, &mut order);
            order[0]
        };
        candidates[1].up = false;
        (0..100).for_each(|_| assert_eq!(next(&candidates), 0));
        candidates[1].up = true;
        let back: Vec<_> = (0..6).map(|_| next(&candidates)).collect();
        assert_eq!(back.iter().filter(|index| **index == 1).count(), 3, "{back:?}");
    }

    fn named(count: u64) -> Vec<Candidate> {
        (0..count).map(|number| Candidate { hash: stable_hash(&number.to_le_bytes(), 0), ..PLAIN }).collect()
    }

    fn of_source(candidates: &[Candidate], client: u32) -> Vec<usize> {
        let mut order = eligible(candidates);
        by_source(candidates, &mut order, IpAddr::V4(client.into()));
        order
    }

    #[test]
    fn the_backend_with_the_fewest_sessions_for_its_weight_is_first() {
        let of = |load: &[(u64, u32)]| {
            let candidate =
                |(active, weight): &(u64, u32)| Candidate { active: *active, weight: *weight, ..PLAIN };
            let candidates: Vec<_> = load.iter().map(candidate).collect();
            let mut order = eligible(&candidates);
            by_load(&candidates, &mut order);
            order
        };
        assert_eq!(of(&[(3, 1), (2, 1), (4, 1)]), [1, 0, 2]);
        assert_eq!(of(&[(3, 1), (3, 4), (3, 2)]), [1, 2, 0]);
        assert_eq!(of(&[(1, 1), (1, 1)]), [0, 1]);
        // Ten sessions at weight 1 and a hundred at weight 10 differ by what the next one adds.
        assert_eq!(of(&[(10, 1), (100, 10)]), [1, 0]);
        assert_eq!(of(&[(u64::MAX - 1, 1000), (0, 1)]), [1, 0]);
    }

    #[test]
    fn a_client_keeps_its_backend_and_its_second_one() {
        let candidates = named(5);
        for client in 0..500 {
            let order = of_source(&candidates, client);
            assert_eq!(order, of_source(&candidates, client));
            let mut without = candidates.clone();
            without[order[0]].up = false;
            assert_eq!(of_source(&without, client), order[1..]);
        }
        // An IPv4 address is the same whatever socket it came by.
        let ipv4 = std::net::Ipv4Addr::new(192, 0, 2, 7);
        let (mut one, mut other) = (eligible(&candidates), eligible(&candidates));
        by_source(&candidates, &mut one, ipv4.into());
        by_source(&candidates, &mut other, ipv4.to_ipv6_mapped().into());
        assert_eq!(one, other);
    }

    #[test]
    fn clients_spread_by_weight() {
        let mut candidates = named(3);
        candidates[1].weight = 2;
        let mut hits = [0; 3];
        (0..8000).for_each(|client| hits[of_source(&candidates, client)[0]] += 1);
        assert!((1800..2200).contains(&hits[0]) && (3700..4300).contains(&hits[1]), "{hits:?}");
    }
}
