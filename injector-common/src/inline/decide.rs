//! The decisions about segments.

use super::{ACK, FIN, Flag, Flow, RST, SYN, Segment, Syn, URG};

/// What becomes of a client's SYN for a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnSyn {
    /// It opens a connection, whatever was there before under the same addresses and ports.
    Open,
    /// It is the SYN of the connection that is being opened, sent again: it goes to the same backend.
    Repeat,
    /// It goes to the host's own socket: another engine serves it, or refuses it.
    Socket,
}

/// Decides on a SYN. No connection that is established has a say: the client may have begun anew, and with the same number.
///
/// A SYN with data goes to the socket: the header's place would be in front of data that the backend may take before the
/// handshake. So does one that the backend has refused, or has not answered when it is sent for the third time: there another
/// backend is tried, and if none is there, the client gets an answer in its protocol.
#[must_use]
#[inline(always)]
pub fn on_syn(pending: Option<&Flow>, syn: &Syn, segment: &Segment) -> OnSyn {
    if !segment.is_plain_syn() {
        return OnSyn::Socket;
    }
    match pending {
        Some(flow) if flow.is_of(syn) => {
            // What the backend has answered meanwhile is still true.
            let unanswered = !flow.is(Flag::Accepted) && flow.syn_repeats != 0;
            if flow.is(Flag::Refused) || unanswered { OnSyn::Socket } else { OnSyn::Repeat }
        }
        _ => OnSyn::Open,
    }
}

/// Which entry decides about a segment of the client's that is no SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientOwner {
    /// The one that is established.
    Established,
    /// The one that is being opened, which is established by it.
    Accepts,
    /// The one that is being opened, and its number is one of before the header: a reset, with the number that its receiver acknowledged.
    Pending,
    /// None: it may be of a connection of the host's own socket.
    None,
}

/// Decides which. Beside an established one, the one that is being opened takes over only with the answer to its own SYN-ACK: the
/// first number, and the backend's number plus one, of which neither is the established one's but by an accident of one in 2^32.
#[must_use]
#[inline(always)]
pub fn client_owner(established: bool, pending: Option<&Flow>, segment: &Segment) -> ClientOwner {
    if let Some(flow) = pending {
        let first = !established || segment.sequence == flow.first;
        if first && !segment.is(RST | SYN) && flow.is_accepted_by(segment) {
            return ClientOwner::Accepts;
        }
        // A SYN that the backend refuses or does not answer goes to the host's socket, and so does what follows.
        let left_to_socket = flow.is(Flag::Refused) || (flow.syn_repeats != 0 && !flow.is(Flag::Accepted));
        if !established && segment.is_bare_reset() && !left_to_socket {
            return ClientOwner::Pending;
        }
    }
    if established { ClientOwner::Established } else { ClientOwner::None }
}

/// What becomes of a SYN from the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnSynAck {
    /// It answers the SYN of the connection that is being opened. One of the same addresses and ports that was established
    /// before is over: the backend has forgotten it.
    Accept,
    /// It is an established connection's own, sent again, because the client's answer, with the header, was lost.
    Repeated,
    /// It is of no connection that is established here: its number is one of before the header, if there is an entry at all.
    Pass,
    /// It goes no further: the backend has begun a connection that an established one would be taken for.
    Drop,
}

/// Decides on a SYN from the backend.
#[must_use]
#[inline(always)]
pub fn on_syn_ack(established: Option<&Flow>, pending: Option<&Flow>, segment: &Segment) -> OnSynAck {
    if let Some(flow) = pending
        && segment.is(ACK)
        && flow.beyond(segment.acknowledgement) == 0
    {
        // The SYN was left to the host's socket meanwhile.
        if flow.is(Flag::Refused) {
            return OnSynAck::Drop;
        }
        // One SYN, two answers: SYN cookies of different minutes. Both would be good for a connection, and one is known.
        let same = !flow.is(Flag::Accepted) || segment.sequence + 1 == flow.backend_first;
        return if same { OnSynAck::Accept } else { OnSynAck::Drop };
    }
    match established {
        Some(flow) if segment.is(ACK) && flow.repeats_syn_ack(segment) => OnSynAck::Repeated,
        Some(_) => OnSynAck::Drop,
        None => OnSynAck::Pass,
    }
}

/// What becomes of a segment from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToBackend {
    /// It goes with the number of before the header ([`Flow::offset`]), as do those of the next two kinds.
    Pass,
    /// It goes with the header as its payload.
    Append,
    /// It goes no further. The client speaks first: its first bytes end the handshake as well, with the header in front of them,
    /// and spare a packet and its acknowledgement. Should none come, the backend sends its SYN again after a second (RFC 6298,
    /// section 2), the client repeats its answer, and the header goes with that.
    Defer,
    /// It goes with the header in front of its payload; where both together are longer than [`IPV6_MIN_MTU`](super::IPV6_MIN_MTU), as by
    /// [`ToBackend::Follow`].
    Prepend,
    /// It goes later by the header's length, right behind a packet with the header alone.
    Follow,
    /// It goes later by the header's length ([`Flow::shift`]).
    Shift,
    /// The same, and it acknowledges less by [`Flow::LESS`]: a backend that knows the connection takes that for an older
    /// acknowledgement, and for another that has forgotten it no SYN cookie fits.
    ShiftOlder,
    /// It goes no further: it would put something of the client's where only the header belongs.
    Drop,
}

