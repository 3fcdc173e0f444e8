//! A connection's entry in the maps.

use super::{
    ACK, FIN, HeaderAddresses, NextHop, RST, Segment, SeqState, Syn, Template, Timeouts, Tuple, URG,
    sequence::{LARGEST_WINDOW, end_of},
};
use crate::SeqNumber;

/// Packets and payload bytes of one direction.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectionStats {
    /// Packets, as forwarded: one of many segments counts one.
    pub packets: u64,
    /// Payload bytes, sent again ones included.
    pub bytes: u64,
}

/// One direction of a connection: how its packets leave.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Direction {
    /// Where they leave to.
    pub hop: NextHop,
    /// Source and destination, as they stand in them.
    pub tuple: Tuple,
}

/// One connection (map `CONNECTIONS`). Its index stands in the two entries of `FLOWS`.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Its [`Phase`](super::Phase). Atomic exchanges have eight bytes everywhere.
    pub phase: u64,
    /// 1 while it counts in [`Usage::established`](super::Usage::established).
    pub counted: u64,
    /// Where it counts among the connections of its source: [`SourcePlaces`](crate::guard::SourcePlaces).
    pub source: u64,
    /// The source: of the client's address, mapped into IPv6, the bits that count. All zero if it was never counted.
    pub source_ip: [u32; 4],
    /// The sequence number of the client's first byte.
    pub first: SeqNumber,
    /// What is added to the client's numbers towards the backend, besides the header's length: random, and never shown to the client. Without
    /// it a client could make a segment of one connection fit another one that the backend has, or would begin by a SYN cookie,
    /// such that its own bytes come first there.
    pub offset: u32,
    /// The length of the header.
    pub header_len: u32,
    /// [`Listener::id`](super::Listener::id) of the listener that it came by.
    pub listener: u32,
    /// After how long without a packet it is over.
    pub timeouts: Timeouts,
    /// The client's window as in its last segment before the header was acknowledged.
    pub window: u32,
    /// Makes what follows start on a word's boundary.
    pub reserved: u32,
    /// What has happened: a byte for each [`Flag`], not a bit, so that processors that set two of them at the same time lose
    /// neither.
    pub state: [u8; Flag::PLACES],
    /// 1 if the header waits for the client's first bytes ([`Template::waits`]).
    pub waits: u32,
    /// The client, and where it connected to.
    pub addresses: HeaderAddresses,
    /// How often the client has sent its SYN again.
    pub syn_repeats: u32,
    /// Behind the last byte (or FIN) of the client's that has passed, gaps or not: the backend acknowledges nothing beyond it.
    pub client_top: SeqNumber,
    /// From the client to the backend: from this host's address, or the client's.
    pub backend_side: Direction,
    /// From the backend to the client: from the address that the client connected to.
    pub client_side: Direction,
    /// `CLOCK_MONOTONIC` of the first SYN, in nanoseconds.
    pub created_ns: u64,
    /// The same of the last packet; no later than it by a tick of the kernel's clock ([`Flow::last_tick`]).
    pub last_ns: u64,
    /// The same of the last header that was retransmitted.
    pub retransmitted_ns: u64,
    /// From the client to the backend, without the header.
    pub to_backend: DirectionStats,
    /// From the backend to the client.
    pub to_client: DirectionStats,
    /// When the connection was reset, in nanoseconds.
    pub reset_ns: u64,
    /// How far the client has come,
    pub client: SeqState,
    /// and how far the backend.
    pub backend: SeqState,
    /// The sequence number of the backend's first byte.
    pub backend_first: SeqNumber,
    /// How often the header was sent with a packet of the client's own.
    pub appended: u32,
    /// How often it was retransmitted because the backend asked for it.
    pub retransmitted: u32,
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
    /// The end of the handshake was deferred once.
    Deferred,
    /// The daemon was notified of the end.
    EndReported,
    /// The backend has acknowledged so much that nothing is compared with [`Flow::first`] any more.
    Far,
    /// A reset has passed, in either direction, with a number that may or may not have been the expected one.
    Doubted,
    /// The backend has refused the SYN. The client's next one goes to the socket, where another backend is tried.
    Refused,
    /// Another connection of the same addresses and ports has taken its place.
    Superseded,
    /// The sweep has found it silent for too long.
    Expired,
    /// Another connection has the source port that it had towards the backend.
    Replaced,
}

impl Flag {
    /// Places for all of them, and as many more as make whole words.
    pub const PLACES: usize = (Self::Replaced as usize + 1).next_multiple_of(4);
}

impl Flow {
    /// The shortest time between two retransmissions.
    const RETRANSMIT_INTERVAL_NS: u64 = 500_000;

    /// How far the numbers of a segment may be off for a SYN cookie to fit: the index of a segment size is added to them
    /// (check_tcp_syn_cookie, net/ipv4/syncookies.c), and there are four.
    const COOKIE_SLACK: u32 = 4;

    /// So much less is acknowledged where a cookie would fit: more than the slack on both sides, and less than any header.
    pub const LESS: u32 = 16;

