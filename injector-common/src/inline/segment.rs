//! What the decisions need of a TCP segment.

use crate::SeqNumber;

/// What the decisions need of a TCP segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The flags: [`FIN`] and those that follow it.
    pub flags: u8,
    /// Sequence number.
    pub sequence: SeqNumber,
    /// Acknowledgement number; means something with [`ACK`] alone.
    pub acknowledgement: SeqNumber,
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

    /// Whether it is a SYN as clients send it: no data, and no flag that another segment is known by.
    #[must_use]
    #[inline(always)]
    pub const fn is_plain_syn(&self) -> bool {
        self.flags & (SYN | ACK | FIN | RST | URG) == SYN && self.payload == 0
    }

    /// Whether it is a reset and nothing more.
    #[must_use]
    #[inline(always)]
    pub const fn is_bare_reset(&self) -> bool {
        self.is(RST) && !self.is(SYN | FIN | URG) && self.payload == 0
    }
}

/// Payload bytes of a TCP segment whose IP and TCP headers have `headers` bytes together: `total` is the length of the packet by
/// its IP header, `frame` what lies between that header and the frame's end. Ethernet pads what is shorter than 60 bytes, so
/// the frame says nothing of the packet, but of one that is too long for its header's field (BIG TCP, `jumbo`). `None` if the
/// packet is not whole: the kernel drops it (ip_rcv_core, net/ipv4/ip_input.c; ip6_rcv_core, net/ipv6/ip6_input.c).
#[must_use]
#[inline(always)]
pub const fn payload_len(total: u32, headers: u32, frame: u32, jumbo: bool) -> Option<u32> {
    let len = if jumbo { frame } else { total };
    if len > frame { None } else { len.checked_sub(headers) }
}
