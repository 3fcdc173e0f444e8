//! What the inline engine's programs and the daemon agree on, and every decision about a segment, as pure functions.
//!
//! The client talks TCP to the backend; the header is put into the stream on the way. `first` is the sequence number of the
//! client's first byte. Towards the backend the header takes the place from `first` on, so everything that the client sends
//! is later by the header's length, and everything that the backend acknowledges is earlier by as much. All arithmetic is
//! modulo 2^32 (RFC 9293, section 3.4).
//!
//! Addresses are 16 bytes, IPv4 as `::ffff:a.b.c.d`; ports and numbers are in the host's byte order; `zeroed` values are
//! valid everywhere.

use crate::proxy;

/// Bytes that a header can have: what every receiver takes, and small enough for any packet.
pub const HEADER_CAPACITY: usize = 232;

/// IP packets up to this length get through everywhere (RFC 8200, section 5; IPv4 guarantees less, and links below are as rare).
/// So long may one become that is made longer on its way.
pub const LEAST_MTU: usize = 1280;

/// An address with a port. Its alignment has the programs write it by words.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Address {
    /// IPv6, or IPv4 mapped into it.
    pub ip: [u8; 16],
    /// The port.
    pub port: u16,
    /// Makes the size a multiple of four.
    pub reserved: u16,
}

impl Address {
    /// An address.
    #[must_use]
    #[inline(always)]
    pub const fn new(ip: [u8; 16], port: u16) -> Self {
        Self { ip, port, reserved: 0 }
    }

    /// Makes it `a.b.c.d`, in network order, if no other than IPv4 addresses were in it before: what is zero in all of them stays.
    #[inline(always)]
    pub const fn set_mapped(&mut self, ip: u32) {
        let [.., ff, fe, a, b, c, d] = &mut self.ip;
        (*ff, *fe) = (0xFF, 0xFF);
        [*a, *b, *c, *d] = ip.to_ne_bytes();
    }

    /// Makes it IPv6, of words in network order.
    #[inline(always)]
    pub const fn set(&mut self, ip: [u32; 4]) {
        let (words, _) = self.ip.as_chunks_mut::<4>();
        let [w0, w1, w2, w3] = words else { return };
        *w0 = ip[0].to_ne_bytes();
        *w1 = ip[1].to_ne_bytes();
        *w2 = ip[2].to_ne_bytes();
        *w3 = ip[3].to_ne_bytes();
    }

    /// `a.b.c.d` as IPv6.
    #[must_use]
    #[inline(always)]
    pub const fn mapped(ip: [u8; 4]) -> [u8; 16] {
        let [a, b, c, d] = ip;
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, a, b, c, d]
    }
}

/// A connection as it looks between the edge and the backend (the key of maps `PENDING` and `FLOWS`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Key {
    /// Whom the backend takes for its client: the client, or the edge where it masquerades.
    pub source: Address,
    /// The backend.
    pub backend: Address,
}

/// A client's SYN on its way through this processor (map `SLOTS`): what NAT is about to hide.
///
/// Forwarding runs from ingress to egress on one processor, and a batch of packets that the driver hands over together
/// runs through each hook in turn; hence several slots a processor, found by the initial sequence number. Somebody who
/// hits a client's slot, or even its number, can at most have the client's SYN dropped, which is then sent again.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// `CLOCK_MONOTONIC` in nanoseconds; 0 if the slot is empty.
    pub at_ns: u64,
    /// The SYN's sequence number.
    pub sequence: u32,
    /// Which listener it is for; [`Slot::DISPUTED`] if two clients claim the number.
    pub listener: u32,
    /// The client, and where it connected to.
    pub addresses: HeaderAddresses,
}

impl Slot {
    /// In place of a listener: SYNs of one batch with the same number, but not of the same client. None of them passes.
    pub const DISPUTED: u32 = u32::MAX;
    /// Slots of a processor; a power of two.
    pub const COUNT: u32 = 256;
    /// How long a packet may take from ingress to egress.
    const FRESH_NS: u64 = 50_000_000;

    /// Which slot a SYN with this sequence number uses.
    #[must_use]
    #[inline(always)]
    pub const fn index(sequence: u32) -> u32 {
        (sequence ^ (sequence >> 16)) & (Self::COUNT - 1)
    }

