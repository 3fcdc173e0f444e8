//! The counters of the programs.

/// The outcomes of the programs, except plain forwarding. The value is an index of the per-CPU array
/// `COUNTERS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// `client_in`: a SYN for a listener, stored in `SYN_CACHE` for `backend_out`.
    SynCached,
    /// `client_in`: a SYN with data (Fast Open); dropped, the client sends it again without.
    FastOpen,
    /// `backend_out`: a SYN that is in `SYN_CACHE`: a new flow.
    Opened,
    /// `backend_out`: a forwarded SYN to a backend's PROXY port that is not in `SYN_CACHE`; dropped.
    SynUnknown,
    /// `backend_out`: a forwarded segment to a backend's PROXY port that belongs to no flow; dropped.
    NoFlow,
    /// `backend_out`: a fragment to a backend; dropped.
    Fragment,
    /// `backend_out`: a SYN with data or with flags that no client sends with it; dropped.
    InvalidSyn,
    /// `backend_out`: a segment that would put the client's bytes where the header belongs, or that the backend does not take
    /// ([`ToBackend::Drop`](super::ToBackend::Drop)); dropped.
    InvalidSegment,
    /// `backend_out`: the header sent as payload of the client's acknowledgement.
    Appended,
    /// `backend_out`: the end of a handshake deferred until the client sends data.
    Deferred,
    /// `backend_out`: the header sent in front of the client's first bytes.
    Prepended,
    /// `backend_out`: the header sent ahead of the client's first bytes, in a packet of its own.
    SentAhead,
    /// `backend_out`: the header could not be added; dropped, both sides will retransmit.
    AppendFailed,
    /// `backend_out`: the map `FLOWS` is full; dropped.
    Full,
    /// `backend_in`: the header retransmitted, because the backend asked for it.
    HeaderRetransmitted,
    /// `backend_in`: the backend asked for the header again too soon; dropped.
    TooSoon,
    /// `backend_in`: the header could not be retransmitted; dropped, the backend will ask again.
    RetransmitFailed,
    /// `backend_in`: the backend has acknowledged the header.
    Acknowledged,
    /// `backend_in`: a backend acknowledged a header that was never sent; dropped.
    InvalidAck,
    /// `backend_in`: a SYN-ACK that answers no SYN of a connection that is being opened; dropped.
    StaleSynAck,
    /// `backend_in`: the backend refused a SYN.
    Refused,
    /// Either way: both sides have finished, or one has reset.
    Ended,
    /// Either way: numbers could not be rewritten; dropped.
    RewriteFailed,
    /// The ring buffer was full: the daemon missed an event.
    EventLost,
}

impl Counter {
    /// All of them, in the order of their indices.
    pub const ALL: [Self; 24] = [
        Self::SynCached,
        Self::FastOpen,
        Self::Opened,
        Self::SynUnknown,
        Self::NoFlow,
        Self::Fragment,
        Self::InvalidSyn,
        Self::InvalidSegment,
        Self::Appended,
        Self::Deferred,
        Self::Prepended,
        Self::SentAhead,
        Self::AppendFailed,
        Self::Full,
        Self::HeaderRetransmitted,
        Self::TooSoon,
        Self::RetransmitFailed,
        Self::Acknowledged,
        Self::InvalidAck,
        Self::StaleSynAck,
        Self::Refused,
        Self::Ended,
        Self::RewriteFailed,
        Self::EventLost,
    ];

    /// The program that counts it, and the event's name: the labels of `injector_bpf_events_total`.
    #[must_use]
    pub const fn labels(self) -> (&'static str, &'static str) {
        match self {
            Self::SynCached => ("client_in", "syn_cached"),
            Self::FastOpen => ("client_in", "fast_open"),
            Self::Opened => ("backend_out", "opened"),
            Self::SynUnknown => ("backend_out", "syn_unknown"),
            Self::NoFlow => ("backend_out", "no_flow"),
            Self::Fragment => ("backend_out", "fragment"),
            Self::InvalidSyn => ("backend_out", "invalid_syn"),
            Self::InvalidSegment => ("backend_out", "invalid_segment"),
            Self::Appended => ("backend_out", "appended"),
            Self::Deferred => ("backend_out", "deferred"),
            Self::Prepended => ("backend_out", "prepended"),
            Self::SentAhead => ("backend_out", "sent_ahead"),
            Self::AppendFailed => ("backend_out", "append_failed"),
            Self::Full => ("backend_out", "full"),
            Self::HeaderRetransmitted => ("backend_in", "header_retransmitted"),
            Self::TooSoon => ("backend_in", "too_soon"),
            Self::RetransmitFailed => ("backend_in", "retransmit_failed"),
            Self::Acknowledged => ("backend_in", "acknowledged"),
            Self::InvalidAck => ("backend_in", "invalid_ack"),
            Self::StaleSynAck => ("backend_in", "stale_syn_ack"),
            Self::Refused => ("backend_in", "refused"),
            Self::Ended => ("inline", "ended"),
            Self::RewriteFailed => ("inline", "rewrite_failed"),
            Self::EventLost => ("inline", "event_lost"),
        }
    }
}
