//! Which backend each client gets: weighted Maglev hashing (Eisenbud et al., NSDI 2016, section
//! 3.4).
//!
//! The table depends only on the backends' names and weights. Every edge host with the same
//! configuration has the same one, and a backend that leaves moves hardly any other's clients.

use injector_common::inline::BackendTable;

use crate::backend::stable_hash;

/// A backend of a table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Member {
    /// Its name, which is the same on every edge: the address and port.
    pub(super) identity: String,
    /// Its share of the clients.
    pub(super) weight: u32,
    /// Its index in `BACKENDS`.
    pub(super) index: u16,
}

const SIZE: usize = BackendTable::SIZE as usize;

/// The order in which a member takes entries, and when it is its turn.
struct Turn {
    index: u16,
    weight: u64,
    /// It takes an entry in the first round whose number times the weight reaches this.
    due: u64,
    next: usize,
    step: usize,
}

/// The table of these backends; `None` if none has a weight.
pub(super) fn backend_table(members: &[Member]) -> Option<BackendTable> {
    let mut members: Vec<_> = members.iter().filter(|member| member.weight > 0).collect();
    members.sort();
    let heaviest = u64::from(members.iter().map(|member| member.weight).max()?);
    let turn = |member: &&Member| Turn {
        index: member.index,
        weight: u64::from(member.weight),
        due: heaviest,
        next: below(stable_hash(member.identity.as_bytes(), 1), SIZE),
        step: below(stable_hash(member.identity.as_bytes(), 2), SIZE - 1) + 1,
    };
    let mut turns: Vec<_> = members.iter().map(turn).collect();
    let mut taken = [false; SIZE];
    let mut table = BackendTable { backends: [0; BackendTable::PLACES] };
    let mut left = SIZE;
    for round in 1.. {
        for turn in &mut turns {
            if round * turn.weight < turn.due {
                continue;
            }
            if left == 0 {
                return Some(table);
            }
            turn.due += heaviest;
            // The size is a prime, so the steps reach every entry.
            while taken.get(turn.next) == Some(&true) {
                turn.next = (turn.next + turn.step) % SIZE;
            }
            if let (Some(taken), Some(entry)) = (taken.get_mut(turn.next), table.backends.get_mut(turn.next))
            {
                (*taken, *entry) = (true, turn.index);
            }
            left -= 1;
        }
    }
    None
}

fn below(hash: u64, limit: usize) -> usize {
    usize::try_from(hash % limit as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn member(number: usize, weight: u32, index: usize) -> Member {
        let identity = format!("192.0.2.{}:{}", number % 256, 2525 + number / 256);
        Member { identity, weight, index: u16::try_from(index).unwrap() }
    }

    fn members(weights: &[u32]) -> Vec<Member> {
        weights.iter().enumerate().map(|(number, weight)| member(number, *weight, number + 1)).collect()
    }

    /// The identity that each client gets.
    fn clients(members: &[Member]) -> Vec<String> {
        let table = backend_table(members).unwrap();
        let names: HashMap<_, _> = members.iter().map(|member| (member.index, &member.identity)).collect();
        table.backends[..SIZE].iter().map(|index| names[index].clone()).collect()
    }

    fn share(clients: &[String], member: &Member) -> f64 {
        let count = clients.iter().filter(|identity| **identity == member.identity).count();
        count as f64 / SIZE as f64
    }

    #[test]
    fn without_backends_there_is_no_table() {
        assert!(backend_table(&[]).is_none() && backend_table(&members(&[0, 0])).is_none());
        assert_eq!(clients(&members(&[0, 1])), vec!["192.0.2.1:2525"; SIZE]);
    }

    /// What is written here must stay: other edges, of other versions, have the same tables.
    #[test]
    fn the_table_is_the_same_in_every_version() {
        let clients = clients(&members(&[1, 1, 2]));
        let sum = clients.iter().fold(0, |sum, identity| stable_hash(identity.as_bytes(), sum));
        assert_eq!(sum, 4_868_279_513_777_521_941);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn shares_follow_the_weights(weights in prop::collection::vec(0_u32..=256, 1..40)) {
            let members = members(&weights);
            let total: u32 = weights.iter().sum();
            prop_assume!(total > 0);
            let clients = clients(&members);
            for member in &members {
                let wanted = f64::from(member.weight) / f64::from(total);
                prop_assert!((share(&clients, member) - wanted).abs() < 0.001, "{member:?}: {wanted}");
            }
        }

        #[test]
        fn the_order_and_the_indices_do_not_matter(
            weights in prop::collection::vec(1_u32..=16, 1..20),
            by in 0_usize..20,
        ) {
            let members = members(&weights);
            let mut others = members.clone();
            others.rotate_left(by % weights.len());
            for (number, member) in others.iter_mut().enumerate() {
                member.index = u16::try_from(1000 - number).unwrap();
            }
            prop_assert_eq!(clients(&members), clients(&others));
        }

        #[test]
        fn a_backend_that_leaves_moves_its_own_clients(
            count in 2_usize..30,
            leaves in 0_usize..30,
        ) {
            let members = members(&vec![1; count]);
            let mut rest = members.clone();
            let gone = rest.remove(leaves % count);
            let (before, after) = (clients(&members), clients(&rest));
            let moved = before.iter().zip(&after).filter(|(before, after)| {
                **before != gone.identity && before != after
            });
            prop_assert!(moved.count() < SIZE / 20);
        }
    }
}
