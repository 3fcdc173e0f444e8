//! From decisions to changes of the table. Pure.
//!
//! The LAPI sends decisions of each type on their own: of a network with a `ban` and a `captcha`, both of which ban here,
//! one may end while the other goes on. Captchas are rare, so only their networks are remembered.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use super::{decision::Remediation, stream::New};
use crate::{config::Network, guard::WantedBan};

/// The networks that have a decision of type `captcha`.
#[derive(Debug, Default)]
pub(super) struct Captchas(HashMap<Network, Decisions>);

/// The decisions of one network.
#[derive(Clone, Debug, Default)]
struct Decisions {
    ban: Option<(u64, Arc<str>)>,
    captcha: Option<(u64, Arc<str>)>,
}

impl Decisions {
    fn set(&mut self, new: &New) {
        let decision = Some((new.until_ns, Arc::clone(&new.reason)));
        match new.remediation {
            Remediation::Ban => self.ban = decision,
            Remediation::Captcha => self.captcha = decision,
        }
    }

    /// Both together: the one that ends last.
    fn wanted(&self, network: Network, now_ns: u64) -> Option<WantedBan> {
        let both = [&self.ban, &self.captcha].into_iter().flatten();
        let (until_ns, reason) = both.max_by_key(|(until_ns, _)| *until_ns)?.clone();
        (until_ns > now_ns).then_some(WantedBan { network, until_ns, reason })
    }
}

/// A change of the table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) set: Vec<WantedBan>,
    pub(super) remove: Vec<Network>,
}

impl Captchas {
    /// The bans of all decisions. One network may be there more than once.
    pub(super) fn all(&mut self, new: Vec<New>) -> Vec<WantedBan> {
        self.0.clear();
        for captcha in new.iter().filter(|new| new.remediation == Remediation::Captcha) {
            self.0.entry(captcha.network).or_default().set(captcha);
        }
        for ban in new.iter().filter(|new| new.remediation == Remediation::Ban) {
            if let Some(decisions) = self.0.get_mut(&ban.network) {
                decisions.set(ban);
            }
        }
        new.into_iter()
            .map(|New { network, until_ns, reason, .. }| WantedBan { network, until_ns, reason })
            .collect()
    }

