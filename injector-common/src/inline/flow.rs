//! A connection's entry in the maps.

use super::{ACK, HeaderAddresses, Segment, Slot, Template};

/// Packets and payload bytes of one direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Packets, as forwarded: one of many segments counts one.
    pub packets: u64,
    /// Payload bytes, sent again ones included.
    pub bytes: u64,
}

/// One connection (maps `PENDING` and `FLOWS`, by [`Key`]).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// The sequence number of the client's first byte.
    pub first: u32,
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
    /// What the backend acknowledges next: its SYN's sequence number plus one, and then the client's last acknowledgement.
    pub acknowledged: u32,
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
    /// The client has finished sending.
    ClientFin,
    /// The backend has.
    BackendFin,
    /// The client's FIN came before the backend's.
    ClientFirst,
    /// The client has reset the connection.
    ClientRst,
    /// The backend has.
    BackendRst,
    /// The end of the handshake was kept back once.
    Waited,
    /// The daemon was told of the end.
    Told,
}

impl Flag {
    /// Places for all of them, and as many more as make whole words.
    pub const PLACES: usize = (Self::Told as usize + 1).next_multiple_of(4);
}

impl Flow {
    /// How often a backend is answered at most.
    const ANSWER_EVERY_NS: u64 = 500_000;

    /// Makes a zeroed flow that of the client whose SYN leaves now; its addresses are still to be copied.
    #[inline(always)]
    pub const fn open(&mut self, slot: &Slot, template: &Template, now_ns: u64) {
        self.first = slot.sequence.wrapping_add(1);
        self.header_len = template.len;
        self.waits = template.waits;
        self.listener = slot.listener;
        (self.created_ns, self.last_ns) = (now_ns, now_ns);
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
        (self.is(Flag::ClientFin) && self.is(Flag::BackendFin))
            || self.is(Flag::ClientRst)
            || self.is(Flag::BackendRst)
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
        self.is(Flag::Accepted) && segment.is(ACK) && segment.acknowledgement == self.acknowledged
    }

    /// Whether the backend may be answered now. A backend that answers every header with the same question, because it
    /// cannot read it, would otherwise be told as fast as it asks.
    #[must_use]
    #[inline(always)]
    pub const fn may_answer(&self, now_ns: u64) -> bool {
        now_ns.wrapping_sub(self.answered_ns) >= Self::ANSWER_EVERY_NS
    }
}
