//! TCP sequence numbers.

use core::{
    cmp::Ordering,
    ops::{Add, Sub},
};

/// A TCP sequence number. Arithmetic is modulo 2^32 (RFC 9293, section 3.4).
///
/// The order is that of two numbers less than 2^31 apart: over larger distances it is not transitive.
#[repr(transparent)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SeqNumber(pub u32);

impl Add<u32> for SeqNumber {
    type Output = Self;

    #[inline(always)]
    fn add(self, bytes: u32) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

impl Sub<u32> for SeqNumber {
    type Output = Self;

    #[inline(always)]
    fn sub(self, bytes: u32) -> Self {
        Self(self.0.wrapping_sub(bytes))
    }
}

/// The distance from an earlier number to this one: 2^31 or more if it is a later one.
impl Sub for SeqNumber {
    type Output = u32;

    #[inline(always)]
    fn sub(self, earlier: Self) -> u32 {
        self.0.wrapping_sub(earlier.0)
    }
}

impl PartialOrd for SeqNumber {
    #[inline(always)]
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some((*self - *other).cast_signed().cmp(&0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_ordered_across_the_wrap() {
        let last = SeqNumber(u32::MAX);
        assert_eq!(last + 2, SeqNumber(1));
        assert_eq!(SeqNumber(1) - 2, last);
        assert_eq!((SeqNumber(1) - last, last - SeqNumber(1)), (2, u32::MAX - 1));
        assert!(SeqNumber(1) > last && last < SeqNumber(1));
        assert_eq!(last.partial_cmp(&last), Some(Ordering::Equal));
        assert!(SeqNumber(5) + ((1 << 31) - 1) > SeqNumber(5));
        assert!(SeqNumber(5) + ((1 << 31) + 1) < SeqNumber(5));
    }
}