    /// What changes. `present` is the ban of a network in the table.
    pub(super) fn change(
        &mut self,
        deleted: &[(Network, Remediation)],
        new: &[New],
        present: impl Fn(Network) -> Option<WantedBan>,
        now_ns: u64,
    ) -> Change {
        let mut changed: HashMap<Network, Option<WantedBan>> = HashMap::new();
        // First, because a decision that was replaced is in both lists.
        for (network, remediation) in deleted {
            let left = match (self.0.get_mut(network), remediation) {
                // Of a decision that was ignored, or is over.
                (None, Remediation::Captcha) => continue,
                (None, Remediation::Ban) => None,
                (Some(decisions), Remediation::Ban) => {
                    decisions.ban = None;
                    decisions.wanted(*network, now_ns)
                }
                (Some(decisions), Remediation::Captcha) => {
                    decisions.captcha = None;
                    decisions.wanted(*network, now_ns)
                }
            };
            changed.insert(*network, left);
        }
        for new in new {
            let network = new.network;
            let decisions = match (self.0.entry(network), new.remediation) {
                (Entry::Occupied(entry), _) => entry.into_mut(),
                (Entry::Vacant(_), Remediation::Ban) => {
                    let New { until_ns, reason, .. } = new.clone();
                    changed.insert(network, Some(WantedBan { network, until_ns, reason }));
                    continue;
                }
                (Entry::Vacant(entry), Remediation::Captcha) => {
                    let before = changed.get(&network).cloned().unwrap_or_else(|| present(network));
                    let ban = before.map(|ban| (ban.until_ns, ban.reason));
                    entry.insert(Decisions { ban, captcha: None })
                }
            };
            decisions.set(new);
            changed.insert(network, decisions.wanted(network, now_ns));
        }
        self.0.retain(|_, decisions| {
            decisions.captcha.as_ref().is_some_and(|(until_ns, _)| *until_ns > now_ns)
        });
        let mut change = Change::default();
        for (network, wanted) in changed {
            match wanted {
                Some(ban) => change.set.push(ban),
                None => change.remove.push(network),
            }
        }
        change
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use Remediation::{Ban, Captcha};

    fn network(at: u8) -> Network {
        format!("192.0.2.{at}").parse().unwrap()
    }

    fn new(at: u8, remediation: Remediation, until_ns: u64) -> New {
        New { network: network(at), remediation, until_ns, reason: format!("{remediation:?}").into() }
    }

    #[test]
    fn a_decision_that_is_replaced_is_set_and_not_removed() {
        let mut captchas = Captchas::default();
        let change =
            captchas.change(&[(network(1), Ban), (network(2), Ban)], &[new(1, Ban, 50)], |_| None, 10);
        let ends: Vec<_> = change.set.iter().map(|ban| (ban.network, ban.until_ns)).collect();
        assert_eq!((ends, change.remove), (vec![(network(1), 50)], vec![network(2)]));
    }

    #[test]
    fn a_deleted_captcha_that_was_never_a_ban_changes_nothing() {
        let change = Captchas::default().change(&[(network(1), Captcha)], &[], |_| None, 10);
        assert_eq!(change, Change::default());
    }

    #[derive(Clone, Debug)]
    enum Step {
        All(Vec<(u8, bool, u64)>),
        Delta(Vec<(u8, bool)>, Vec<(u8, bool, u64)>),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let new = proptest::collection::vec((0u8..3, any::<bool>(), 1u64..100), 0..4);
        let deleted = proptest::collection::vec((0u8..3, any::<bool>()), 0..4);
        let step = prop_oneof![
            1 => new.clone().prop_map(Step::All),
            6 => (deleted, new).prop_map(|(deleted, new)| Step::Delta(deleted, new)),
        ];
        proptest::collection::vec(step, 1..12)
    }

    const fn kind(captcha: bool) -> Remediation {
        if captcha { Captcha } else { Ban }
    }

    proptest! {
        /// After every answer a network is banned as long as one of its decisions is there: as a table of all decisions
        /// would have it.
        #[test]
        fn the_table_is_what_all_decisions_together_say(steps in steps()) {
            let mut captchas = Captchas::default();
            let mut table: HashMap<Network, WantedBan> = HashMap::new();
            let mut oracle: HashMap<(Network, bool), u64> = HashMap::new();
            let mut now = 0;
            for step in steps {
                now += 5;
                table.retain(|_, ban| ban.until_ns > now);
                oracle.retain(|_, until| *until > now);
                let news = |list: &[(u8, bool, u64)]| -> Vec<New> {
                    list.iter().map(|(at, captcha, lasts)| new(*at, kind(*captcha), now + lasts)).collect()
                };
                match step {
                    Step::All(mut list) => {
                        // The LAPI sends one decision of a type for a network.
                        list.sort_unstable();
                        list.dedup_by_key(|(at, captcha, _)| (*at, *captcha));
                        oracle = list.iter().map(|(at, captcha, lasts)| ((network(*at), *captcha), now + lasts)).collect();
                        table.clear();
                        for ban in captchas.all(news(&list)) {
                            let longer = table.get(&ban.network).is_none_or(|there| there.until_ns < ban.until_ns);
                            if longer {
                                table.insert(ban.network, ban);
                            }
                        }
                    }
                    Step::Delta(deleted, list) => {
                        for (at, captcha) in &deleted {
                            oracle.remove(&(network(*at), *captcha));
                        }
                        for (at, captcha, lasts) in &list {
                            oracle.insert((network(*at), *captcha), now + lasts);
                        }
                        let deleted: Vec<_> = deleted.iter().map(|(at, captcha)| (network(*at), kind(*captcha))).collect();
                        let change = captchas.change(&deleted, &news(&list), |network| table.get(&network).cloned(), now);
                        for network in change.remove {
                            table.remove(&network);
                        }
                        table.extend(change.set.into_iter().map(|ban| (ban.network, ban)));
                    }
                }
                let mut expected: HashMap<Network, u64> = HashMap::new();
                for ((network, _), until) in &oracle {
                    let end = expected.entry(*network).or_default();
                    *end = (*end).max(*until);
                }
                let got: HashMap<_, _> = table.iter().map(|(network, ban)| (*network, ban.until_ns)).collect();
                prop_assert_eq!(got, expected);
                let live = oracle.keys().filter(|(_, captcha)| *captcha).count();
                prop_assert_eq!(captchas.0.len(), live);
            }
        }
    }
}