    /// Whether this is the slot of a SYN with this sequence number that leaves now.
    #[must_use]
    #[inline(always)]
    pub const fn fits(&self, sequence: u32, now_ns: u64) -> bool {
        self.listener != Self::DISPUTED && self.waits_for(sequence, now_ns)
    }

    #[inline(always)]
    const fn waits_for(&self, sequence: u32, now_ns: u64) -> bool {
        self.at_ns != 0 && self.sequence == sequence && now_ns.wrapping_sub(self.at_ns) <= Self::FRESH_NS
    }

    /// Remembers a SYN. While another client's with the same number has not left, neither is known any more.
    #[inline(always)]
    pub fn remember(&mut self, sequence: u32, listener: u32, addresses: &HeaderAddresses, now_ns: u64) {
        let disputed = self.waits_for(sequence, now_ns)
            && (self.listener == Self::DISPUTED || !self.addresses.same(addresses));
        self.at_ns = now_ns;
        self.sequence = sequence;
        self.listener = if disputed { Self::DISPUTED } else { listener };
        self.addresses = *addresses;
    }
}

/// A listener (map `LISTENERS`, by address; the address may be unspecified).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Listener {
    /// Its place in the configuration.
    pub id: u32,
}

/// A header without its addresses (map `TEMPLATES`, at [`Template::index`]).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Template {
    /// Length of the header; a multiple of four, for the checksum. 0 if there is none.
    pub len: u32,
    /// Sum of the header's 32-bit words as bpf_csum_diff has it, the addresses taken as zero.
    pub sum: u32,
    /// 1 if the header waits for the client's first bytes, where it speaks first: see [`ToBackend::Wait`].
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

/// The addresses of a header as they stand in it: the client's and the destination's, then their ports, in network order. In
/// a packet they stand in the same order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeaderAddresses {
    /// The first [`HeaderAddresses::IPV4`] or all.
    pub bytes: [u8; Self::IPV6],
    /// 1 for IPv6, 0 for IPv4.
    pub ipv6: u32,
}

impl HeaderAddresses {
    /// Their length for IPv4.
    pub const IPV4: usize = 12;
    /// For IPv6.
    pub const IPV6: usize = 36;

    /// Whether they are equal: word by word, for programs have no function that compares memory.
    #[must_use]
    #[inline(always)]
    pub fn same(&self, other: &Self) -> bool {
        let (words, _) = self.bytes.as_chunks::<4>();
        let (others, _) = other.bytes.as_chunks::<4>();
        let differs =
            |(one, other): (&[u8; 4], &[u8; 4])| u32::from_ne_bytes(*one) ^ u32::from_ne_bytes(*other);
        self.ipv6 == other.ipv6 && words.iter().zip(others).map(differs).fold(0, |all, bits| all | bits) == 0
    }

    /// The client, and where it connected to; `None` if the ports are missing.
    #[must_use]
    pub fn read(&self) -> Option<(Address, Address)> {
        let (ips, ports) = self.bytes.split_at_checked(if self.ipv6 == 0 { 8 } else { 32 })?;
        let ip = |bytes: &[u8]| match bytes {
            [a, b, c, d] => Some(Address::mapped([*a, *b, *c, *d])),
            _ => bytes.try_into().ok(),
        };
        let (source, destination) = ips.split_at_checked(ips.len() / 2)?;
        let ([[sp0, sp1], [dp0, dp1], ..], _) = ports.as_chunks::<2>() else { return None };
        let client = Address::new(ip(source)?, u16::from_be_bytes([*sp0, *sp1]));
        Some((client, Address::new(ip(destination)?, u16::from_be_bytes([*dp0, *dp1]))))
    }
}

impl Default for HeaderAddresses {
    fn default() -> Self {
        Self { bytes: [0; Self::IPV6], ipv6: 0 }
    }
}

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

