//! What the decisions need of a TCP segment.

/// What the decisions need of a TCP segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The flags: [`FIN`] and those that follow it.
    pub flags: u8,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number; means something with [`ACK`] alone.
    pub acknowledgement: u32,
    /// Payload bytes.
    pub payload: u32,
    /// The window, unscaled.
    pub window: u16,
}

/// No more data (RFC 9293, section 3.1).
pub const FIN: u8 = 0x01;
/// Synchronise.
pub const SYN: u8 = 0x02;
/// Reset.
pub const RST: u8 = 0x04;
/// The acknowledgement number is valid.
pub const ACK: u8 = 0x10;
/// The urgent pointer is valid.
pub const URG: u8 = 0x20;
/// Push.
pub const PSH: u8 = 0x08;

impl Segment {
    /// Whether any of these flags is set.
    #[must_use]
    #[inline(always)]
    pub const fn is(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }
}
