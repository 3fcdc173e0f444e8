//! The state of one spliced direction, and the credit that limits it.

use super::FIRST_NOTIFY;
use crate::SeqNumber;

/// The value for one spliced direction (map `FLOWS`, by the source's socket cookie).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Bytes handed to the target since the flow was made.
    pub redirected: u64,
    /// Bytes dropped because they had no target, or were out of order. Above zero the stream is broken:
    /// the program forwards nothing more, and the daemon resets the connection.
    pub lost: u64,
    /// `CLOCK_MONOTONIC` of the last payload, in nanoseconds; 0 before the first.
    pub last_ns: u64,
    /// When `redirected` has come this far, the program sends a [`BacklogEvent`](super::BacklogEvent).
    pub notify_at: u64,
    /// 1 while payload goes to user space instead. It stays 1 until user space has written all of it
    /// ([`Credit::resume_at`]): otherwise later payload would overtake earlier payload.
    pub passing: u64,
    /// Bytes passed to user space since the flow was made.
    pub passed: u64,
    /// The sequence number of the next new byte.
    pub next: SeqNumber,
    /// Pads the size to a multiple of the alignment.
    pub reserved: u32,
}

impl Flow {
    /// A new flow. The stream's next byte has the sequence number `next`.
    #[must_use]
    pub const fn new(next: SeqNumber) -> Self {
        let (redirected, lost, last_ns, passing, passed) = (0, 0, 0, 0, 0);
        Self { redirected, lost, last_ns, notify_at: FIRST_NOTIFY, passing, passed, next, reserved: 0 }
    }
}

/// How many bytes at the start of a segment were received before. The segment has `len` bytes and
/// begins at `sequence`; `next` is the next new byte. `None` if the segment has no new byte or leaves a
/// gap.
///
/// A peer that did not receive an acknowledgement retransmits bytes, possibly together with new ones.
/// TCP queues such a segment unchanged (tcp_data_queue, net/ipv4/tcp_input.c: "partial packet") and
/// skips the old bytes on reading, but tcp_read_skb (net/ipv4/tcp.c) passes it on whole.
#[must_use]
#[inline(always)]
pub fn repeated(next: SeqNumber, sequence: SeqNumber, len: u32) -> Option<u32> {
    let before = next - sequence;
    if before < len { Some(before) } else { None }
}

/// How much the program may redirect in one spliced direction (map `CREDIT`, by the source's socket
/// cookie). Only the daemon writes it; only the program writes the [`Flow`].
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credit {
    /// The total of bytes that may be redirected. The daemon raises it as the target acknowledges bytes.
    pub limit: u64,
    /// When [`Flow::passed`] equals this, user space has written all payload that was passed to it, and
    /// the program redirects again. More payload passed meanwhile cancels that. [`Credit::NEVER`]
    /// disables it.
    pub resume_at: u64,
}

impl Credit {
    /// The program does not redirect again by itself.
    pub const NEVER: u64 = u64::MAX;

    /// Redirect up to `limit` bytes, and pass everything after them to user space.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::splice::next_notify;

    #[test]
    fn notifications_come_at_doubling_sizes_and_then_every_step() {
        const STEP: u64 = 512 * 1024;
        let mut at = Flow::new(SeqNumber(0)).notify_at;
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
            assert_eq!(
                repeated(SeqNumber(next), SeqNumber(sequence), len),
                repeats,
                "{next} {sequence} {len}"
            );
        }
    }

    #[test]
    fn the_verdict_on_a_segment() {
        let flow =
            |redirected, passing, passed| Flow { redirected, passing, passed, ..Flow::new(SeqNumber(0)) };
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
}