/// What becomes of a segment from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToBackend {
    /// It goes as it is.
    Pass,
    /// It goes with the header as its payload.
    Append,
    /// It goes no further. The client speaks first: its first bytes end the handshake as well, with the header in front of them,
    /// and spare a packet and its acknowledgement. Should none come, the backend sends its SYN again after a second (RFC 6298,
    /// section 2), the client repeats its answer, and the header goes with that.
    Wait,
    /// It goes with the header in front of its payload; where both together are longer than [`LEAST_MTU`], as by
    /// [`ToBackend::Follow`].
    Prepend,
    /// It goes later by the header's length, right behind a packet with the header alone.
    Follow,
    /// It goes later by the header's length.
    Shift,
}

/// Decides on a segment from the client.
///
/// A bare acknowledgement before the header is acknowledged is the end of the handshake, or a repetition of it because the
/// backend has sent its SYN again: it has not got the header. The client's first bytes take the header with them, if none was
/// sent. Whatever else comes first (what is behind them, a FIN) is shifted and leaves a gap at the backend, which then asks for it:
/// see [`to_client`].
///
/// First bytes that are sent again, because they and the header were lost, do not share a packet: it may have been too long for
/// the path after all, of which the client would be told without end.
#[must_use]
#[inline(always)]
pub const fn to_backend(flow: &Flow, segment: &Segment) -> ToBackend {
    if segment.is(SYN) {
        return ToBackend::Pass;
    }
    if flow.is(Flag::Acknowledged) {
        return ToBackend::Shift;
    }
    let sent = flow.is(Flag::Sent);
    if segment.is(RST) {
        // Before the header the backend expects just this number.
        return if sent { ToBackend::Shift } else { ToBackend::Pass };
    }
    if segment.sequence != flow.first || (segment.payload == 0 && segment.is(FIN)) {
        return ToBackend::Shift;
    }
    let waits = flow.waits != 0;
    if segment.payload == 0 {
        return if waits && !flow.is(Flag::Waited) { ToBackend::Wait } else { ToBackend::Append };
    }
    match (sent, waits) {
        // The urgent pointer counts from the segment's start.
        (false, _) if !segment.is(URG) => ToBackend::Prepend,
        (false, _) | (true, true) => ToBackend::Follow,
        // The header went ahead with the handshake's end and is under way.
        (true, false) => ToBackend::Shift,
    }
}

/// What becomes of a segment from the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToClient {
    /// It goes as it is.
    Pass,
    /// It goes as it is, with a smaller window: the header will take the first of it.
    Open,
    /// It acknowledges earlier by the header's length.
    Shift,
    /// It acknowledges the header and says no more: the client, which knows of none, need not hear it. With SACK blocks it does
    /// say more, and goes as by [`ToClient::Shift`].
    Swallow,
    /// It acknowledges nothing of the client's: the header is under way.
    Hold,
    /// The backend asks for the header: it gets it, and the client is spared the question.
    Answer,
}

/// Decides on a segment from the backend.
#[must_use]
#[inline(always)]
pub const fn to_client(flow: &Flow, segment: &Segment) -> ToClient {
    if !segment.is(ACK) {
        return ToClient::Pass;
    }
    if segment.is(SYN) {
        return ToClient::Open;
    }
    if flow.is(Flag::Acknowledged) {
        return ToClient::Shift;
    }
    let beyond = segment.acknowledgement.wrapping_sub(flow.first);
    if beyond >= 1 << 31 {
        // Older than the connection: TCP ignores it.
        return ToClient::Pass;
    }
    let bare = segment.payload == 0 && !segment.is(FIN | RST);
    if beyond >= flow.header_len {
        // With a closed window it does say something.
        let no_more = beyond == flow.header_len && bare && segment.window != 0;
        return if no_more { ToClient::Swallow } else { ToClient::Shift };
    }
    if bare { ToClient::Answer } else { ToClient::Hold }
}

/// Whether this segment of the backend acknowledges the header, which no other did before.
#[must_use]
#[inline(always)]
pub const fn acknowledges(flow: &Flow, segment: &Segment) -> bool {
    !flow.is(Flag::Acknowledged)
        && segment.is(ACK)
        && !segment.is(SYN)
        && matches!(to_client(flow, segment), ToClient::Shift | ToClient::Swallow)
}

/// What happened to a connection: the daemon hears of it by the ring buffer `EVENTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// One of [`Event::ACKNOWLEDGED`] and those that follow it.
    pub kind: u32,
    /// Makes what follows start on a word's boundary.
    pub reserved: u32,
    /// Which connection.
    pub key: Key,
    /// Its state then.
    pub flow: Flow,
}

