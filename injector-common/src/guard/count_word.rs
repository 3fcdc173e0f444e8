//! The counts of a source in one word, which processors change without a lock.
//!
//! An element of a hash map may be another key's the moment after it was removed, while a program that found it still has its address.
//! So the word says whose it is, and a word whose counts are zero dies before its element is removed:
//!
//! - entering: find the element; if its word is the source's, exchange it for one more. If there is no element, insert a dead
//!   one; who succeeds makes it alive, with one. If the word is dead or another's, try again.
//! - moving, leaving: what is counted keeps the element, so one addition does it. Who then finds the counts zero exchanges the word for
//!   [`CountWord::DEAD`]; who succeeds, and no other, removes the element.
//!
//! `tests/guard_counts.rs` tries every interleaving of several processors.

use super::{SourceCounts, SourceKey};
use crate::inline::mix;

/// Connections of a source with engine inline (map `SOURCE_COUNTS`): handshakes, established connections, and of which source.
#[repr(transparent)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CountWord(pub u64);

/// What is counted.
#[repr(u64)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Counted {
    /// A handshake.
    Pending = 1,
    /// An established connection.
    Established = 1 << CountWord::BITS,
}

/// What entering does with a word that it has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enter {
    /// Exchanges it for this one.
    Exchange(CountWord),
    /// Looks for the source's again.
    Retry,
    /// Nothing: the source has as many connections as it may.
    Full,
}

impl Counted {
    /// What has this number, of which a BPF function gets and returns words only.
    #[must_use]
    #[inline(always)]
    pub const fn of(number: u64) -> Self {
        if number == Self::Pending as u64 { Self::Pending } else { Self::Established }
    }
}

/// Where a connection counts ([`Flow::source`](crate::inline::Flow::source)), and as what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourcePlaces(pub u64);

impl SourcePlaces {
    const OWN: u64 = 1;
    const ALL: u64 = 2;
    const ESTABLISHED: u64 = 4;

    /// Nowhere yet.
    #[must_use]
    #[inline(always)]
    pub const fn of(what: Counted) -> Self {
        match what {
            Counted::Pending => Self(0),
            Counted::Established => Self(Self::ESTABLISHED),
        }
    }

    /// Also among those of its listener.
    #[must_use]
    #[inline(always)]
    pub const fn with_own(self) -> Self {
        Self(self.0 | Self::OWN)
    }

    /// Also among those of all listeners.
    #[must_use]
    #[inline(always)]
    pub const fn with_all(self) -> Self {
        Self(self.0 | Self::ALL)
    }

    /// The same, as an established connection.
    #[must_use]
    #[inline(always)]
    pub const fn established(self) -> Self {
        Self(self.0 | Self::ESTABLISHED)
    }

    /// Whether it counts among those of its listener.
    #[must_use]
    #[inline(always)]
    pub const fn has_own(self) -> bool {
        self.0 & Self::OWN != 0
    }

    /// Whether it counts among those of all listeners.
    #[must_use]
    #[inline(always)]
    pub const fn has_all(self) -> bool {
        self.0 & Self::ALL != 0
    }

    /// As what it counts.
    #[must_use]
    #[inline(always)]
    pub const fn what(self) -> Counted {
        if self.0 & Self::ESTABLISHED != 0 { Counted::Established } else { Counted::Pending }
    }
}

impl CountWord {
    /// The word of an element that is about to be removed.
    pub const DEAD: Self = Self(0);

    /// For each of the two counts.
    const BITS: u32 = 20;
    /// The most that is counted of each.
    pub const MAX: u32 = (1 << Self::BITS) - 1;
    const MASK: u64 = Self::MAX as u64;
    const OWNER: u64 = !(Self::MASK << Self::BITS | Self::MASK);

    /// That of a source with nothing counted. Two sources may have the same owner's bits; then they are distinct only as long as none of
    /// their elements is removed and used again within the moment between two instructions.
    #[must_use]
    #[inline(always)]
    pub const fn of(key: &SourceKey) -> Self {
        let [w0, w1, w2, w3] = key.ip;
        let hash = mix(w0 ^ mix(w1 ^ mix(w2 ^ mix(w3 ^ mix(key.listener)))));
        // Never dead.
        Self((hash as u64 | 1) << (2 * Self::BITS))
    }

    /// The word that is inserted: with one more.
    #[must_use]
    #[inline(always)]
    pub const fn with(self, what: Counted) -> Self {
        Self(self.0.wrapping_add(what as u64))
    }

    /// What leaving adds.
    #[must_use]
    #[inline(always)]
    pub const fn leave(what: Counted) -> u64 {
        (what as u64).wrapping_neg()
    }

    /// What it adds when the handshake is finished.
    pub const ESTABLISH: u64 = (Counted::Established as u64).wrapping_sub(Counted::Pending as u64);

    /// Handshakes.
    #[must_use]
    #[inline(always)]
    pub const fn pending(self) -> u32 {
        (self.0 & Self::MASK) as u32
    }

