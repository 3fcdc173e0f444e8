//! What the splice engine's programs and the daemon agree on: the values in the maps, and the counters.
//!
//! The maps themselves are listed in `docs/architecture.md`. Everything is in the host's byte order and laid out
//! as C would; `zeroed` values are valid everywhere.

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

/// An entry of the map `PEER_ISNS`: the initial sequence number that a connecting socket's peer chose,
/// and which of the sockets that share the entry it belongs to. Both are in one word, so a reader never
/// sees half of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerIsn(pub u64);

impl PeerIsn {
    /// Entries of the map. The kernel assigns cookies in sequence, so an entry stays until about this
    /// many more sockets of the whole machine have got one. The daemon reads it right after it was
    /// written.
    pub const COUNT: u32 = 16 * 1024;

    /// The index of the entry of the socket with this cookie, below [`PeerIsn::COUNT`].
    #[must_use]
    pub const fn index(cookie: u64) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "less than COUNT")]
        let index = (cookie % Self::COUNT as u64) as u32;
        index
    }

    /// The entry of the socket with this cookie.
    #[must_use]
    pub const fn new(cookie: u64, sequence: u32) -> Self {
        Self(Self::generation(cookie) << 32 | sequence as u64)
    }

    /// The sequence number, if the entry belongs to the socket with this cookie.
    #[must_use]
    pub const fn sequence(self, cookie: u64) -> Option<u32> {
        #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
        let sequence = self.0 as u32;
        if self.0 >> 32 == Self::generation(cookie) { Some(sequence) } else { None }
    }

    /// Tells the sockets apart that share an entry. For the first 2^46 sockets it is never 0, which an
    /// unwritten entry has.
    const fn generation(cookie: u64) -> u64 {
        (cookie / Self::COUNT as u64 + 1) & u32::MAX as u64
    }
}

/// The value for one spliced direction (map `FLOWS`, by the source's socket cookie).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Bytes handed to the target since the flow was made.
    pub redirected: u64,
    /// Bytes that had no target to go to, or that did not fit into the stream. Above zero the stream is broken: nothing
    /// more is passed on, and it ends in a reset, never in a FIN.
    pub lost: u64,
    /// `CLOCK_MONOTONIC` of the last payload, in nanoseconds; 0 before the first.
    pub last_ns: u64,
    /// When `redirected` has come this far, the program sends a [`BacklogEvent`].
    pub notify_at: u64,
    /// 1 while payload is left to user space instead. It stays so until user space has written all of it
    /// ([`Credit::resume_at`]), or payload would overtake payload.
    pub passing: u64,
    /// Bytes left to user space since the flow was made.
    pub passed: u64,
    /// The sequence number of the next new byte.
    pub next: u32,
    /// Makes the size a multiple of the alignment.
    pub reserved: u32,
}

impl Flow {
    /// A flow that has carried nothing, of a stream whose next byte has the sequence number `next`.
    #[must_use]
    pub const fn new(next: u32) -> Self {
        let (redirected, lost, last_ns, passing, passed) = (0, 0, 0, 0, 0);
        Self { redirected, lost, last_ns, notify_at: FIRST_NOTIFY, passing, passed, next, reserved: 0 }
    }
}

/// How many bytes at the start of a segment of `len` bytes, which begins at `sequence`, had been received before, where
/// `next` is the next new byte; `None` if it has no new byte or does not join.
///
/// A peer that did not hear that its bytes arrived sends them once more, together with new ones. TCP queues such a segment
/// as it is (tcp_data_queue, net/ipv4/tcp_input.c: "partial packet") and skips when it reads; but tcp_read_skb
/// (net/ipv4/tcp.c) hands it over whole.
#[must_use]
#[inline(always)]
pub const fn repeated(next: u32, sequence: u32, len: u32) -> Option<u32> {
    let before = next.wrapping_sub(sequence);
    if before < len { Some(before) } else { None }
}

/// How far the program may go in one spliced direction (map `CREDIT`, by the source's socket cookie). Written by the
/// daemon alone: the flow is the program's.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credit {
    /// How many bytes may be redirected in all, raised as the target takes them.
    pub limit: u64,
    /// When [`Flow::passed`] is just this, user space has written all that was left to it, and the program redirects
    /// again; [`Credit::NEVER`] otherwise. Any more payload that is passed makes the offer void.
    pub resume_at: u64,
}