impl Event {
    /// The backend has the header.
    pub const ACKNOWLEDGED: u32 = 1;
    /// Both sides have finished, or one has reset.
    pub const ENDED: u32 = 2;
}

/// A connection that has ended. The daemon lists them in a packet that is never sent, for the program `sweep`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// Which connection,
    pub key: Key,
    /// and which of those that had the same ports ([`Flow::created_ns`]).
    pub created_ns: u64,
}

impl Ended {
    /// Where the first stands: behind the Ethernet header that the kernel asks for, on a word's boundary.
    pub const AT: usize = 16;
    /// So many to a packet. With what the kernel puts around it, that must fit into a page (bpf_test_init,
    /// net/bpf/test_run.c).
    pub const MOST: usize = 64;

    /// This one.
    #[must_use]
    pub const fn new(key: Key, flow: &Flow) -> Self {
        Self { key, created_ns: flow.created_ns }
    }
}

/// Every way through a program ends in one of these, or is plain forwarding; each is an index of the per-CPU array `TALLIES`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// `client_in`: a SYN for a listener, remembered for `backend_out`.
    Remembered,
    /// `client_in`: a SYN with data (Fast Open); dropped, the client sends it again without.
    FastOpen,
    /// `backend_out`: a SYN whose client is known: a new flow.
    Opened,
    /// `backend_out`: a forwarded SYN to a backend's PROXY port whose client is not known; dropped.
    NoSlot,
    /// `backend_out`: a forwarded segment to a backend's PROXY port that belongs to no flow; dropped.
    NoFlow,
    /// `backend_out`: a fragment to a backend; dropped.
    Fragment,
    /// `backend_out`: the header sent as payload of the client's acknowledgement.
    Appended,
    /// `backend_out`: the end of a handshake kept back until the client speaks.
    Waited,
    /// `backend_out`: the header sent in front of the client's first bytes.
    Prepended,
    /// `backend_out`: the header sent ahead of the client's first bytes, in a packet of its own.
    SentAhead,
    /// `backend_out`: the header could not be added; dropped, both sides will ask again.
    AppendFailed,
    /// `backend_out`: the map `FLOWS` is full; dropped.
    Full,
    /// `backend_in`: the header sent as an answer to the backend.
    Answered,
    /// `backend_in`: the backend asked for the header again too soon; dropped.
    TooSoon,
    /// `backend_in`: the header could not be sent as an answer; dropped, the backend will ask again.
    AnswerFailed,
    /// `backend_in`: the backend has acknowledged the header.
    Acknowledged,
    /// Either way: both sides have finished, or one has reset.
    Ended,
    /// Either way: numbers could not be rewritten; dropped.
    RewriteFailed,
    /// The ring buffer was full: the daemon missed an event.
    EventLost,
}

impl Counter {
    /// All of them, in the order of their indices.
    pub const ALL: [Self; 19] = [
        Self::Remembered,
        Self::FastOpen,
        Self::Opened,
        Self::NoSlot,
        Self::NoFlow,
        Self::Fragment,
        Self::Appended,
        Self::Waited,
        Self::Prepended,
        Self::SentAhead,
        Self::AppendFailed,
        Self::Full,
        Self::Answered,
        Self::TooSoon,
        Self::AnswerFailed,
        Self::Acknowledged,
        Self::Ended,
        Self::RewriteFailed,
        Self::EventLost,
    ];

    /// The program that counts it, and the event's name: the labels of `injector_bpf_events_total`.
    #[must_use]
    pub const fn labels(self) -> (&'static str, &'static str) {
        match self {
            Self::Remembered => ("client_in", "remembered"),
            Self::FastOpen => ("client_in", "fast_open"),
            Self::Opened => ("backend_out", "opened"),
            Self::NoSlot => ("backend_out", "no_slot"),
            Self::NoFlow => ("backend_out", "no_flow"),
            Self::Fragment => ("backend_out", "fragment"),
            Self::Appended => ("backend_out", "appended"),
            Self::Waited => ("backend_out", "waited"),
            Self::Prepended => ("backend_out", "prepended"),
            Self::SentAhead => ("backend_out", "sent_ahead"),
            Self::AppendFailed => ("backend_out", "append_failed"),
            Self::Full => ("backend_out", "full"),
            Self::Answered => ("backend_in", "answered"),
            Self::TooSoon => ("backend_in", "too_soon"),
            Self::AnswerFailed => ("backend_in", "answer_failed"),
            Self::Acknowledged => ("backend_in", "acknowledged"),
            Self::Ended => ("inline", "ended"),
            Self::RewriteFailed => ("inline", "rewrite_failed"),
            Self::EventLost => ("inline", "event_lost"),
        }
    }
}

