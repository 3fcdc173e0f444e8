//! Sources that were looked up and are not banned.

/// How many are remembered for each processor.
pub const NOT_BANNED_SLOTS: usize = 1 << SLOT_BITS;

const SLOT_BITS: u32 = 8;

/// A source that was not banned (map `NOT_BANNED`), so that its next packets need no lookup: a session has several.
///
/// Programs of one processor share an entry, and with `PREEMPT_RT` one of them can interrupt another while it reads or writes it. So each
/// word is read and written as a whole, and the last one tells whether the others belong together.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NotBanned {
    /// The halves of the address.
    pub source: [u64; 2],
    /// A number of them and of the generation of the bans ([`Settings::generation`](super::Settings::generation)).
    pub tag: u64,
}

impl NotBanned {
    /// What is remembered of a source that no ban of this generation concerns.
    #[must_use]
    #[inline(always)]
    pub const fn new(source: [u64; 2], generation: u64) -> Self {
        Self { source, tag: mix(source) ^ generation }
    }

    /// Whether this is said of this source, by bans of this generation.
    #[must_use]
    #[inline(always)]
    pub const fn holds(&self, source: [u64; 2], generation: u64) -> bool {
        let [high, low] = self.source;
        high == source[0] && low == source[1] && self.tag == mix(source) ^ generation
    }

    /// Where a source is remembered.
    #[must_use]
    #[inline(always)]
    pub const fn slot(source: [u64; 2]) -> u32 {
        // The uppermost bits, to which a product carries all others.
        (mix(source) >> (u64::BITS - SLOT_BITS)) as u32
    }
}

/// One number of both halves. With one half given, it tells all values of the other one apart: of two entries of a generation, no
/// mixture is an entry of a third source.
const fn mix([high, low]: [u64; 2]) -> u64 {
    // Odd numbers (the golden ratio; MurmurHash3's finalizer): multiplying by them loses nothing.
    const HIGH: u64 = 0x9E37_79B9_7F4A_7C15;
    const BOTH: u64 = 0xFF51_AFD7_ED55_8CCD;
    (high.wrapping_mul(HIGH) ^ low).wrapping_mul(BOTH)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Few values, so that halves are equal often.
    fn half() -> impl Strategy<Value = u64> {
        prop_oneof![0..3_u64, any::<u64>(), Just(0xFFFF_0000_0000)]
    }

    fn source() -> impl Strategy<Value = [u64; 2]> {
        [half(), half()]
    }

    proptest! {
        #[test]
        fn it_holds_for_its_source_and_generation_alone(
            of in source(), generation in half(), asked in source(), now in half(),
        ) {
            let entry = NotBanned::new(of, generation);
            prop_assert!(entry.holds(of, generation));
            prop_assert_eq!(entry.holds(asked, now), (of, generation) == (asked, now));
        }

        /// A generation in which the numbers of both are the same.
        #[test]
        fn addresses_are_compared_and_not_their_numbers_alone(of in source(), other in half(), generation in half(), low: bool) {
            let asked = if low { [of[0], other] } else { [other, of[1]] };
            let now = generation ^ mix(of) ^ mix(asked);
            prop_assert_eq!(NotBanned::new(of, generation).holds(asked, now), asked == of);
        }

        #[test]
        fn a_mixture_of_two_entries_says_nothing_of_a_third_source(
            one in source(), other in source(), asked in source(), generation in half(), from in [any::<bool>(); 3],
        ) {
            let entries = [one, other].map(|source| NotBanned::new(source, generation));
            let [high, low, tag] = from.map(|other| entries[usize::from(other)]);
            let mixture = NotBanned { source: [high.source[0], low.source[1]], tag: tag.tag };
            for asked in [asked, mixture.source] {
                if mixture.holds(asked, generation) {
                    prop_assert!(asked == one || asked == other);
                }
            }
        }
    }

    #[test]
    fn an_unused_entry_says_nothing() {
        // Without bans, nothing is asked.
        assert!((1..1000).all(|generation| !NotBanned::default().holds([0, 0], generation)));
    }

    #[test]
    fn neighbours_are_spread() {
        // Words in network order, on a little-endian machine: 192.0.2.x, and 2001:db8:x::1.
        let ipv4 = |host: u64| [0, 0xFFFF_0000_0000_0000 | (host << 24) | 0x02_00C0];
        let ipv6 = |network: u64| [0xB80D_0120_0000_0000 | (network << 8), 0x0100_0000];
        for source in [&ipv4 as &dyn Fn(u64) -> [u64; 2], &ipv6] {
            let mut used = [false; NOT_BANNED_SLOTS];
            for number in 0..256 {
                used[NotBanned::slot(source(number)) as usize] = true;
            }
            let count = used.iter().filter(|used| **used).count();
            assert!(count > 128, "{count}");
        }
    }
}