/// Decides on a segment from the client.
///
/// Nothing of the client's may come before the header or in its place: what begins before the first byte is dropped if it has
/// anything but numbers in it, and nothing at all passes before the header has.
///
/// A bare acknowledgement before the header is acknowledged is the end of the handshake, or a repetition of it because the
/// backend has sent its SYN again: it has not got the header. The client's first bytes, or its FIN, take the header with them, if
/// none was sent. Whatever comes behind them is shifted, and leaves a gap at the backend if the header was lost; the backend
/// then asks for it: see [`to_client`].
///
/// First bytes that are sent again, because they and the header were lost, do not share a packet: it may have been too long for
/// the path after all, which the client would be sent without end.
#[must_use]
#[inline(always)]
pub fn to_backend(flow: &Flow, segment: &Segment) -> ToBackend {
    if flow.is(Flag::Superseded) {
        // Another connection has its addresses, or the daemon has reset the backend's.
        return ToBackend::Drop;
    }
    match (in_place(flow, segment), flow.may_begin_another(segment)) {
        (ToBackend::Shift, true) => ToBackend::ShiftOlder,
        (ToBackend::Follow, true) => ToBackend::Drop,
        (decision, _) => decision,
    }
}

/// The same for a backend that surely knows the connection.
#[inline(always)]
fn in_place(flow: &Flow, segment: &Segment) -> ToBackend {
    if segment.is(SYN) {
        return ToBackend::Drop;
    }
    let bare = segment.payload == 0 && !segment.is(FIN | URG);
    if segment.is(RST) {
        // Before the header the backend expects just this number.
        let header = flow.is(Flag::Acknowledged) || flow.is(Flag::Sent);
        return match (bare, header) {
            (false, _) => ToBackend::Drop,
            (true, false) => ToBackend::Pass,
            (true, true) => ToBackend::Shift,
        };
    }
    if flow.is(Flag::Acknowledged) {
        // A keep-alive probe is bare. What acknowledges more than has passed here, the backend drops as well, unless that was lost.
        let passes = (bare || !flow.is_before_first(segment.sequence))
            && (!segment.is(ACK) || flow.backend.may_be_acked(segment.acknowledgement));
        return if passes { ToBackend::Shift } else { ToBackend::Drop };
    }
    let sent = flow.is(Flag::Sent);
    if !flow.is_in_step(segment) {
        return ToBackend::Drop;
    }
    if segment.sequence != flow.first {
        // Not even a bare acknowledgement may come first, with another number: a backend that answers by SYN cookies would take
        // its number for the first one, if it is three less or more (the cookie's number and the index of the segment size are
        // added, check_tcp_syn_cookie, net/ipv4/syncookies.c), and a part of the header for old.
        return if sent && !flow.is_before_first(segment.sequence) {
            ToBackend::Shift
        } else {
            ToBackend::Drop
        };
    }
    let waits = flow.waits != 0;
    if bare {
        return if waits && !flow.is(Flag::Deferred) { ToBackend::Defer } else { ToBackend::Append };
    }
    if segment.payload == 0 && segment.is(URG) {
        // The urgent pointer counts from the segment's start, where the header is.
        return ToBackend::Drop;
    }
    match (sent, waits) {
        // A packet with the header has no end and nothing urgent.
        (false, _) if !segment.is(FIN | URG) => ToBackend::Prepend,
        (false, _) => ToBackend::Follow,
        (true, true) if segment.payload != 0 => ToBackend::Follow,
        // The header went ahead with the handshake's end and is under way.
        (true, _) => ToBackend::Shift,
    }
}

/// What becomes of a segment from the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToClient {
    /// It acknowledges nothing, or what is older than the header: it goes with the number of before the header.
    Pass,
    /// It acknowledges earlier by the header's length.
    Shift,
    /// It acknowledges the header and says no more: the client, which knows of none, need not hear it. With SACK blocks it does
    /// say more, and goes as by [`ToClient::Shift`].
    DropAck,
    /// It acknowledges nothing of the client's: the header is under way.
    ClampAck,
    /// The backend asks for the header: it gets it, and the client is spared the question.
    Retransmit,
    /// It goes no further: it acknowledges a header that was never sent.
    Drop,
}

/// Decides on a segment from the backend that is no SYN.
#[must_use]
#[inline(always)]
pub fn to_client(flow: &Flow, segment: &Segment) -> ToClient {
    if !segment.is(ACK) {
        return ToClient::Pass;
    }
    if flow.is(Flag::Acknowledged) {
        return ToClient::Shift;
    }
    let beyond = flow.beyond(segment.acknowledgement);
    if beyond >= 1 << 31 {
        // Older than the connection: TCP ignores it.
        return ToClient::Pass;
    }
    let bare = segment.payload == 0 && !segment.is(FIN | RST);
    if beyond >= flow.header_len {
        if !flow.is(Flag::Sent) {
            return ToClient::Drop;
        }
        // With a closed window it does say something.
        let no_more = beyond == flow.header_len && bare && segment.window != 0;
        return if no_more { ToClient::DropAck } else { ToClient::Shift };
    }
    if bare { ToClient::Retransmit } else { ToClient::ClampAck }
}

/// Whether this segment of the backend acknowledges the header, which no other did before. What was never sent cannot be
/// acknowledged.
#[must_use]
#[inline(always)]
pub fn acknowledges(flow: &Flow, segment: &Segment) -> bool {
    // The backend acknowledges nothing that has not passed, and who sends in its name does not know what has.
    let most = flow.header_len.wrapping_add(flow.client_top - flow.first);
    !flow.is(Flag::Acknowledged)
        && flow.is(Flag::Sent)
        && segment.is(ACK)
        && (flow.header_len..=most).contains(&flow.beyond(segment.acknowledgement))
}