const _: () = assert!(HEADER_CAPACITY <= proxy::MAX_LEN && HEADER_CAPACITY.is_multiple_of(4));

#[cfg(feature = "user")]
mod pod {
    use super::{Address, Ended, Event, Flow, Key, Listener, Slot, Template};

    // SAFETY: each is `repr(C)`, plain integers and bytes, no padding, every bit pattern valid.
    unsafe impl aya::Pod for Address {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Key {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Slot {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Listener {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Template {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Flow {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Event {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Ended {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: u32 = 1000;
    const LEN: u32 = 28;

    fn flow(flags: &[Flag]) -> Flow {
        let mut flow = Flow { first: FIRST, header_len: LEN, ..Flow::default() };
        flags.iter().for_each(|flag| flow.set(*flag));
        flow
    }

    fn from_client(flags: u8, sequence: u32, payload: u32) -> Segment {
        Segment { flags, sequence, payload, acknowledgement: 7, window: 500 }
    }

    fn from_backend(flags: u8, acknowledgement: u32, payload: u32) -> Segment {
        Segment { flags, sequence: 7, acknowledgement, payload, window: 500 }
    }

    #[test]
    fn no_padding() {
        assert_eq!(size_of::<Key>(), 40);
        assert_eq!(size_of::<Slot>(), 16 + 40);
        assert_eq!(size_of::<Flow>(), 16 + 12 + 4 + 40 + 24 + 32 + 16);
        assert_eq!(size_of::<Event>(), 8 + 40 + size_of::<Flow>());
        assert_eq!(size_of::<Ended>(), 40 + 8);
        assert_eq!(size_of::<Template>(), 12 + HEADER_CAPACITY);
    }

    #[test]
    fn segments_of_the_client() {
        for (state, segment, expected) in [
            // The handshake, and its repetitions.
            (&[][..], from_client(SYN, FIRST - 1, 0), ToBackend::Pass),
            (&[][..], from_client(ACK, FIRST, 0), ToBackend::Append),
            (&[Flag::Sent], from_client(ACK, FIRST, 0), ToBackend::Append),
            (&[Flag::Sent], from_client(SYN, FIRST - 1, 0), ToBackend::Pass),
            // Data or an end before, and after.
            (&[][..], from_client(ACK | PSH, FIRST, 5), ToBackend::Prepend),
            (&[][..], from_client(ACK | PSH | FIN, FIRST, 5), ToBackend::Prepend),
            (&[][..], from_client(ACK | URG, FIRST, 5), ToBackend::Follow),
            (&[][..], from_client(ACK, FIRST + 5, 5), ToBackend::Shift),
            (&[][..], from_client(ACK | FIN, FIRST, 0), ToBackend::Shift),
            (&[Flag::Sent], from_client(ACK, FIRST, 5), ToBackend::Shift),
            (&[Flag::Sent], from_client(ACK | FIN, FIRST, 0), ToBackend::Shift),
            (&[Flag::Sent], from_client(ACK, FIRST + 5, 0), ToBackend::Shift),
            // A keep-alive probe.
            (&[Flag::Sent], from_client(ACK, FIRST - 1, 0), ToBackend::Shift),
            // Resets must have exactly the number that the backend expects (RFC 5961).
            (&[][..], from_client(RST, FIRST, 0), ToBackend::Pass),
            (&[Flag::Sent], from_client(RST, FIRST, 0), ToBackend::Shift),
            // Acknowledged once is acknowledged for good, however far the numbers have come.
            (&[Flag::Acknowledged], from_client(ACK, FIRST, 0), ToBackend::Shift),
            (&[Flag::Acknowledged], from_client(ACK, FIRST.wrapping_sub(9), 100), ToBackend::Shift),
        ] {
            assert_eq!(to_backend(&flow(state), &segment), expected, "{state:?} {segment:?}");
        }
    }