    /// How long the end that has finished first keeps a connection's addresses and ports (`TCP_TIMEWAIT_LEN`, include/net/tcp.h).
    pub const TIME_WAIT_NS: u64 = 60_000_000_000;

    /// How long after a reset nothing passes that was under way before it.
    const REVIVE_AFTER_NS: u64 = 1_000_000_000;

    /// Makes a zeroed flow that of this SYN; addresses and directions are still to be filled in.
    #[inline(always)]
    pub const fn open(
        &mut self,
        first: SeqNumber,
        listener: u32,
        template: &Template,
        offset: u32,
        now_ns: u64,
    ) {
        self.first = first;
        self.offset = offset;
        self.client = SeqState::new(first);
        self.client_top = first;
        self.header_len = template.len;
        self.waits = template.waits;
        self.listener = listener;
        (self.created_ns, self.last_ns) = (now_ns, now_ns);
    }

    /// How far the backend's acknowledgement is beyond the header's first byte; 2^31 and more if it is before it.
    #[must_use]
    #[inline(always)]
    pub fn beyond(&self, acknowledgement: SeqNumber) -> u32 {
        acknowledgement - (self.first + self.offset)
    }

    /// What the client's numbers and the backend's differ by once the header has gone.
    #[must_use]
    #[inline(always)]
    pub const fn shift(&self) -> u32 {
        self.offset.wrapping_add(self.header_len)
    }

