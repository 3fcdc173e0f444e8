//! A connection's entry in the maps.

use super::{ACK, HeaderAddresses, RST, Segment, SeqState, Slot, Template};

/// Packets and payload bytes of one direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Packets, as forwarded: one of many segments counts one.
    pub packets: u64,
    /// Payload bytes, sent again ones included.
    pub bytes: u64,
}

/// One connection (maps `PENDING` and `FLOWS`, by [`Key`](super::Key)).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// The sequence number of the client's first byte.
    pub first: u32,
    /// What is added to the client's numbers towards the backend, besides the header's length: random, and never shown to the client. Without
    /// it a client could make a segment of one connection fit another one that the backend has, or would begin by a SYN cookie,
    /// such that its own bytes come first there.
    pub offset: u32,
    /// The length of the header.
    pub header_len: u32,
    /// Which listener it came by.
    pub listener: u32,
    /// The client's window as in its last segment before the header was acknowledged.
    pub window: u32,
    /// What has happened: a byte for each [`Flag`], not a bit, so that processors that set two of them at the same time lose
    /// neither.
    pub state: [u8; Flag::PLACES],
    /// 1 if the header waits for the client's first bytes ([`Template::waits`]).
    pub waits: u32,
    /// The client, and where it connected to.
    pub addresses: HeaderAddresses,
    /// `CLOCK_MONOTONIC` of the first SYN, in nanoseconds.
    pub created_ns: u64,
    /// The same of the last packet; no later than it by a tick of the kernel's clock ([`Flow::last_tick`]).
    pub last_ns: u64,
    /// The same of the last header that answered the backend.
    pub answered_ns: u64,
    /// From the client to the backend, without the header.
    pub to_backend: Tally,
    /// From the backend to the client.
    pub to_client: Tally,
    /// When the connection was reset, in nanoseconds.
    pub reset_ns: u64,
    /// How far the client has come,
    pub client: SeqState,
    /// and how far the backend.
    pub backend: SeqState,
    /// The sequence number of the backend's first byte.
    pub backend_first: u32,
    /// How often the header was sent with a packet of the client's own.
    pub appended: u32,
    /// How often it was sent as an answer to the backend.
    pub answered: u32,
    /// The kernel's tick (jiffies) at which `last_ns` was read: a clock that costs nothing says when the other may be asked again.
    pub last_tick: u32,
}

/// What has happened to a connection; its place in [`Flow::state`].
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flag {
    /// The header was sent at least once.
    Sent,
    /// The backend has acknowledged all of it.
    Acknowledged,
    /// The backend has answered the SYN.
    Accepted,
    /// The client has finished sending: its FIN has come, and all that was before it.
    ClientFin,
    /// The backend has.
    BackendFin,
    /// The client's FIN came before the backend's.
    ClientFirst,
    /// The client has reset the connection, with a number that counts ([`SeqState::is_reset_by`]).
    ClientRst,
    /// The backend has.
    BackendRst,
    /// The end of the handshake was kept back once.
    Waited,
    /// The daemon was told of the end.
    Told,
    /// The backend has acknowledged so much that nothing is compared with [`Flow::first`] any more.
    Far,
}

impl Flag {
    /// Places for all of them, and as many more as make whole words.
    pub const PLACES: usize = (Self::Far as usize + 1).next_multiple_of(4);
}

impl Flow {
    /// How often a backend is answered at most.
    const ANSWER_EVERY_NS: u64 = 500_000;

    /// The largest window that TCP has (RFC 7323, section 2.2): nobody sends again what lies further back.
    const LARGEST_WINDOW: u32 = 1 << 30;

    /// How long after a reset nothing passes that was under way before it.
    const REVIVE_AFTER_NS: u64 = 1_000_000_000;

