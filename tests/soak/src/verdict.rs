//! Checks what both sides observed against the plan.

use std::fmt;

use super::conversation::{ConnectionEnd, EndpointResult};
use super::plan::{Ending, Opening, Plan, Side};

/// Why a session has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Bytes are missing in the middle of what a side read.
    Lost(Side, u64),
    /// A side read bytes twice.
    Duplicated(Side, u64),
    /// A side read bytes in another order.
    Reordered(Side, u64),
    /// A side read bytes that do not belong to its stream, from this position on.
    Foreign(Side, u64),
    /// A side read an end of file although bytes were missing.
    CleanEofAfterLoss(Side, u64),
    /// A side was reset, against the plan.
    Reset(Side, u64),
    /// A side could not write, although the other was to read everything.
    CannotWrite(Side),
    /// The hashes of the sent and the received bytes differ.
    Hash(Side),
    /// A side received more than the other sent.
    Excess(Side),
    /// A side waited until the limit.
    TimedOut(Side),
    /// The client was rejected, although the backend responded or was to respond.
    Rejected,
    /// The client saw an end that the plan does not allow, at a backend that sent nothing.
    NotRejected(ConnectionEnd),
    /// The backend never saw the session.
    Missing,
    /// No connection, or another error.
    Failed(Side, String),
    /// The daemon counted other bytes than both sides.
    Accounting(String),
    /// The daemon's log line is missing, duplicated, or has another reason.
    Line(String),
}

impl Failure {
    /// The category for the table of failures.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Lost(..) | Self::CleanEofAfterLoss(..) => "lost",
            Self::Duplicated(..) => "duplicated",
            Self::Reordered(..) => "reordered",
            Self::Foreign(..) | Self::Hash(_) | Self::Excess(_) => "foreign",
            Self::Reset(..) | Self::CannotWrite(_) => "aborted",
            Self::TimedOut(_) => "timed_out",
            Self::Rejected | Self::NotRejected(_) | Self::Missing | Self::Failed(..) => "failed",
            Self::Accounting(_) | Self::Line(_) => "accounting",
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(side, at) => write!(f, "the {side} lacks bytes from {at} on"),
            Self::Duplicated(side, at) => write!(f, "the {side} read bytes twice at {at}"),
            Self::Reordered(side, at) => write!(f, "the {side} read bytes in another order from {at} on"),
            Self::Foreign(side, at) => {
                write!(f, "the {side} read bytes that are not its stream's from {at} on")
            }
            Self::CleanEofAfterLoss(side, at) => {
                write!(f, "the {side} read a clean end after {at} bytes, which were not all")
            }
            Self::Reset(side, at) => write!(f, "the {side} was reset after {at} bytes, against the plan"),
            Self::CannotWrite(side) => {
                write!(f, "the {side} could not write, although the other side was open")
            }
            Self::Hash(side) => write!(f, "the hash of what the {side} read differs"),
            Self::Excess(side) => write!(f, "the {side} read more than was sent"),
            Self::TimedOut(side) => write!(f, "the {side} timed out"),
            Self::Rejected => f.write_str("the client was rejected"),
            Self::NotRejected(end) => write!(f, "the client of a silent backend saw {end:?}"),
            Self::Missing => f.write_str("the backend never saw the session"),
            Self::Failed(side, error) => write!(f, "the {side} failed: {error}"),
            Self::Accounting(what) | Self::Line(what) => f.write_str(what),
        }
    }
}

/// Checks a session; `backend` is `None` if it never saw the session.
pub(crate) fn check(
    plan: &Plan,
    client: &EndpointResult,
    backend: Option<&EndpointResult>,
) -> Result<(), Failure> {
    let sides = [Some((Side::Client, client)), backend.map(|backend| (Side::Backend, backend))];
    for (side, seen) in sides.into_iter().flatten() {
        check_content(side, seen)?;
        match &seen.end {
            ConnectionEnd::TimedOut => return Err(Failure::TimedOut(side)),
            ConnectionEnd::Failed(error) => return Err(Failure::Failed(side, error.clone())),
            ConnectionEnd::Fin | ConnectionEnd::Reset | ConnectionEnd::Left => {}
        }
    }
    let Some(backend) = backend else {
        return if may_be_missing(plan, client) { Ok(()) } else { Err(Failure::Missing) };
    };
    check_excess(Side::Backend, backend, client)?;
    check_excess(Side::Client, client, backend)?;
    if client.rejected && !may_be_rejected(plan, client) {
        return Err(Failure::Rejected);
    }
    match plan.ending {
        Ending::ClosesFirst(_) | Ending::Together => {
            check_complete(Side::Backend, backend, client)?;
            check_complete(Side::Client, client, backend)
        }
        Ending::Reset { by: Side::Client, .. } => check_remaining_side(Side::Backend, backend, client),
        Ending::Reset { by: Side::Backend, .. } => check_remaining_side(Side::Client, client, backend),
        // The backend may or may not notice that the client has left; both are correct.
        Ending::ClientLeavesSilently { .. } => Ok(()),
        Ending::BackendLeavesSilently { .. } => check_silent_backend(client),
    }
}

