//! The counters of the program.

/// The outcomes of the program, except plain forwarding. The value is an index of the per-CPU array
/// `COUNTERS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// A SYN taken: a connection is being opened.
    Opened,
    /// A SYN sent again, to the same backend.
    SynRepeated,
    /// A SYN left to the socket: no backend of its family gets connections, or the listener drains.
    NoBackend,
    /// A SYN left to the socket: a limit on connections is reached.
    Limit,
    /// A SYN left to the socket: a limit on its source is reached.
    SourceLimit,
    /// A SYN left to the socket: too many handshakes are unfinished.
    PendingFull,
    /// A SYN left to the socket: `CONNECTIONS` or `FLOWS` is full.
    Full,
    /// A SYN left to the socket: no route to the backend or the client, or the backend is on this host.
    NoRoute,
    /// A SYN left to the socket: no source port towards the backend was free.
    NoPort,
    /// A SYN left to the socket: with data (Fast Open), or flags that clients do not send.
    BadSyn,
    /// A SYN left to the socket: the backend has refused it, or not answered it twice.
    Unanswered,
    /// A SYN left to the socket: translation on the way here has replaced the client's address.
    TranslatedSource,
    /// The client has answered the backend: a connection.
    Established,
    /// A connection replaced by another one of the same addresses and ports.
    Superseded,
    /// A fragment, or TCP behind options or extension headers, of a connection or to a PROXY port; dropped.
    Unreadable,
    /// A packet forwarded to a PROXY port that is no connection's; dropped.
    ProxyPort,
    /// A segment of the client's that would put bytes where the header belongs, or that the backend does not take ([`ToBackend::Drop`](super::ToBackend::Drop)); dropped.
    InvalidSegment,
    /// The header sent as payload of the client's acknowledgement.
    Appended,
    /// The end of a handshake deferred until the client sends data.
    Deferred,
    /// The header sent in front of the client's first bytes.
    Prepended,
    /// The header sent ahead of the client's first bytes, in a packet of its own.
    SentAhead,
    /// The header could not be added; dropped, both sides will send again.
    AppendFailed,
    /// The header sent again, because the backend asked for it.
    HeaderRetransmitted,
    /// The backend asked for the header again too soon; dropped.
    TooSoon,
    /// The header could not be sent again; dropped, the backend will ask again.
    RetransmitFailed,
    /// The backend has acknowledged the header.
    Acknowledged,
    /// A backend acknowledged a header that was never sent; dropped.
    InvalidAck,
    /// A SYN-ACK that answers no SYN of a connection that is being opened; dropped.
    StaleSynAck,
    /// The backend refused a SYN.
    Refused,
    /// A packet with a backend's addresses that came in by the clients' device; dropped.
    WrongDevice,
    /// An ICMP error translated.
    Icmp,
    /// A packet too long for its way: answered by an ICMP error.
    TooBig,
    /// A packet whose hop limit is used up; dropped.
    TtlExceeded,
    /// No route to one end of a connection; dropped.
    RouteLost,
    /// A packet could not be rewritten; dropped.
    RewriteFailed,
    /// Both sides have finished, or one has reset.
    Ended,
    /// A handshake that was not finished in time, removed.
    Abandoned,
    /// A connection that was silent for too long, removed.
    Expired,
    /// The ring buffer was full: the daemon missed an event.
    EventLost,
}

impl Counter {
    /// All of them, in the order of their indices.
    pub const ALL: [Self; 39] = [
        Self::Opened,
        Self::SynRepeated,
        Self::NoBackend,
        Self::Limit,
        Self::SourceLimit,
        Self::PendingFull,
        Self::Full,
        Self::NoRoute,
        Self::NoPort,
        Self::BadSyn,
        Self::Unanswered,
        Self::TranslatedSource,
        Self::Established,
        Self::Superseded,
        Self::Unreadable,
        Self::ProxyPort,
        Self::InvalidSegment,
        Self::Appended,
        Self::Deferred,
        Self::Prepended,
        Self::SentAhead,
        Self::AppendFailed,
        Self::HeaderRetransmitted,
        Self::TooSoon,
        Self::RetransmitFailed,
        Self::Acknowledged,
        Self::InvalidAck,
        Self::StaleSynAck,
        Self::Refused,
        Self::WrongDevice,
        Self::Icmp,
        Self::TooBig,
        Self::TtlExceeded,
        Self::RouteLost,
        Self::RewriteFailed,
        Self::Ended,
        Self::Abandoned,
        Self::Expired,
        Self::EventLost,
    ];

    /// The event's name: the label `event` of `injector_bpf_events_total`.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::SynRepeated => "syn_repeated",
            Self::NoBackend => "to_socket_no_backend",
            Self::Limit => "to_socket_limit",
            Self::SourceLimit => "to_socket_source_limit",
            Self::PendingFull => "to_socket_pending_full",
            Self::Full => "to_socket_full",
            Self::NoRoute => "to_socket_no_route",
            Self::NoPort => "to_socket_no_port",
            Self::BadSyn => "to_socket_syn",
            Self::Unanswered => "to_socket_unanswered",
            Self::TranslatedSource => "to_socket_translated_source",
            Self::Established => "established",
            Self::Superseded => "superseded",
            Self::Unreadable => "unreadable",
            Self::ProxyPort => "proxy_port",
            Self::InvalidSegment => "invalid_segment",
            Self::Appended => "appended",
            Self::Deferred => "deferred",
            Self::Prepended => "prepended",
            Self::SentAhead => "sent_ahead",
            Self::AppendFailed => "append_failed",
            Self::HeaderRetransmitted => "header_retransmitted",
            Self::TooSoon => "too_soon",
            Self::RetransmitFailed => "retransmit_failed",
            Self::Acknowledged => "acknowledged",
            Self::InvalidAck => "invalid_ack",
            Self::StaleSynAck => "stale_syn_ack",
            Self::Refused => "refused",
            Self::WrongDevice => "wrong_device",
            Self::Icmp => "icmp",
            Self::TooBig => "too_big",
            Self::TtlExceeded => "ttl_exceeded",
            Self::RouteLost => "route_lost",
            Self::RewriteFailed => "rewrite_failed",
            Self::Ended => "ended",
            Self::Abandoned => "abandoned",
            Self::Expired => "expired",
            Self::EventLost => "event_lost",
        }
    }
}