    /// Established connections.
    #[must_use]
    #[inline(always)]
    pub const fn established(self) -> u32 {
        (self.0 >> Self::BITS & Self::MASK) as u32
    }

    /// As counts, with this many sessions of the other engines.
    #[must_use]
    #[inline(always)]
    pub const fn counts(self, sessions: u32) -> SourceCounts {
        SourceCounts { pending: self.pending(), established: self.established(), sessions }
    }

    /// Decides about one more in `self`, the word that was found for the source whose empty word is `own`. `most` is the limit less what the
    /// other engines have; `u32::MAX` if there is none.
    #[must_use]
    #[inline(always)]
    pub const fn enter(self, own: Self, what: Counted, most: u32) -> Enter {
        if self.0 & Self::OWNER != own.0 {
            return Enter::Retry;
        }
        let full = self.pending() == Self::MAX || self.established() == Self::MAX;
        if full || self.pending() + self.established() >= most {
            return Enter::Full;
        }
        Enter::Exchange(self.with(what))
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    extern crate std;

    const KEY: SourceKey = SourceKey { ip: [0, 0, 0xFFFF_u32.to_be(), 1], listener: 3 };

    #[test]
    fn a_word_counts_both_kinds_and_says_whose_it_is() {
        let own = CountWord::of(&KEY);
        assert_ne!(own, CountWord::DEAD);
        let word = own.with(Counted::Pending).with(Counted::Pending);
        assert_eq!((word.pending(), word.established()), (2, 0));
        let word = CountWord(word.0.wrapping_add(CountWord::ESTABLISH));
        assert_eq!((word.pending(), word.established()), (1, 1));
        assert_eq!(word.counts(7), SourceCounts { pending: 1, established: 1, sessions: 7 });
        let left = [Counted::Pending, Counted::Established]
            .into_iter()
            .fold(word, |word, what| CountWord(word.0.wrapping_add(CountWord::leave(what))));
        assert_eq!(left, own);
    }

    #[test]
    fn places_say_where_and_as_what_a_connection_counts() {
        let none = SourcePlaces::of(Counted::Pending);
        let both = none.with_own().with_all();
        assert!(both.has_own() && both.has_all() && !none.has_all() && !none.with_all().has_own());
        assert_eq!((both.what(), both.established().what()), (Counted::Pending, Counted::Established));
        assert_eq!(SourcePlaces::of(Counted::Established).with_own().with_all(), both.established());
        // What counts nowhere is zero, as in a flow that is new.
        assert_eq!(none, SourcePlaces(0));
        for what in [Counted::Pending, Counted::Established] {
            assert_eq!(Counted::of(what as u64), what);
        }
    }

    #[test]
    fn others_words_and_dead_ones_are_left_alone() {
        let own = CountWord::of(&KEY);
        let other = CountWord::of(&SourceKey { listener: 0, ..KEY });
        assert_ne!(own, other);
        for word in [other, other.with(Counted::Pending), CountWord::DEAD] {
            assert_eq!(word.enter(own, Counted::Pending, u32::MAX), Enter::Retry);
        }
        assert_eq!(own.enter(own, Counted::Pending, 1), Enter::Exchange(own.with(Counted::Pending)));
    }

    #[test]
    fn neither_the_limit_nor_the_bits_are_exceeded() {
        let own = CountWord::of(&KEY);
        let two = own.with(Counted::Pending).with(Counted::Established);
        assert_eq!(two.enter(own, Counted::Pending, 2), Enter::Full);
        assert_ne!(two.enter(own, Counted::Pending, 3), Enter::Full);
        let most = CountWord(own.0 | u64::from(CountWord::MAX));
        assert_eq!(most.enter(own, Counted::Established, u32::MAX), Enter::Full);
    }

    proptest! {
        /// Whatever its address hashes to: a dead word would be removed under those that it counts.
        #[test]
        fn no_source_has_the_dead_word(ip: [u32; 4], listener: u32, hashes_to_zero: bool) {
            let [w0, rest @ ..] = ip;
            let w0 = if hashes_to_zero { rest.iter().rev().fold(mix(listener), |hash, word| mix(word ^ hash)) } else { w0 };
            let own = CountWord::of(&SourceKey { ip: [w0, rest[0], rest[1], rest[2]], listener });
            prop_assert_ne!(own, CountWord::DEAD);
            prop_assert_eq!((own.pending(), own.established()), (0, 0));
        }

        /// Words of 23 bits: of a hundred sources, hardly two have the same.
        #[test]
        fn sources_have_words_of_their_own(ip: [u32; 4]) {
            let [w0, w1, w2, w3] = ip;
            let key = |host: u32| SourceKey { ip: [w0, w1, w2, w3.wrapping_add(host)], listener: 1 };
            let mut words: Vec<_> = (0..100).map(|host| CountWord::of(&key(host)).0).collect();
            words.sort_unstable();
            words.dedup();
            prop_assert!(words.len() >= 98, "{}", words.len());
        }
    }
}
