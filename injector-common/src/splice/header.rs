//! A backend socket's PROXY header.

/// The largest header a socket can carry: the design limit of the PROXY protocol specification (section 2.2).
pub const HEADER_CAPACITY: usize = crate::proxy::MAX_LEN;

/// The value in a backend socket's storage (map `HEADERS`): the bytes that `inject` puts in front of the first
/// payload.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Bytes used of `bytes`, from [`Header::SHORTEST`] to [`HEADER_CAPACITY`].
    pub len: u32,
    /// One of [`Header::ARMED`], [`Header::SENT`].
    pub state: u32,
    /// How many bytes of the message that carries the header are a doorbell, and taken out again: 0 or 1.
    pub doorbell: u32,
    /// Keeps `bytes` on a word's boundary, for the copy in words.
    pub reserved: u32,
    /// The rendered header.
    pub bytes: [u8; HEADER_CAPACITY],
}

impl Header {
    /// Waiting for the first message.
    pub const ARMED: u32 = 1;
    /// `inject` has put the header into a message that the kernel was told to send.
    pub const SENT: u32 = 2;
    /// No PROXY header is shorter: the fixed part of version 2 has 16 bytes, the shortest line of version 1 that
    /// is ever sent (TCP4) 32.
    pub const SHORTEST: usize = 16;

    /// The header `rendered`, ready to go; `None` if its length is outside what a header can have.
    #[must_use]
    pub fn armed(rendered: &[u8], doorbell: bool) -> Option<Self> {
        let len = u32::try_from(rendered.len()).ok()?;
        let mut bytes = [0; HEADER_CAPACITY];
        bytes.get_mut(..rendered.len())?.copy_from_slice(rendered);
        (rendered.len() >= Self::SHORTEST).then_some(Self {
            len,
            state: Self::ARMED,
            doorbell: u32::from(doorbell),
            reserved: 0,
            bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_of_impossible_length_is_never_armed() {
        for (len, fits) in [(0, false), (15, false), (16, true), (232, true), (536, true), (537, false)] {
            assert_eq!(Header::armed(&[7; 600][..len], true).is_some(), fits, "{len}");
        }
    }

    #[test]
    fn the_copy_in_words_needs_whole_aligned_words() {
        assert_eq!(core::mem::offset_of!(Header, bytes) % 8, 0);
        assert_eq!(HEADER_CAPACITY % 8, 0);
        assert_eq!(size_of::<Header>(), 16 + HEADER_CAPACITY);
    }
}