/// What arrived must be a prefix of what was sent.
fn check_content(side: Side, seen: &EndpointResult) -> Result<(), Failure> {
    let errors = &seen.errors;
    if let Some(at) = errors.foreign {
        return Err(Failure::Foreign(side, at));
    }
    let Some(first) = errors.jumps.first() else { return Ok(()) };
    let ahead = errors.jumps.iter().any(|jump| jump.to > jump.from);
    let back = errors.jumps.iter().any(|jump| jump.to < jump.from);
    Err(match (ahead, back) {
        (true, true) => Failure::Reordered(side, first.from),
        (_, true) => Failure::Duplicated(side, first.from),
        _ => Failure::Lost(side, first.from),
    })
}

fn check_excess(side: Side, reader: &EndpointResult, writer: &EndpointResult) -> Result<(), Failure> {
    if reader.received > writer.sent { Err(Failure::Excess(side)) } else { Ok(()) }
}

/// Checks a reader of a session that ends as planned on both sides.
fn check_complete(side: Side, reader: &EndpointResult, writer: &EndpointResult) -> Result<(), Failure> {
    let missing = reader.received < writer.sent || !writer.finished;
    match reader.end {
        ConnectionEnd::Fin if missing => Err(Failure::CleanEofAfterLoss(side, reader.received)),
        ConnectionEnd::Fin if reader.received_hash != writer.sent_hash => Err(Failure::Hash(side)),
        ConnectionEnd::Fin if reader.write_error.is_some() => Err(Failure::CannotWrite(side)),
        ConnectionEnd::Fin => Ok(()),
        _ => Err(Failure::Reset(side, reader.received)),
    }
}

/// Checks the side that did not close first: a clean end is correct only if it has everything.
fn check_remaining_side(side: Side, seen: &EndpointResult, gone: &EndpointResult) -> Result<(), Failure> {
    if gone.end != ConnectionEnd::Left {
        return Err(Failure::Reset(side.other(), gone.received));
    }
    let complete = gone.finished && seen.received == gone.sent;
    match seen.end {
        ConnectionEnd::Fin if !complete && !seen.rejected => {
            Err(Failure::CleanEofAfterLoss(side, seen.received))
        }
        _ => Ok(()),
    }
}

/// The backend may never have seen a client that left before it received anything.
fn may_be_missing(plan: &Plan, client: &EndpointResult) -> bool {
    let closes =
        matches!(plan.ending, Ending::ClientLeavesSilently { .. } | Ending::Reset { by: Side::Client, .. });
    closes && client.end == ConnectionEnd::Left && client.received == 0
}

/// The daemon may reject the client if the backend closed before its first byte.
fn may_be_rejected(plan: &Plan, client: &EndpointResult) -> bool {
    let closes =
        matches!(plan.ending, Ending::BackendLeavesSilently { .. } | Ending::Reset { by: Side::Backend, .. });
    closes && matches!(plan.opening, Opening::Server { .. }) && client.received == 0
}

