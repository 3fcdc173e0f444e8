//! Remembers which sources are not banned, as the programs do (`injector-ebpf/src/guard/not_banned.rs`).
//!
//! A lookup in a large table waits for memory a dozen times, each time for the one before.

use std::net::IpAddr;

use injector_common::guard::{NOT_BANNED_SLOTS, NotBanned};

use super::handle::Guard;

/// Sources that an accept loop has looked up.
#[derive(Debug)]
pub struct NotBannedSources(Box<[NotBanned]>);

impl Default for NotBannedSources {
    fn default() -> Self {
        Self(vec![NotBanned::default(); NOT_BANNED_SLOTS].into_boxed_slice())
    }
}

impl NotBannedSources {
    /// As [`Guard::is_banned`].
    pub fn is_banned(&mut self, guard: &Guard, source: IpAddr) -> bool {
        let halves = halves(source);
        // Not after the lookup: a change that is made during it has another one.
        let generation = guard.generation();
        let slot = usize::try_from(NotBanned::slot(halves)).unwrap_or(0);
        let Some(entry) = self.0.get_mut(slot) else { return guard.is_banned(source) };
        if entry.holds(halves, generation) {
            return false;
        }
        let is_banned = guard.is_banned(source);
        if !is_banned {
            *entry = NotBanned::new(halves, generation);
        }
        is_banned
    }
}

fn halves(source: IpAddr) -> [u64; 2] {
    let bits = match source {
        IpAddr::V4(source) => source.to_ipv6_mapped().to_bits(),
        IpAddr::V6(source) => source.to_bits(),
    };
    #[expect(clippy::cast_possible_truncation, reason = "its halves")]
    [(bits >> 64) as u64, bits as u64]
}

#[cfg(test)]
mod tests {
    use injector_common::guard::Ban;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        config::Network,
        guard::{Origin, Protection, WantedBan},
    };

    #[derive(Clone, Debug)]
    enum Step {
        Ban(Network),
        Unban(Network),
        Allow(Vec<Network>),
        Ask(IpAddr),
    }

    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            (0..4_u8).prop_map(|host| [192, 0, 2, host].into()),
            (0..4_u8).prop_map(|host| std::net::Ipv4Addr::from([192, 0, 2, host]).to_ipv6_mapped().into()),
            (0..2_u16, 0..2_u16)
                .prop_map(|(network, host)| [0x2001, 0xDB8, 0, network, 0, 0, 0, host].into()),
        ]
    }

    fn network() -> impl Strategy<Value = Network> {
        (address(), prop_oneof![Just(128_u8), Just(64), Just(31), Just(24), Just(0)])
            .prop_map(|(address, prefix)| Network::around(address.to_canonical(), prefix))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            2 => network().prop_map(Step::Ban),
            2 => network().prop_map(Step::Unban),
            1 => proptest::collection::vec(network(), 0..3).prop_map(Step::Allow),
            8 => address().prop_map(Step::Ask),
        ]
    }

    proptest! {
        #[test]
        fn what_was_looked_up_before_changes_no_answer(steps in proptest::collection::vec(step(), 1..40)) {
            let guard = Guard::new(None, 100);
            let mut sources = NotBannedSources::default();
            for step in steps {
                match step {
                    Step::Ban(network) => {
                        let ban = WantedBan { network, until_ns: Ban::FOREVER, reason: "tried".into() };
                        guard.change(Origin::Command, [ban], Vec::new());
                    }
                    Step::Unban(network) => {
                        guard.change(Origin::Command, [], vec![network]);
                    }
                    Step::Allow(networks) => {
                        let allowed: Vec<_> = networks.into_iter().map(|network| (network, Protection::Allow)).collect();
                        guard.set_protected(&allowed);
                    }
                    Step::Ask(source) => {
                        // Also what was remembered a moment ago.
                        for _ in 0..2 {
                            prop_assert_eq!(sources.is_banned(&guard, source), guard.is_banned(source), "{}", source);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn an_unused_place_says_nothing_of_a_source() {
        let guard = Guard::new(None, 100);
        // Also not of bans that an earlier daemon left, before any change.
        assert!(!NotBanned::default().holds([0, 0], guard.generation()));
        let network: Network = "::/0".parse().unwrap();
        guard.change(
            Origin::Command,
            [WantedBan { network, until_ns: Ban::FOREVER, reason: "tried".into() }],
            Vec::new(),
        );
        assert!(NotBannedSources::default().is_banned(&guard, "::".parse().unwrap()));
    }

    #[test]
    fn a_source_is_looked_up_once() {
        let guard = Guard::new(None, 100);
        let mut sources = NotBannedSources::default();
        let source: IpAddr = "192.0.2.7".parse().unwrap();
        assert!(!sources.is_banned(&guard, source));
        let [entry] =
            sources.0.iter().filter(|entry| **entry != NotBanned::default()).collect::<Vec<_>>()[..]
        else {
            panic!("one entry");
        };
        assert!(entry.holds(halves(source), guard.generation()));
    }
}