impl Credit {
    /// No way back.
    pub const NEVER: u64 = u64::MAX;

    /// Redirect up to `limit`, and then leave everything to user space.
    #[must_use]
    pub const fn up_to(limit: u64) -> Self {
        Self { limit, resume_at: Self::NEVER }
    }

    /// Decides where a segment goes.
    #[must_use]
    #[inline(always)]
    pub const fn verdict(&self, flow: &Flow) -> Verdict {
        if flow.redirected >= self.limit {
            return Verdict::Pass;
        }
        if flow.passing == 0 {
            return Verdict::Redirect;
        }
        if flow.passed == self.resume_at { Verdict::Resume } else { Verdict::Pass }
    }
}

/// Where the program `verdict` sends a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To the target.
    Redirect,
    /// To the target, and so do all that follow: user space has caught up.
    Resume,
    /// To user space.
    Pass,
}

/// Bytes after which a flow sends its first [`BacklogEvent`]: the backlog that a stalled target can
/// build up unnoticed.
pub const FIRST_NOTIFY: u64 = 64 * 1024;

/// When a flow that has carried `redirected` bytes sends its next [`BacklogEvent`]: after as many
/// bytes again, at most `step`. Long streams send few events for their size, short ones none.
#[must_use]
#[inline(always)]
pub const fn next_notify(redirected: u64, step: u64) -> u64 {
    let more = if redirected < step { redirected } else { step };
    redirected.wrapping_add(more)
}

/// A record of the ring buffer `BACKLOG_EVENTS`: the daemon should check the backlog of this
/// direction's target.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BacklogEvent {
    /// The source's socket cookie.
    pub source: u64,
}

/// Every way through a program ends in one of these; each is an index of the per-CPU array `COUNTERS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// `inject`: header put in front of the client's first payload.
    HeaderBeforePayload,
    /// `inject`: header sent alone, the doorbell taken out.
    HeaderAlone,
    /// `inject`: a later message of a socket whose header is already sent; passed as it is.
    AfterHeader,
    /// `inject`: the socket has no header in its storage; dropped.
    NoHeader,
    /// `inject`: the stored header has an impossible length; dropped.
    BadHeader,
    /// `inject`: the kernel could not make room in front; dropped.
    PushFailed,
    /// `inject`: the room the kernel made is not what was asked for; dropped.
    ShortPush,
    /// `inject`: the doorbell could not be taken out; dropped.
    PopFailed,
    /// `verdict`: payload handed to the other socket.
    Redirected,
    /// `verdict`: a segment without payload (a bare FIN) discarded; the daemon forwards the FIN.
    Empty,
    /// `verdict`: payload of a socket that has no flow; dropped.
    NoFlow,
    /// `verdict`: payload whose target has left the map; dropped and counted in the flow as lost.
    NoTarget,
    /// `verdict`: a segment that repeated bytes received before; they were cut off.
    Trimmed,
    /// `verdict`: a segment that did not continue the stream, or of which the repeated bytes could not be cut off; dropped
    /// and counted in the flow as lost.
    OutOfOrder,
    /// `verdict`: payload of a stream that has lost some; dropped.
    AfterLoss,
    /// `verdict`: payload left to user space, because the target does not keep up.
    Passed,
    /// `verdict`: payload handed to the other socket again, user space having written all that was left to it.
    Resumed,
    /// `verdict`: the daemon was notified to check a backlog.
    Notified,
    /// `verdict`: the ring buffer was full; the next payload tries again.
    NotifyFailed,
}

impl Counter {
    /// All of them, in the order of their indices.
    pub const ALL: [Self; 19] = [
        Self::HeaderBeforePayload,
        Self::HeaderAlone,
        Self::AfterHeader,
        Self::NoHeader,
        Self::BadHeader,
        Self::PushFailed,
        Self::ShortPush,
        Self::PopFailed,
        Self::Redirected,
        Self::Empty,
        Self::NoFlow,
        Self::NoTarget,
        Self::Trimmed,
        Self::OutOfOrder,
        Self::AfterLoss,
        Self::Passed,
        Self::Resumed,
        Self::Notified,
        Self::NotifyFailed,
    ];