    /// Makes a zeroed flow that of the client whose SYN leaves now; its addresses are still to be copied.
    #[inline(always)]
    pub const fn open(&mut self, slot: &Slot, template: &Template, offset: u32, now_ns: u64) {
        self.first = slot.sequence.wrapping_add(1);
        self.offset = offset;
        self.client = SeqState::new(self.first);
        self.header_len = template.len;
        self.waits = template.waits;
        self.listener = slot.listener;
        (self.created_ns, self.last_ns) = (now_ns, now_ns);
    }

    /// How far the backend's acknowledgement is beyond the header's first byte; 2^31 and more if it is before it.
    #[must_use]
    #[inline(always)]
    pub const fn beyond(&self, acknowledgement: u32) -> u32 {
        acknowledgement.wrapping_sub(self.first).wrapping_sub(self.offset)
    }

    /// What the client's numbers and the backend's differ by once the header has gone.
    #[must_use]
    #[inline(always)]
    pub const fn shift(&self) -> u32 {
        self.offset.wrapping_add(self.header_len)
    }

    /// The backend has answered the SYN: with another number than before, if it answers by SYN cookies.
    #[inline(always)]
    pub const fn accept(&mut self, syn_ack: &Segment) {
        self.backend_first = syn_ack.sequence.wrapping_add(1);
        self.backend = SeqState::new(self.backend_first);
        self.set(Flag::Accepted);
    }

    /// Whether this has happened.
    #[must_use]
    #[inline(always)]
    pub const fn is(&self, flag: Flag) -> bool {
        self.state[flag as usize] != 0
    }

    /// It has.
    #[inline(always)]
    pub const fn set(&mut self, flag: Flag) {
        self.state[flag as usize] = 1;
    }

    /// Whether both sides have finished, or one has reset: the ports may be used again.
    #[must_use]
    #[inline(always)]
    pub const fn closed(&self) -> bool {
        (self.is(Flag::ClientFin) && self.is(Flag::BackendFin)) || self.is_reset()
    }

    /// Whether the SYN in this slot is this connection's own, sent again.
    #[must_use]
    #[inline(always)]
    pub fn is_of(&self, slot: &Slot) -> bool {
        self.first == slot.sequence.wrapping_add(1)
            && self.listener == slot.listener
            && self.addresses.same(&slot.addresses)
            && !self.closed()
    }

    /// Whether this segment of the client's answers the backend's SYN, which it must have seen: the backend has said nothing
    /// else before the header. Anything less would give forged handshakes a place in `FLOWS`.
    #[must_use]
    #[inline(always)]
    pub const fn is_accepted_by(&self, segment: &Segment) -> bool {
        self.is(Flag::Accepted) && segment.is(ACK) && segment.acknowledgement == self.backend_first
    }

    /// Whether this segment of the backend's refuses the SYN, in a way that the client believes (RFC 9293, section 3.10.7.3).
    #[must_use]
    #[inline(always)]
    pub const fn is_refused_by(&self, segment: &Segment) -> bool {
        !self.is(Flag::Accepted)
            && segment.is(RST)
            && segment.is(ACK)
            && self.beyond(segment.acknowledgement) == 0
    }

    /// Whether this SYN-ACK of the backend's is this connection's own, sent again. Where the header was acknowledged it can only
    /// be another connection's, which the backend began behind the back of this one.
    #[must_use]
    #[inline(always)]
    pub const fn repeats_syn_ack(&self, segment: &Segment) -> bool {
        !self.is(Flag::Acknowledged)
            && self.beyond(segment.acknowledgement) == 0
            && segment.sequence.wrapping_add(1) == self.backend_first
    }