    #[test]
    fn segments_of_a_client_that_speaks_first() {
        let waits = |flags: &[Flag]| Flow { waits: 1, ..flow(flags) };
        for (state, segment, expected) in [
            // The end of the handshake waits once.
            (&[][..], from_client(ACK, FIRST, 0), ToBackend::Wait),
            (&[Flag::Waited], from_client(ACK, FIRST, 0), ToBackend::Append),
            // A keep-alive probe is no end of a handshake.
            (&[Flag::Waited], from_client(ACK, FIRST - 1, 0), ToBackend::Shift),
            (&[Flag::Waited], from_client(ACK | PSH, FIRST, 5), ToBackend::Prepend),
            // Its own acknowledgement was lost before it came here.
            (&[][..], from_client(ACK | PSH, FIRST, 5), ToBackend::Prepend),
            (&[Flag::Waited], from_client(ACK | URG, FIRST, 5), ToBackend::Follow),
            // Sent again, and what comes behind.
            (&[Flag::Waited, Flag::Sent], from_client(ACK | PSH, FIRST, 5), ToBackend::Follow),
            (&[Flag::Waited, Flag::Sent], from_client(ACK, FIRST + 5, 5), ToBackend::Shift),
            (&[Flag::Waited], from_client(ACK, FIRST + 5, 5), ToBackend::Shift),
            // It leaves, with a word and without.
            (&[Flag::Waited], from_client(ACK | FIN, FIRST, 5), ToBackend::Prepend),
            (&[Flag::Waited], from_client(ACK | FIN, FIRST, 0), ToBackend::Shift),
            (&[Flag::Waited], from_client(RST, FIRST, 0), ToBackend::Pass),
            (&[Flag::Acknowledged], from_client(ACK, FIRST, 5), ToBackend::Shift),
        ] {
            assert_eq!(to_backend(&waits(state), &segment), expected, "{state:?} {segment:?}");
        }
    }

    #[test]
    fn segments_of_the_backend() {
        let sent = &[Flag::Sent][..];
        for (state, segment, expected) in [
            (&[][..], from_backend(SYN | ACK, FIRST, 0), ToClient::Open),
            (sent, from_backend(SYN | ACK, FIRST, 0), ToClient::Open),
            // Refused.
            (&[][..], from_backend(RST | ACK, FIRST, 0), ToClient::Hold),
            (sent, from_backend(RST, 0, 0), ToClient::Pass),
            // The header is missing, in whole or in part.
            (sent, from_backend(ACK, FIRST, 0), ToClient::Answer),
            (sent, from_backend(ACK, FIRST + LEN - 1, 0), ToClient::Answer),
            (&[][..], from_backend(ACK, FIRST, 0), ToClient::Answer),
            (sent, from_backend(ACK, FIRST, 9), ToClient::Hold),
            (sent, from_backend(ACK | FIN, FIRST, 0), ToClient::Hold),
            // It has come, and there is nothing else to say, or there is.
            (sent, from_backend(ACK, FIRST + LEN, 0), ToClient::Swallow),
            (sent, Segment { window: 0, ..from_backend(ACK, FIRST + LEN, 0) }, ToClient::Shift),
            (sent, from_backend(ACK, FIRST + LEN, 9), ToClient::Shift),
            (sent, from_backend(ACK | FIN, FIRST + LEN, 0), ToClient::Shift),
            (sent, from_backend(ACK, FIRST + LEN + 1, 0), ToClient::Shift),
            (sent, from_backend(ACK, FIRST + LEN + 5000, 40), ToClient::Shift),
            (sent, from_backend(ACK, FIRST - 1, 0), ToClient::Pass),
            // And stays so, 2 GiB later too.
            (&[Flag::Acknowledged], from_backend(ACK, FIRST.wrapping_add(3 << 30), 0), ToClient::Shift),
            (&[Flag::Acknowledged], from_backend(ACK, FIRST, 0), ToClient::Shift),
        ] {
            assert_eq!(to_client(&flow(state), &segment), expected, "{state:?} {segment:?}");
        }
    }

