//! The options of a SYN (RFC 9293, section 3.1).

/// Rewrites the options of a SYN or SYN-ACK: no larger MSS than both ways carry, and no MPTCP, which would name the client's own
/// addresses (RFC 8684; without it both ends fall back to TCP).
///
/// Programs have no loop over bytes at places that vary, so the caller feeds it every byte in its order, twice.
#[derive(Clone, Copy, Debug)]
pub struct OptionRewriter {
    /// How many bytes of options there are; the rest is not looked at.
    len: u32,
    /// The largest MSS.
    max_mss: u32,
    /// The kind of the option that the next byte belongs to.
    kind: u8,
    /// How many of its bytes follow; [`OptionRewriter::LENGTH`] if its length comes next.
    rest: u32,
    /// Where the MSS stands; 0 if there is none, for its kind and length come first.
    mss_at: u32,
    /// The MSS.
    mss: u32,
}

impl OptionRewriter {
    /// The most bytes of options.
    pub const MAX: usize = 40;

    const LENGTH: u32 = 1 << 8;
    const END: u8 = 0;
    const NOP: u8 = 1;
    const MSS: u8 = 2;
    const MPTCP: u8 = 30;

    /// For `len` bytes of options.
    #[must_use]
    #[inline(always)]
    pub const fn new(len: u32, max_mss: u32) -> Self {
        Self { len, max_mss, kind: Self::NOP, rest: 0, mss_at: 0, mss: 0 }
    }

    /// First all bytes: returns what stands in their place.
    #[must_use]
    #[inline(always)]
    pub const fn first(&mut self, at: u32, byte: u8) -> u8 {
        if at >= self.len || (self.kind == Self::END && self.rest == 0) {
            return byte;
        }
        if self.rest == 0 {
            self.kind = byte;
            if byte != Self::END && byte != Self::NOP {
                self.rest = Self::LENGTH;
            }
        } else if self.rest == Self::LENGTH {
            // An option that claims to be shorter than its kind and length ends the options (tcp_parse_options).
            if byte < 2 {
                (self.kind, self.rest) = (Self::END, 0);
                return byte;
            }
            self.rest = byte as u32 - 2;
            if self.kind == Self::MSS && byte == 4 && at + 2 < self.len {
                self.mss_at = at + 1;
            }
        } else {
            self.rest -= 1;
            if at == self.mss_at {
                self.mss = (byte as u32) << 8;
            } else if self.mss_at != 0 && at == self.mss_at + 1 {
                self.mss |= byte as u32;
            }
        }
        if self.kind == Self::MPTCP { Self::NOP } else { byte }
    }

    /// Then all bytes as they are by now, again.
    #[must_use]
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the bytes of a 16-bit number")]
    pub const fn second(&self, at: u32, byte: u8) -> u8 {
        if self.mss_at == 0 || self.mss <= self.max_mss {
            return byte;
        }
        if at == self.mss_at {
            (self.max_mss >> 8) as u8
        } else if at == self.mss_at + 1 {
            self.max_mss as u8
        } else {
            byte
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    extern crate std;

    fn rewrite(options: &[u8], max_mss: u32) -> Vec<u8> {
        let len = u32::try_from(options.len()).unwrap();
        let mut rewriter = OptionRewriter::new(len, max_mss);
        let first: Vec<_> = (0..).zip(options).map(|(at, byte)| rewriter.first(at, *byte)).collect();
        (0..).zip(first).map(|(at, byte)| rewriter.second(at, byte)).collect()
    }

    /// An option as a sender writes it.
    fn option() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            Just([1].to_vec()),
            any::<u16>().prop_map(|mss| [&[2, 4][..], &mss.to_be_bytes()].concat()),
            Just([4, 2].to_vec()),
            Just([3, 3, 7].to_vec()),
            any::<[u8; 8]>().prop_map(|times| [&[8, 10][..], &times].concat()),
            any::<[u8; 10]>().prop_map(|join| [&[30, 12][..], &join].concat()),
            any::<[u8; 2]>().prop_map(|capable| [&[30, 4][..], &capable].concat()),
        ]
    }

    proptest! {
        #[test]
        fn only_the_mss_and_mptcp_change(
            options in prop::collection::vec(option(), 0..8),
            max_mss in 88_u32..=65_495,
        ) {
            let mut options = options;
            while options.concat().len() > OptionRewriter::MAX { options.pop(); }
            let mut clamped = false;
            let expected = options.iter().rev().map(|option| match option[..] {
                [2, 4, high, low] if !clamped => {
                    // The last one counts, as for the receiver.
                    clamped = true;
                    let max = u16::try_from(max_mss).unwrap_or(u16::MAX);
                    let mss = u16::from_be_bytes([high, low]).min(max);
                    [&[2, 4][..], &mss.to_be_bytes()].concat()
                }
                [30, ..] => std::vec![1; option.len()],
                _ => option.clone(),
            }).collect::<Vec<_>>();
            let expected = expected.into_iter().rev().collect::<Vec<_>>().concat();
            prop_assert_eq!(rewrite(&options.concat(), max_mss), expected);
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..=40), max_mss in 0_u32..65_536) {
            prop_assert_eq!(rewrite(&bytes, max_mss).len(), bytes.len());
        }
    }

    #[test]
    fn options_of_a_real_client() {
        let syn = [2, 4, 5, 180, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7, 30, 4, 1, 0x81];
        let expected = [2, 4, 4, 0xD8, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7, 1, 1, 1, 1];
        assert_eq!(rewrite(&syn, 1240), expected);
        assert_eq!(rewrite(&syn, 1460)[..20], syn[..20]);
    }

    #[test]
    fn what_is_behind_the_end_or_a_broken_length_stays() {
        assert_eq!(rewrite(&[0, 2, 4, 5, 180], 1000), [0, 2, 4, 5, 180]);
        assert_eq!(rewrite(&[8, 0, 2, 4, 5, 180], 1000), [8, 0, 2, 4, 5, 180]);
        assert_eq!(rewrite(&[2, 4, 5], 1000), [2, 4, 5], "cut off");
    }
}
