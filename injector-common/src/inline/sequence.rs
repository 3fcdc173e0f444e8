//! How far each side's sequence numbers have come, as far as can be believed: what a reset or a FIN is worth depends on it.

use super::{FIN, Segment};
use crate::SeqNumber;

/// One side's sequence numbers, in the client's numbering: modulo 2^32, and without the header. `end` and `acked` are `td_end` and
/// `td_maxack` of `struct ip_ct_tcp_state` (include/linux/netfilter/nf_conntrack_tcp.h).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SeqState {
    /// Behind the last byte (or FIN): of the client, the last one that followed all before it without a gap.
    pub end: SeqNumber,
    /// What the other side has acknowledged.
    pub acked: SeqNumber,
    /// Behind the last FIN, if [`SeqState::fin_sent`].
    pub fin: SeqNumber,
    /// 1 if a FIN was sent.
    pub fin_sent: u32,
}

impl SeqState {
    /// After a SYN whose next number is `first`.
    #[must_use]
    #[inline(always)]
    pub const fn new(first: SeqNumber) -> Self {
        Self { end: first, acked: first, fin: SeqNumber(0), fin_sent: 0 }
    }

    /// Whether a segment with this sequence number joins what is known of this side, or repeats a part of it that the other side
    /// has not acknowledged.
    #[must_use]
    #[inline(always)]
    pub fn joins(&self, sequence: SeqNumber) -> bool {
        sequence - self.acked <= self.end - self.acked
    }

    /// Notes a segment of this side's; `joins` if it [joins](Self::joins) what was before, or is of a side that is believed without.
    #[inline(always)]
    pub fn note_sent(&mut self, segment: &Segment, joins: bool) {
        let end = end_of(segment);
        if segment.is(FIN) {
            self.fin = end;
            self.fin_sent = 1;
        }
        if joins && end > self.end {
            self.end = end;
        }
    }

    /// Whether a segment of the other side's may acknowledge this: TCP drops one that acknowledges what was never sent (RFC 9293,
    /// section 3.10.7.4).
    #[must_use]
    #[inline(always)]
    pub fn may_be_acked(&self, acknowledgement: SeqNumber) -> bool {
        acknowledgement <= self.end
    }

    /// Notes that the other side has acknowledged up to here. It has then seen what was not seen here.
    #[inline(always)]
    pub fn note_acked(&mut self, acknowledgement: SeqNumber) {
        if acknowledgement > self.acked {
            self.acked = acknowledgement;
            if acknowledgement > self.end {
                self.end = acknowledgement;
            }
        }
    }

    /// Whether this side has sent its FIN and all that is before it.
    #[must_use]
    #[inline(always)]
    pub fn is_finished(&self) -> bool {
        self.fin_sent != 0 && self.end == self.fin
    }

    /// Whether the other side has acknowledged all of it.
    #[must_use]
    #[inline(always)]
    pub const fn is_acked(&self) -> bool {
        self.acked.0 == self.end.0
    }

    /// Whether a reset with this sequence number is one that the other side takes: it must have exactly the number that is
    /// expected next (RFC 5961, section 3.2). That is what was acknowledged last, or `end` where the acknowledgement is still
    /// under way. nf_conntrack believes the same two (nf_conntrack_tcp_packet, net/netfilter/nf_conntrack_proto_tcp.c).
    #[must_use]
    #[inline(always)]
    pub fn is_reset_by(&self, sequence: SeqNumber) -> bool {
        sequence == self.end || sequence == self.acked
    }
}

/// The largest window that TCP has (RFC 7323, section 2.2): data further back is never retransmitted.
pub(super) const LARGEST_WINDOW: u32 = 1 << 30;

/// Behind the last byte of a segment, or its FIN.
#[inline(always)]
pub(super) fn end_of(segment: &Segment) -> SeqNumber {
    segment.sequence + segment.payload + u32::from(segment.is(FIN))
}