    /// The program that counts it, and the event's name: the labels of `injector_bpf_events_total`.
    #[must_use]
    pub const fn labels(self) -> (&'static str, &'static str) {
        match self {
            Self::HeaderBeforePayload => ("inject", "header_before_payload"),
            Self::HeaderAlone => ("inject", "header_alone"),
            Self::AfterHeader => ("inject", "after_header"),
            Self::NoHeader => ("inject", "no_header"),
            Self::BadHeader => ("inject", "bad_header"),
            Self::PushFailed => ("inject", "push_failed"),
            Self::ShortPush => ("inject", "short_push"),
            Self::PopFailed => ("inject", "pop_failed"),
            Self::Redirected => ("verdict", "redirected"),
            Self::Empty => ("verdict", "empty"),
            Self::NoFlow => ("verdict", "no_flow"),
            Self::NoTarget => ("verdict", "no_target"),
            Self::Trimmed => ("verdict", "trimmed"),
            Self::OutOfOrder => ("verdict", "out_of_order"),
            Self::AfterLoss => ("verdict", "after_loss"),
            Self::Passed => ("verdict", "passed"),
            Self::Resumed => ("verdict", "resumed"),
            Self::Notified => ("verdict", "notified"),
            Self::NotifyFailed => ("verdict", "notify_failed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_isn_belongs_to_one_of_the_sockets_that_share_its_entry() {
        let count = u64::from(PeerIsn::COUNT);
        for cookie in [1, count - 1, count, 7 * count + 1, u64::from(u32::MAX) * count - 1] {
            let entry = PeerIsn::new(cookie, 0xDEAD_BEEF);
            assert!(PeerIsn::index(cookie) < PeerIsn::COUNT);
            assert_eq!(entry.sequence(cookie), Some(0xDEAD_BEEF));
            let next = cookie + count;
            assert_eq!(PeerIsn::index(next), PeerIsn::index(cookie));
            assert_eq!(entry.sequence(next), None);
            // An unwritten entry.
            assert_eq!(PeerIsn(0).sequence(cookie), None);
        }
    }

    #[test]
    fn counters_stand_at_their_index() {
        for (index, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, index);
        }
    }

    #[test]
    fn notifications_come_at_doubling_sizes_and_then_every_step() {
        const STEP: u64 = 512 * 1024;
        let mut at = Flow::new(0).notify_at;
        let mut notified = [0; 7];
        for slot in &mut notified {
            *slot = at / 1024;
            at = next_notify(at, STEP);
        }
        assert_eq!(notified, [64, 128, 256, 512, 1024, 1536, 2048]);
    }

    #[test]
    fn what_a_segment_repeats() {
        const TOP: u32 = u32::MAX;
        for (next, sequence, len, repeats) in [
            (100, 100, 10, Some(0)),
            (100, 95, 10, Some(5)),
            (100, 91, 10, Some(9)),
            // Nothing new.
            (100, 90, 10, None),
            (100, 80, 10, None),
            // A gap.
            (100, 101, 10, None),
            // Across the wrap.
            (2, TOP - 3, 10, Some(6)),
            (TOP, TOP, 1, Some(0)),
            (0, TOP, 2, Some(1)),
            (TOP, 0, 10, None),
        ] {
            assert_eq!(repeated(next, sequence, len), repeats, "{next} {sequence} {len}");
        }
    }

    #[test]
    fn the_verdict_on_a_segment() {
        let flow = |redirected, passing, passed| Flow { redirected, passing, passed, ..Flow::new(0) };
        let offer = |limit, resume_at| Credit { limit, resume_at };
        for (credit, flow, verdict) in [
            (Credit::up_to(100), flow(99, 0, 0), Verdict::Redirect),
            (Credit::up_to(100), flow(100, 0, 0), Verdict::Pass),
            (Credit::up_to(100), flow(5, 1, 7), Verdict::Pass),
            (offer(100, 7), flow(5, 1, 7), Verdict::Resume),
            // More was passed since user space wrote the last of it.
            (offer(100, 7), flow(5, 1, 8), Verdict::Pass),
            (offer(5, 7), flow(5, 1, 7), Verdict::Pass),
            // An offer that was taken means nothing to a flow that goes on.
            (offer(100, 7), flow(5, 0, 7), Verdict::Redirect),
        ] {
            assert_eq!(credit.verdict(&flow), verdict, "{credit:?} {flow:?}");
        }
    }

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
