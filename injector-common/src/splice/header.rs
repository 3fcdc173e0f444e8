//! A backend socket's PROXY header.

/// The largest header of a socket: the design limit of the PROXY protocol specification (section 2.2).
pub const HEADER_CAPACITY: usize = crate::proxy::MAX_LEN;

/// The value in a backend socket's storage (map `HEADERS`): the bytes that `inject` pushes in front of
/// the first payload.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Bytes used of `bytes`, from [`Header::SHORTEST`] to [`HEADER_CAPACITY`].
    pub len: u32,
    /// One of [`Header::ARMED`], [`Header::SENT`].
    pub state: u32,
    /// How many bytes of the message that carries the header are a doorbell, which `inject` removes: 0 or
    /// 1.
    pub doorbell: u32,
    /// Aligns `bytes` to a word, for the copy by words.
    pub reserved: u32,
    /// The rendered header.
    pub bytes: [u8; HEADER_CAPACITY],
}

impl Header {
    /// Waiting for the first message.
    pub const ARMED: u32 = 1;
    /// `inject` has pushed the header into a message that the kernel is sending.
    pub const SENT: u32 = 2;
    /// The length of the shortest header: the fixed part of version 2. The shortest version 1 line that
    /// is sent (TCP4) has 32 bytes.
    pub const SHORTEST: usize = 16;

    /// Makes a header ready to be sent from its `rendered` bytes. `None` if they are too few or too many.
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
