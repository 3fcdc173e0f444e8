//! Headers, as the daemon gives them to the programs.

use super::HEADER_CAPACITY;

/// A header without its addresses (map `TEMPLATES`, at [`Template::index`]).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug)]
pub struct Template {
    /// Length of the header; a multiple of four, for the checksum. 0 if there is none.
    pub len: u32,
    /// Sum of the header's 32-bit words as bpf_csum_diff has it, the addresses taken as zero.
    pub sum: u32,
    /// 1 if the header waits for the client's first bytes, where it speaks first: see [`ToBackend::Defer`](super::ToBackend::Defer).
    pub waits: u32,
    /// The header, with zeros where the addresses belong.
    pub bytes: [u8; HEADER_CAPACITY],
}

impl Template {
    /// Where the addresses stand (PROXY protocol, section 2.2).
    pub const ADDRESSES_AT: usize = 16;

    /// The place of a listener's template for one family.
    #[must_use]
    #[inline(always)]
    pub const fn index(listener: u32, ipv6: bool) -> u32 {
        listener * 2 + ipv6 as u32
    }

    /// The template in a header that was rendered for any two addresses; `None` if its length does not do. `waits` is whether
    /// it goes together with the client's first bytes.
    #[must_use]
    pub fn new(rendered: &[u8], ipv6: bool, waits: bool) -> Option<Self> {
        let addresses = if ipv6 { 36 } else { 12 };
        let mut bytes = [0; HEADER_CAPACITY];
        bytes.get_mut(..rendered.len())?.copy_from_slice(rendered);
        bytes.get_mut(Self::ADDRESSES_AT..Self::ADDRESSES_AT + addresses)?.fill(0);
        let len = u32::try_from(rendered.len()).ok()?;
        (len.is_multiple_of(4) && rendered.len() >= Self::ADDRESSES_AT + addresses).then(|| Self {
            len,
            sum: sum_of(&bytes),
            waits: waits.into(),
            bytes,
        })
    }
}

/// The sum of 32-bit words in ones' complement arithmetic (RFC 1071), in the byte order of the machine.
fn sum_of(bytes: &[u8]) -> u32 {
    let (words, _) = bytes.as_chunks::<4>();
    words.iter().fold(0_u32, |sum, word| {
        let (sum, carry) = sum.overflowing_add(u32::from_ne_bytes(*word));
        sum + u32::from(carry)
    })
}