/// A reset is always correct. An end of file is correct if the daemon sent the reason, or the
/// client closed first.
fn check_silent_backend(client: &EndpointResult) -> Result<(), Failure> {
    match client.end {
        ConnectionEnd::Fin if !client.rejected && !client.finished => {
            Err(Failure::NotRejected(ConnectionEnd::Fin))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;
    use crate::content::{Jump, StreamErrors};
    use crate::plan::Moment;

    fn plan(ending: Ending) -> Plan {
        Plan { ending, opening: Opening::Server { early: false }, ..Plan::draw(0, 0) }
    }

    fn seen(sent: u64, received: u64, end: ConnectionEnd) -> EndpointResult {
        EndpointResult { sent, received, finished: true, end, ..EndpointResult::ended(ConnectionEnd::Fin) }
    }

    /// A clean session, 100 bytes up and 200 down.
    fn good() -> (EndpointResult, EndpointResult) {
        (seen(100, 200, ConnectionEnd::Fin), seen(200, 100, ConnectionEnd::Fin))
    }

    #[test]
    fn a_clean_session_is_complete_on_both_sides() {
        let plan = plan(Ending::Together);
        let checked = |change: fn(&mut EndpointResult, &mut EndpointResult)| {
            let (mut client, mut backend) = good();
            change(&mut client, &mut backend);
            check(&plan, &client, Some(&backend))
        };
        assert_eq!(checked(|_, _| {}), Ok(()));
        assert_eq!(
            checked(|client, _| client.received = 199),
            Err(Failure::CleanEofAfterLoss(Side::Client, 199))
        );
        assert_eq!(checked(|_, backend| backend.received = 101), Err(Failure::Excess(Side::Backend)));
        assert_eq!(
            checked(|_, backend| backend.end = ConnectionEnd::Reset),
            Err(Failure::Reset(Side::Backend, 100))
        );
        assert_eq!(
            checked(|_, backend| backend.end = ConnectionEnd::TimedOut),
            Err(Failure::TimedOut(Side::Backend))
        );
        assert_eq!(
            checked(|client, _| client.sent_hash = blake3::hash(b"x")),
            Err(Failure::Hash(Side::Backend))
        );
        assert_eq!(
            checked(|client, _| client.write_error = Some(ErrorKind::BrokenPipe)),
            Err(Failure::CannotWrite(Side::Client))
        );
        assert_eq!(checked(|client, _| client.rejected = true), Err(Failure::Rejected));
        assert_eq!(check(&plan, &good().0, None), Err(Failure::Missing));
    }

    #[test]
    fn errors_are_classified_by_their_jumps() {
        let checked = |jumps: &[(u64, u64)], foreign| {
            let (client, mut backend) = good();
            let jumps = jumps.iter().map(|(from, to)| Jump { from: *from, to: *to }).collect();
            backend.errors = StreamErrors { jumps, foreign };
            check(&plan(Ending::Together), &client, Some(&backend))
        };
        assert_eq!(checked(&[(5, 9)], None), Err(Failure::Lost(Side::Backend, 5)));
        assert_eq!(checked(&[(9, 5)], None), Err(Failure::Duplicated(Side::Backend, 9)));
        assert_eq!(checked(&[(5, 9), (12, 5)], None), Err(Failure::Reordered(Side::Backend, 5)));
        assert_eq!(checked(&[(5, 9)], Some(10)), Err(Failure::Foreign(Side::Backend, 10)));
    }

    #[test]
    fn the_remaining_side_is_reset_unless_it_has_everything() {
        let plan = plan(Ending::Reset { by: Side::Backend, when: Moment::Sent(50) });
        let checked = |finished, received, end| {
            let client = seen(100, received, end);
            let backend = EndpointResult { finished, ..seen(50, 3, ConnectionEnd::Left) };
            check(&plan, &client, Some(&backend))
        };
        let early =
            check(&plan, &seen(100, 40, ConnectionEnd::Reset), Some(&seen(50, 3, ConnectionEnd::Reset)));
        assert_eq!(early, Err(Failure::Reset(Side::Backend, 3)), "before it closed itself");
        assert_eq!(checked(false, 40, ConnectionEnd::Reset), Ok(()));
        assert_eq!(checked(false, 40, ConnectionEnd::Fin), Err(Failure::CleanEofAfterLoss(Side::Client, 40)));
        assert_eq!(checked(false, 50, ConnectionEnd::Fin), Err(Failure::CleanEofAfterLoss(Side::Client, 50)));
        assert_eq!(checked(true, 50, ConnectionEnd::Fin), Ok(()));
        assert_eq!(checked(true, 49, ConnectionEnd::Fin), Err(Failure::CleanEofAfterLoss(Side::Client, 49)));
        assert_eq!(checked(true, 51, ConnectionEnd::Fin), Err(Failure::Excess(Side::Client)));
    }

    #[test]
    fn a_client_may_be_rejected_only_before_the_backends_first_byte() {
        let client = |received| EndpointResult { rejected: true, ..seen(100, received, ConnectionEnd::Fin) };
        let backend = EndpointResult { finished: false, ..seen(0, 0, ConnectionEnd::Left) };
        let reset = plan(Ending::Reset { by: Side::Backend, when: Moment::Sent(0) });
        assert_eq!(check(&reset, &client(0), Some(&backend)), Ok(()));
        let speechless = plan(Ending::BackendLeavesSilently { reset: false });
        assert_eq!(check(&speechless, &client(0), Some(&backend)), Ok(()));
        assert_eq!(check(&speechless, &seen(100, 0, ConnectionEnd::Fin), Some(&backend)), Ok(()));
        let fin = EndpointResult { finished: false, ..seen(99, 0, ConnectionEnd::Fin) };
        assert_eq!(check(&speechless, &fin, Some(&backend)), Err(Failure::NotRejected(ConnectionEnd::Fin)));
        let silent = Plan { opening: Opening::Client, ..speechless };
        assert_eq!(check(&silent, &seen(100, 0, ConnectionEnd::Reset), Some(&backend)), Ok(()));
        assert_eq!(check(&silent, &client(0), Some(&backend)), Err(Failure::Rejected));
    }

    #[test]
    fn the_backend_may_miss_only_a_client_that_received_nothing() {
        let plan = plan(Ending::ClientLeavesSilently { reset: true, greeted: false });
        assert_eq!(check(&plan, &seen(0, 0, ConnectionEnd::Left), None), Ok(()));
        assert_eq!(check(&plan, &seen(0, 21, ConnectionEnd::Left), None), Err(Failure::Missing));
        assert_eq!(
            check(&plan, &EndpointResult::ended(ConnectionEnd::Failed("rejected".into())), None),
            Err(Failure::Failed(Side::Client, "rejected".into()))
        );
    }
}