    /// Notes what a segment of the client's that goes on means for the connection's end.
    #[inline(always)]
    pub fn note_from_client(&mut self, segment: &Segment, now_ns: impl FnOnce() -> u64) {
        if segment.is(RST) {
            if !self.closed() && self.client.is_reset_by(segment.sequence) {
                self.reset_ns = now_ns();
                self.set(Flag::ClientRst);
            }
            return;
        }
        self.revive(now_ns);
        // Only who knows the numbers is believed: neither end may be moved by a stranger, and the backend drops the rest as well.
        let believed = segment.is(ACK)
            && self.client.joins(segment.sequence)
            && self.backend.may_be_acked(segment.acknowledgement);
        if believed {
            self.client.note_sent(segment);
            self.backend.note_acked(segment.acknowledgement);
        } else {
            self.client.note_fin(segment);
        }
        self.note_ends();
    }

    /// The same of a segment of the backend's, with its numbers as the backend sent them.
    #[inline(always)]
    pub fn note_from_backend(&mut self, segment: &Segment, now_ns: impl FnOnce() -> u64) {
        if segment.is(RST) {
            if !self.closed() && self.backend.is_reset_by(segment.sequence) {
                self.reset_ns = now_ns();
                self.set(Flag::BackendRst);
            }
            return;
        }
        self.revive(now_ns);
        self.backend.note_sent(segment);
        if segment.is(ACK)
            && let Some(acknowledgement) = self.without_header(segment.acknowledgement)
        {
            self.client.note_acked(acknowledgement);
            if self.client.acked.wrapping_sub(self.first) >= Self::LARGEST_WINDOW {
                self.set(Flag::Far);
            }
        }
        self.note_ends();
    }

    /// Whether a segment of the client's with this number begins where it has no bytes: before its first one. The header stands
    /// there for a backend that has just begun this connection; be it once more, because it keeps nothing of SYNs and has closed the
    /// connection since (SYN cookies).
    #[must_use]
    #[inline(always)]
    pub const fn is_before_first(&self, sequence: u32) -> bool {
        let back = self.client.acked.wrapping_sub(sequence);
        let least = if self.is(Flag::Far) {
            Self::LARGEST_WINDOW
        } else {
            self.client.acked.wrapping_sub(self.first)
        };
        back > least && back < 1 << 31
    }

    /// A number that the backend acknowledges, as the client counts; `None` if it is older than the connection.
    #[inline(always)]
    const fn without_header(&self, acknowledgement: u32) -> Option<u32> {
        let beyond = self.beyond(acknowledgement);
        if self.is(Flag::Acknowledged)
            || (self.is(Flag::Sent) && beyond >= self.header_len && beyond < 1 << 31)
        {
            Some(acknowledgement.wrapping_sub(self.shift()))
        } else if beyond < self.header_len {
            Some(self.first)
        } else {
            None
        }
    }

    #[inline(always)]
    const fn note_ends(&mut self) {
        if self.client.is_finished() && !self.is(Flag::ClientFin) {
            if !self.is(Flag::BackendFin) {
                self.set(Flag::ClientFirst);
            }
            self.set(Flag::ClientFin);
        }
        if self.backend.is_finished() {
            self.set(Flag::BackendFin);
        }
    }

    /// Who was reset says no more: a connection on which something passes was not. What had been under way is over by then.
    #[inline(always)]
    fn revive(&mut self, now_ns: impl FnOnce() -> u64) {
        if self.is_reset() && now_ns().wrapping_sub(self.reset_ns) >= Self::REVIVE_AFTER_NS {
            self.state[Flag::ClientRst as usize] = 0;
            self.state[Flag::BackendRst as usize] = 0;
        }
    }

    /// Whether one side has reset the connection.
    #[must_use]
    #[inline(always)]
    pub const fn is_reset(&self) -> bool {
        self.is(Flag::ClientRst) || self.is(Flag::BackendRst)
    }

    /// Whether the backend may be answered now. A backend that answers every header with the same question, because it
    /// cannot read it, would otherwise be told as fast as it asks.
    #[must_use]
    #[inline(always)]
    pub const fn may_answer(&self, now_ns: u64) -> bool {
        now_ns.wrapping_sub(self.answered_ns) >= Self::ANSWER_EVERY_NS
    }
}