    #[test]
    fn the_header_is_acknowledged_once() {
        assert!(acknowledges(&flow(&[Flag::Sent]), &from_backend(ACK, FIRST + LEN, 0)));
        assert!(!acknowledges(&flow(&[Flag::Sent]), &from_backend(ACK, FIRST, 0)));
        assert!(!acknowledges(&flow(&[Flag::Sent]), &from_backend(SYN | ACK, FIRST + LEN, 0)));
        assert!(!acknowledges(&flow(&[Flag::Acknowledged]), &from_backend(ACK, FIRST + LEN, 0)));
    }

    #[test]
    fn the_decisions_hold_across_the_wrap() {
        let flow = Flow { first: u32::MAX - 5, ..flow(&[Flag::Sent]) };
        assert_eq!(to_client(&flow, &from_backend(ACK, u32::MAX - 5, 0)), ToClient::Answer);
        assert_eq!(to_client(&flow, &from_backend(ACK, 21, 0)), ToClient::Answer);
        assert_eq!(to_client(&flow, &from_backend(ACK, 22, 0)), ToClient::Swallow);
        assert_eq!(to_client(&flow, &from_backend(ACK, 23, 0)), ToClient::Shift);
        assert_eq!(to_client(&flow, &from_backend(ACK, u32::MAX - 6, 0)), ToClient::Pass);
    }

    #[test]
    fn an_address_is_set_in_place() {
        let mut address = Address::new([0; 16], 25);
        address.set_mapped(u32::from_ne_bytes([10, 0, 0, 255]));
        address.set_mapped(u32::from_ne_bytes([192, 0, 2, 1]));
        assert_eq!(address, Address::new(Address::mapped([192, 0, 2, 1]), 25));
        let ip = *b"0123456789abcdef";
        let (words, _) = ip.as_chunks::<4>();
        address.set(core::array::from_fn(|at| u32::from_ne_bytes(words[at])));
        assert_eq!(address, Address::new(ip, 25));
    }

    #[test]
    fn a_slot_is_that_of_one_syn_and_for_a_moment() {
        let slot = Slot { at_ns: 100, sequence: 7, ..Slot::default() };
        assert!(slot.fits(7, 100) && slot.fits(7, 100 + 50_000_000));
        assert!(!slot.fits(8, 100) && !slot.fits(7, 101 + 50_000_000) && !slot.fits(7, 99));
        assert!(!Slot::default().fits(0, 0));
    }

    fn of_client(last: u8) -> HeaderAddresses {
        let mut addresses = HeaderAddresses::default();
        addresses.bytes[3] = last;
        addresses
    }

    #[test]
    fn two_clients_with_one_number_are_both_unknown() {
        let mut slot = Slot::default();
        slot.remember(7, 1, &of_client(1), 100);
        assert!(slot.fits(7, 100) && slot.listener == 1 && slot.addresses == of_client(1));
        // Its own again.
        slot.remember(7, 1, &of_client(1), 110);
        assert!(slot.fits(7, 110));
        // Another's, and once more: whoever comes in between, nobody is known.
        slot.remember(7, 1, &of_client(2), 120);
        assert!(!slot.fits(7, 120));
        slot.remember(7, 1, &of_client(2), 130);
        slot.remember(7, 1, &of_client(1), 130);
        assert!(!slot.fits(7, 130));
        // Later, or with another number, it begins anew; so it does when the SYN has left.
        let disputed = slot;
        slot.remember(7, 1, &of_client(1), 131 + Slot::FRESH_NS);
        assert!(slot.fits(7, 131 + Slot::FRESH_NS));
        slot = disputed;
        slot.remember(8, 1, &of_client(2), 140);
        assert!(slot.fits(8, 140) && slot.addresses == of_client(2));
        slot.at_ns = 0;
        slot.remember(8, 1, &of_client(3), 150);
        assert!(slot.fits(8, 150) && slot.addresses == of_client(3));
    }

