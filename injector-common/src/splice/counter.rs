//! The counters of the programs.

/// The outcomes of the programs. Each run counts at least one. The value is an index of the per-CPU
/// array `COUNTERS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// `inject`: header pushed in front of the client's first payload.
    HeaderBeforePayload,
    /// `inject`: header sent alone, the doorbell removed.
    HeaderAlone,
    /// `inject`: a later message of a socket whose header was sent before; passed unchanged.
    AfterHeader,
    /// `inject`: the socket has no header in its storage; dropped.
    NoHeader,
    /// `inject`: the stored header has an invalid length; dropped.
    BadHeader,
    /// `inject`: the kernel could not push bytes in front of the message; dropped.
    PushFailed,
    /// `inject`: the kernel pushed fewer bytes than requested; dropped.
    ShortPush,
    /// `inject`: the doorbell could not be removed; dropped.
    PopFailed,
    /// `verdict`: payload redirected to the other socket.
    Redirected,
    /// `verdict`: a segment without payload (a bare FIN) discarded; the daemon forwards the FIN.
    Empty,
    /// `verdict`: payload of a socket that has no flow; dropped.
    NoFlow,
    /// `verdict`: payload whose target is no longer in the map; dropped and counted in the flow as lost.
    NoTarget,
    /// `verdict`: a segment that repeated received bytes; those were removed.
    Trimmed,
    /// `verdict`: a segment that did not continue the stream, or whose repeated bytes could not be removed;
    /// dropped and counted in the flow as lost.
    OutOfOrder,
    /// `verdict`: payload of a stream that has lost bytes; dropped.
    AfterLoss,
    /// `verdict`: payload passed to user space, because the target does not keep up.
    Passed,
    /// `verdict`: redirecting resumed, because user space has written all payload passed to it.
    Resumed,
    /// `verdict`: the daemon was notified to check a backlog.
    Notified,
    /// `verdict`: the ring buffer was full; the next segment tries again.
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

    /// The labels of `injector_bpf_events_total`: the program that counts it, and the event's name.
    #[must_use]
    pub const fn labels(self) -> (&'static str, &'static str) {
        (self.program(), self.as_str())
    }

    /// The program that counts it.
    #[must_use]
    pub const fn program(self) -> &'static str {
        match self {
            Self::HeaderBeforePayload
            | Self::HeaderAlone
            | Self::AfterHeader
            | Self::NoHeader
            | Self::BadHeader
            | Self::PushFailed
            | Self::ShortPush
            | Self::PopFailed => "inject",
            _ => "verdict",
        }
    }

    /// The event's name, in metrics and in the log.
    #[must_use]
    #[inline(always)]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::HeaderBeforePayload => "header_before_payload",
            Self::HeaderAlone => "header_alone",
            Self::AfterHeader => "after_header",
            Self::NoHeader => "no_header",
            Self::BadHeader => "bad_header",
            Self::PushFailed => "push_failed",
            Self::ShortPush => "short_push",
            Self::PopFailed => "pop_failed",
            Self::Redirected => "redirected",
            Self::Empty => "empty",
            Self::NoFlow => "no_flow",
            Self::NoTarget => "no_target",
            Self::Trimmed => "trimmed",
            Self::OutOfOrder => "out_of_order",
            Self::AfterLoss => "after_loss",
            Self::Passed => "passed",
            Self::Resumed => "resumed",
            Self::Notified => "notified",
            Self::NotifyFailed => "notify_failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_stand_at_their_index() {
        for (index, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, index);
        }
    }
}