    /// The backend has answered the SYN: with another number than before, if it answers by SYN cookies.
    #[inline(always)]
    pub fn accept(&mut self, syn_ack: &Segment) {
        self.backend_first = syn_ack.sequence + 1;
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

    /// Begins behind all that the backend may remember of the earlier connection from the same address and port: it takes a SYN in
    /// TIME_WAIT only if its number is a later one (tcp_timewait_state_process, net/ipv4/tcp_minisocks.c; RFC 9293, section 3.6.1).
    #[inline(always)]
    pub fn follow(&mut self, earlier: &Self) {
        let random = self.offset >> 2;
        self.offset = (earlier.client_top + earlier.shift() + 1 + random) - self.first;
    }

    /// Whether the connection has ended and the backend remembers nothing of it, so that another client's may have its source port: it
    /// was not the first to finish, or one side has reset it. In TIME_WAIT, a later number is not enough: the timestamps of two
    /// clients have nothing in common, and the backend would take those of the other for old (PAWS).
    #[must_use]
    #[inline(always)]
    pub fn leaves_no_time_wait(&self) -> bool {
        let [client_first, backend_fin, client_rst, backend_rst] =
            [Flag::ClientFirst, Flag::BackendFin, Flag::ClientRst, Flag::BackendRst]
                .map(|flag| self.state[flag as usize]);
        ((client_first & backend_fin != 0) && self.backend.is_acked()) || client_rst | backend_rst != 0
    }

    /// Whether this SYN is this connection's own, sent again.
    #[must_use]
    #[inline(always)]
    pub fn is_of(&self, syn: &Syn) -> bool {
        self.first == syn.first && self.listener == syn.listener && self.addresses.same(&syn.addresses)
    }

    /// Whether this segment of the client's answers the backend's SYN, which it must have seen: the backend has said nothing
    /// else before the header. Anything less would give forged handshakes a place in `FLOWS`.
    #[must_use]
    #[inline(always)]
    pub fn is_accepted_by(&self, segment: &Segment) -> bool {
        self.is(Flag::Accepted) && segment.is(ACK) && segment.acknowledgement == self.backend_first
    }

    /// Whether this segment of the backend's refuses the SYN, in a way that the client believes (RFC 9293, section 3.10.7.3).
    #[must_use]
    #[inline(always)]
    pub fn is_refused_by(&self, segment: &Segment) -> bool {
        !self.is(Flag::Accepted)
            && segment.is(RST)
            && segment.is(ACK)
            && self.beyond(segment.acknowledgement) == 0
    }

    /// Whether the packet with this sequence number, which could not reach the backend, is the SYN, and nothing has answered it yet.
    #[must_use]
    #[inline(always)]
    pub fn is_unreachable_by(&self, sequence: SeqNumber) -> bool {
        !self.is(Flag::Accepted) && self.beyond(sequence + 1) == 0
    }

    /// Whether this SYN-ACK of the backend's is this connection's own, sent again. Where the header was acknowledged it can only
    /// be another connection's, which the backend began behind the back of this one.
    #[must_use]
    #[inline(always)]
    pub fn repeats_syn_ack(&self, segment: &Segment) -> bool {
        !self.is(Flag::Acknowledged)
            && self.beyond(segment.acknowledgement) == 0
            && segment.sequence + 1 == self.backend_first
    }

    /// Notes what a segment of the client's that goes on means for the connection's end.
    #[inline(always)]
    pub fn note_from_client(&mut self, segment: &Segment, now_ns: impl FnOnce() -> u64) {
        if segment.is(RST) {
            self.set(Flag::Doubted);
            if !self.closed() && self.client.is_reset_by(segment.sequence) {
                self.reset_ns = now_ns();
                self.set(Flag::ClientRst);
            }
            return;
        }
        let end = end_of(segment);
        if end > self.client_top {
            self.client_top = end;
        }
        // Neither end may be moved by a stranger, who does not know the numbers.
        if segment.is(ACK) && self.backend.may_be_acked(segment.acknowledgement) {
            self.client.note_sent(segment, self.client.joins(segment.sequence));
            self.backend.note_acked(segment.acknowledgement);
        }
        self.note_ends();
    }

    /// The same of a segment of the backend's, with its numbers as the backend sent them.
    #[inline(always)]
    pub fn note_from_backend(&mut self, segment: &Segment, now_ns: impl FnOnce() -> u64) {
        if segment.is(RST) {
            self.set(Flag::Doubted);
            if !self.closed() && self.backend.is_reset_by(segment.sequence) {
                self.reset_ns = now_ns();
                self.set(Flag::BackendRst);
            }
            return;
        }
        if self.is_reset() {
            self.revive(now_ns());
        }
        if segment.is(ACK) {
            self.backend.note_sent(segment, true);
        }
        if segment.is(ACK)
            && let Some(acknowledgement) = self.without_header(segment.acknowledgement)
        {
            self.client.note_acked(acknowledgement);
            if self.client.acked - self.first >= LARGEST_WINDOW {
                self.set(Flag::Far);
            }
        }
        self.note_ends();
    }

    /// Whether a backend that has forgotten this connection might take a segment of the client's, behind the header, for the end of a
    /// handshake, so that what follows would be the first that it reads. A backend that answers by SYN cookies keeps nothing of a SYN; a
    /// cookie proves that the acknowledgement number less the sequence number is what it was in the handshake. Behind the
    /// header they are one header's length apart, so that those of another place in the stream fit.
    ///
    /// An empty FIN may pass: what begins with it has no bytes.
    #[must_use]
    #[inline(always)]
    pub fn may_begin_another(&self, segment: &Segment) -> bool {
        if !self.is(Flag::BackendFin) && !self.is(Flag::Doubted) && !self.is(Flag::Superseded) {
            return false;
        }
        if segment.is(RST) || (segment.is(FIN) && !segment.is(URG) && segment.payload == 0) {
            return false;
        }
        let received = segment.acknowledgement - self.backend_first;
        let sent = segment.sequence + self.header_len - self.first;
        received.wrapping_sub(sent).wrapping_add(Self::COOKIE_SLACK) <= 2 * Self::COOKIE_SLACK
    }

    /// Whether this segment of the client's acknowledges what the backend has sent, no less and no more. Before the header a backend
    /// that answers by SYN cookies finds its own number in there: off by the header's length, the segment behind the header's would
    /// be the one that fits.
    #[must_use]
    #[inline(always)]
    pub fn is_in_step(&self, segment: &Segment) -> bool {
        let acknowledged = segment.acknowledgement - self.backend_first;
        segment.is(ACK) && acknowledged <= self.backend.end - self.backend_first
    }

    /// Whether a segment of the client's with this number begins where it has no bytes: before its first one. The header stands
    /// there for a backend that has just begun this connection; be it once more, because it keeps nothing of SYNs and has closed the
    /// connection since (SYN cookies).
    #[must_use]
    #[inline(always)]
    pub fn is_before_first(&self, sequence: SeqNumber) -> bool {
        let back = self.client.acked - sequence;
        let least = if self.is(Flag::Far) { LARGEST_WINDOW } else { self.client.acked - self.first };
        back > least && back < 1 << 31
    }

    /// A number that the backend acknowledges, as the client counts; `None` if it is older than the connection.
    #[inline(always)]
    fn without_header(&self, acknowledgement: SeqNumber) -> Option<SeqNumber> {
        let beyond = self.beyond(acknowledgement);
        if self.is(Flag::Acknowledged)
            || (self.is(Flag::Sent) && beyond >= self.header_len && beyond < 1 << 31)
        {
            let acknowledgement = acknowledgement - self.shift();
            (acknowledgement <= self.client_top).then_some(acknowledgement)
        } else if beyond < self.header_len {
            Some(self.first)
        } else {
            None
        }
    }

    #[inline(always)]
    fn note_ends(&mut self) {
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

    /// Who was reset, or has reset, says no more: if the backend does, it was not. What had been under way is over by then.
    #[inline(always)]
    const fn revive(&mut self, now_ns: u64) {
        if now_ns.wrapping_sub(self.reset_ns) >= Self::REVIVE_AFTER_NS {
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
    /// cannot read it, would otherwise be answered as fast as it asks.
    #[must_use]
    #[inline(always)]
    pub const fn may_retransmit(&self, now_ns: u64) -> bool {
        now_ns.wrapping_sub(self.retransmitted_ns) >= Self::RETRANSMIT_INTERVAL_NS
    }
}