    #[test]
    fn addresses_differ_by_any_byte() {
        for at in 0..HeaderAddresses::IPV6 {
            let mut other = HeaderAddresses::default();
            other.bytes[at] = 1;
            assert!(!other.same(&HeaderAddresses::default()) && other.same(&other), "{at}");
        }
        let other = HeaderAddresses { ipv6: 1, ..HeaderAddresses::default() };
        assert!(!other.same(&HeaderAddresses::default()));
    }

    #[test]
    fn a_syn_is_a_connections_own_by_number_and_client() {
        let slot = Slot { sequence: FIRST - 1, addresses: of_client(1), ..Slot::default() };
        let mut flow = Flow::default();
        let template = Template { len: LEN, sum: 0, waits: 1, bytes: [0; HEADER_CAPACITY] };
        flow.open(&slot, &template, 5);
        assert!(flow.waits == 1 && flow.header_len == LEN);
        flow.addresses = slot.addresses;
        assert!(flow.is_of(&slot));
        assert!(!flow.is_of(&Slot { sequence: FIRST, ..slot }));
        assert!(!flow.is_of(&Slot { addresses: of_client(2), ..slot }));
        assert!(!flow.is_of(&Slot { listener: 1, ..slot }));
        let mut reset = flow;
        reset.set(Flag::BackendRst);
        assert!(!reset.is_of(&slot));
    }

    #[test]
    fn a_handshake_ends_with_the_backends_number_and_no_other() {
        let accepted = Flow { acknowledged: 50, ..flow(&[Flag::Accepted]) };
        let segment = |flags, acknowledgement| Segment { flags, acknowledgement, ..Segment::default() };
        assert!(accepted.is_accepted_by(&segment(ACK, 50)));
        assert!(accepted.is_accepted_by(&segment(ACK | FIN, 50)));
        assert!(!accepted.is_accepted_by(&segment(ACK, 51)) && !accepted.is_accepted_by(&segment(ACK, 49)));
        assert!(!accepted.is_accepted_by(&segment(FIN, 50)));
        assert!(!Flow { acknowledged: 50, ..flow(&[]) }.is_accepted_by(&segment(ACK, 50)));
    }

    #[test]
    fn a_flow_ends_by_two_fins_or_one_reset() {
        for (state, closed) in [
            (&[Flag::ClientFin][..], false),
            (&[Flag::BackendFin], false),
            (&[Flag::ClientFin, Flag::BackendFin], true),
            (&[Flag::ClientRst], true),
            (&[Flag::BackendRst], true),
        ] {
            assert_eq!(flow(state).closed(), closed, "{state:?}");
        }
    }

    #[test]
    fn a_template_and_its_addresses_are_the_header() {
        use crate::proxy::{Addresses, Command, v2};
        for (source, destination, ipv6) in [
            ("198.51.100.7:40000", "192.0.2.10:25", false),
            ("[2001:db8::7]:40000", "[2001:db8:1::10]:25", true),
        ] {
            let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
            let mut rendered = [0; 64];
            let addresses = Command::Proxy(Addresses::new(source, destination));
            let len = v2::encode(&addresses, &[], &mut rendered).unwrap();
            let template = Template::new(&rendered[..len], ipv6, false).unwrap();
            let count = if ipv6 { HeaderAddresses::IPV6 } else { HeaderAddresses::IPV4 };
            let mut addresses = HeaderAddresses { ipv6: ipv6.into(), ..HeaderAddresses::default() };
            addresses.bytes[..count].copy_from_slice(&rendered[16..16 + count]);
            let mut again = template.bytes;
            again[16..16 + count].copy_from_slice(&addresses.bytes[..count]);
            assert_eq!(again[..len], rendered[..len]);

            let address = |address: core::net::SocketAddr| {
                let ip = match address.ip() {
                    core::net::IpAddr::V4(ip) => Address::mapped(ip.octets()),
                    core::net::IpAddr::V6(ip) => ip.octets(),
                };
                Address::new(ip, address.port())
            };
            assert_eq!(addresses.read(), Some((address(source), address(destination))));
        }
        assert!(Template::new(&[0; 29], false, false).is_none());
        assert!(Template::new(&[0; 24], false, false).is_none());
        assert!(Template::new(&[0; 236], false, false).is_none());
    }

    #[test]
    fn counters_stand_at_their_index() {
        for (index, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, index);
        }
    }
}
