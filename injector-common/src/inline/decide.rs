//! The decisions about segments.

use super::{ACK, FIN, Flag, Flow, RST, SYN, Segment, URG};

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
