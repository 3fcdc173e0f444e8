//! What both ends saw, held against the plan.

use std::fmt;

use super::conversation::{End, Seen};
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
    /// A side read bytes that are none of its stream, from there on.
    Foreign(Side, u64),
    /// A side read an end of file although not everything had come: it was lied to.
    CleanEndAfterLoss(Side, u64),
    /// A side was reset, though nobody had planned to.
    Reset(Side, u64),
    /// A side could not write, though the other was to read everything.
    CannotWrite(Side),
    /// What was sent and what arrived hash differently.
    Hash(Side),
    /// A side got more than the other has sent.
    Excess(Side),
    /// A side waited in vain.
    Stuck(Side),
    /// The client was turned away, though the backend had spoken or was to speak.
    Refused,
    /// The client got an end that the plan has no place for, at a backend that said nothing.
    NotRefused(End),
    /// The backend never saw the session.
    Missing,
    /// No connection, or another error.
    Failed(Side, String),
    /// The daemon counted other bytes than both ends.
    Accounting(String),
    /// The daemon's line is missing, doubled, or says that it ended otherwise.
    Line(String),
}

impl Failure {
    /// A word for the table of failures.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Lost(..) | Self::CleanEndAfterLoss(..) => "lost",
            Self::Duplicated(..) => "duplicated",
            Self::Reordered(..) => "reordered",
            Self::Foreign(..) | Self::Hash(_) | Self::Excess(_) => "foreign",
            Self::Reset(..) | Self::CannotWrite(_) => "cut",
            Self::Stuck(_) => "stuck",
            Self::Refused | Self::NotRefused(_) | Self::Missing | Self::Failed(..) => "failed",
            Self::Accounting(_) | Self::Line(_) => "account",
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(side, at) => write!(f, "the {side} misses bytes from {at} on"),
            Self::Duplicated(side, at) => write!(f, "the {side} read bytes twice at {at}"),
            Self::Reordered(side, at) => write!(f, "the {side} read bytes in another order from {at} on"),
            Self::Foreign(side, at) => {
                write!(f, "the {side} read bytes that are not its stream's from {at} on")
            }
            Self::CleanEndAfterLoss(side, at) => {
                write!(f, "the {side} read a clean end after {at} bytes, which were not all")
            }
            Self::Reset(side, at) => write!(f, "the {side} was reset after {at} bytes, and nobody meant it"),
            Self::CannotWrite(side) => write!(f, "the {side} could not write, and nobody had gone"),
            Self::Hash(side) => write!(f, "what the {side} read hashes differently"),
            Self::Excess(side) => write!(f, "the {side} read more than was sent"),
            Self::Stuck(side) => write!(f, "the {side} waited in vain"),
            Self::Refused => f.write_str("the client was turned away"),
            Self::NotRefused(end) => write!(f, "the client of a speechless backend saw {end:?}"),
            Self::Missing => f.write_str("the backend never saw it"),
            Self::Failed(side, error) => write!(f, "the {side} failed: {error}"),
            Self::Accounting(what) | Self::Line(what) => f.write_str(what),
        }
    }
}

/// Whether all went as it had to; `backend` is `None` where it never got to see the session.
pub(crate) fn judge(plan: &Plan, client: &Seen, backend: Option<&Seen>) -> Result<(), Failure> {
    let sides = [Some((Side::Client, client)), backend.map(|backend| (Side::Backend, backend))];
    for (side, seen) in sides.into_iter().flatten() {
        content(side, seen)?;
        match &seen.end {
            End::Stuck => return Err(Failure::Stuck(side)),
            End::Failed(error) => return Err(Failure::Failed(side, error.clone())),
            End::Fin | End::Reset | End::Gone => {}
        }
    }
    let Some(backend) = backend else {
        return if may_be_missing(plan, client) { Ok(()) } else { Err(Failure::Missing) };
    };
    excess(Side::Backend, backend, client)?;
    excess(Side::Client, client, backend)?;
    if client.refused && !may_be_refused(plan, client) {
        return Err(Failure::Refused);
    }
    match plan.ending {
        Ending::FinishesFirst(_) | Ending::Together => {
            whole(Side::Backend, backend, client)?;
            whole(Side::Client, client, backend)
        }
        Ending::Reset { by: Side::Client, .. } => left_behind(Side::Backend, backend, client),
        Ending::Reset { by: Side::Backend, .. } => left_behind(Side::Client, client, backend),
        // The backend talks to nobody: whether it hears of that is a matter of time.
        Ending::Leaves { .. } => Ok(()),
        Ending::Speechless { .. } => speechless(client),
    }
}

/// What arrived is a beginning of what was to come.
fn content(side: Side, seen: &Seen) -> Result<(), Failure> {
    let faults = &seen.faults;
    if let Some(at) = faults.foreign {
        return Err(Failure::Foreign(side, at));
    }
    let Some(first) = faults.leaps.first() else { return Ok(()) };
    let ahead = faults.leaps.iter().any(|leap| leap.to > leap.from);
    let back = faults.leaps.iter().any(|leap| leap.to < leap.from);
    Err(match (ahead, back) {
        (true, true) => Failure::Reordered(side, first.from),
        (_, true) => Failure::Duplicated(side, first.from),
        _ => Failure::Lost(side, first.from),
    })
}

fn excess(side: Side, reader: &Seen, writer: &Seen) -> Result<(), Failure> {
    if reader.received > writer.sent { Err(Failure::Excess(side)) } else { Ok(()) }
}

/// A reader of a session that nobody breaks off.
fn whole(side: Side, reader: &Seen, writer: &Seen) -> Result<(), Failure> {
    let missing = reader.received < writer.sent || !writer.finished;
    match reader.end {
        End::Fin if missing => Err(Failure::CleanEndAfterLoss(side, reader.received)),
        End::Fin if reader.received_hash != writer.sent_hash => Err(Failure::Hash(side)),
        End::Fin if reader.write_error.is_some() => Err(Failure::CannotWrite(side)),
        End::Fin => Ok(()),
        _ => Err(Failure::Reset(side, reader.received)),
    }
}

/// The side that did not go: it must not take what it has for the whole, unless it is.
fn left_behind(side: Side, seen: &Seen, gone: &Seen) -> Result<(), Failure> {
    if gone.end != End::Gone {
        return Err(Failure::Reset(side.other(), gone.received));
    }
    let whole = gone.finished && seen.received == gone.sent;
    match seen.end {
        End::Fin if !whole && !seen.refused => Err(Failure::CleanEndAfterLoss(side, seen.received)),
        _ => Ok(()),
    }
}

/// A client that is gone before it was told anything may have been gone before the header was sent.
fn may_be_missing(plan: &Plan, client: &Seen) -> bool {
    let goes = matches!(plan.ending, Ending::Leaves { .. } | Ending::Reset { by: Side::Client, .. });
    goes && client.end == End::Gone && client.received == 0
}

/// The daemon speaks for a backend that is gone before its first byte.
fn may_be_refused(plan: &Plan, client: &Seen) -> bool {
    let goes = matches!(plan.ending, Ending::Speechless { .. } | Ending::Reset { by: Side::Backend, .. });
    goes && matches!(plan.opening, Opening::Server { .. }) && client.received == 0
}

/// A reset is always the truth. An end of file is one where the daemon has said why, or the client had finished itself.
fn speechless(client: &Seen) -> Result<(), Failure> {
    match client.end {
        End::Fin if !client.refused && !client.finished => Err(Failure::NotRefused(End::Fin)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;
    use crate::content::{Faults, Leap};
    use crate::plan::Moment;

    fn plan(ending: Ending) -> Plan {
        Plan { ending, opening: Opening::Server { early: false }, ..Plan::draw(0, 0) }
    }

    fn seen(sent: u64, received: u64, end: End) -> Seen {
        Seen { sent, received, finished: true, end, ..Seen::ended(End::Fin) }
    }

    /// 100 bytes up and 200 down, as they should be.
    fn good() -> (Seen, Seen) {
        (seen(100, 200, End::Fin), seen(200, 100, End::Fin))
    }

    #[test]
    fn a_clean_session_is_whole_at_both_ends() {
        let plan = plan(Ending::Together);
        let judged = |change: fn(&mut Seen, &mut Seen)| {
            let (mut client, mut backend) = good();
            change(&mut client, &mut backend);
            judge(&plan, &client, Some(&backend))
        };
        assert_eq!(judged(|_, _| {}), Ok(()));
        assert_eq!(
            judged(|client, _| client.received = 199),
            Err(Failure::CleanEndAfterLoss(Side::Client, 199))
        );
        assert_eq!(judged(|_, backend| backend.received = 101), Err(Failure::Excess(Side::Backend)));
        assert_eq!(judged(|_, backend| backend.end = End::Reset), Err(Failure::Reset(Side::Backend, 100)));
        assert_eq!(judged(|_, backend| backend.end = End::Stuck), Err(Failure::Stuck(Side::Backend)));
        assert_eq!(
            judged(|client, _| client.sent_hash = blake3::hash(b"x")),
            Err(Failure::Hash(Side::Backend))
        );
        assert_eq!(
            judged(|client, _| client.write_error = Some(ErrorKind::BrokenPipe)),
            Err(Failure::CannotWrite(Side::Client))
        );
        assert_eq!(judged(|client, _| client.refused = true), Err(Failure::Refused));
        assert_eq!(judge(&plan, &good().0, None), Err(Failure::Missing));
    }

    #[test]
    fn faults_are_named_by_their_leaps() {
        let judged = |leaps: &[(u64, u64)], foreign| {
            let (client, mut backend) = good();
            let leaps = leaps.iter().map(|(from, to)| Leap { from: *from, to: *to }).collect();
            backend.faults = Faults { leaps, foreign };
            judge(&plan(Ending::Together), &client, Some(&backend))
        };
        assert_eq!(judged(&[(5, 9)], None), Err(Failure::Lost(Side::Backend, 5)));
        assert_eq!(judged(&[(9, 5)], None), Err(Failure::Duplicated(Side::Backend, 9)));
        assert_eq!(judged(&[(5, 9), (12, 5)], None), Err(Failure::Reordered(Side::Backend, 5)));
        assert_eq!(judged(&[(5, 9)], Some(10)), Err(Failure::Foreign(Side::Backend, 10)));
    }

    #[test]
    fn who_is_left_behind_is_reset_unless_it_has_everything() {
        let plan = plan(Ending::Reset { by: Side::Backend, when: Moment::Sent(50) });
        let judged = |finished, received, end| {
            let client = seen(100, received, end);
            let backend = Seen { finished, ..seen(50, 3, End::Gone) };
            judge(&plan, &client, Some(&backend))
        };
        let cut = judge(&plan, &seen(100, 40, End::Reset), Some(&seen(50, 3, End::Reset)));
        assert_eq!(cut, Err(Failure::Reset(Side::Backend, 3)), "before it went itself");
        assert_eq!(judged(false, 40, End::Reset), Ok(()));
        assert_eq!(judged(false, 40, End::Fin), Err(Failure::CleanEndAfterLoss(Side::Client, 40)));
        assert_eq!(judged(false, 50, End::Fin), Err(Failure::CleanEndAfterLoss(Side::Client, 50)));
        assert_eq!(judged(true, 50, End::Fin), Ok(()));
        assert_eq!(judged(true, 49, End::Fin), Err(Failure::CleanEndAfterLoss(Side::Client, 49)));
        assert_eq!(judged(true, 51, End::Fin), Err(Failure::Excess(Side::Client)));
    }

    #[test]
    fn a_client_may_be_turned_away_only_before_the_backends_first_byte() {
        let client = |received| Seen { refused: true, ..seen(100, received, End::Fin) };
        let backend = Seen { finished: false, ..seen(0, 0, End::Gone) };
        let reset = plan(Ending::Reset { by: Side::Backend, when: Moment::Sent(0) });
        assert_eq!(judge(&reset, &client(0), Some(&backend)), Ok(()));
        let speechless = plan(Ending::Speechless { reset: false });
        assert_eq!(judge(&speechless, &client(0), Some(&backend)), Ok(()));
        assert_eq!(judge(&speechless, &seen(100, 0, End::Fin), Some(&backend)), Ok(()));
        let fin = Seen { finished: false, ..seen(99, 0, End::Fin) };
        assert_eq!(judge(&speechless, &fin, Some(&backend)), Err(Failure::NotRefused(End::Fin)));
        let silent = Plan { opening: Opening::Client, ..speechless };
        assert_eq!(judge(&silent, &seen(100, 0, End::Reset), Some(&backend)), Ok(()));
        assert_eq!(judge(&silent, &client(0), Some(&backend)), Err(Failure::Refused));
    }

    #[test]
    fn only_a_client_that_heard_nothing_may_be_unknown_to_the_backend() {
        let plan = plan(Ending::Leaves { reset: true, greeted: false });
        assert_eq!(judge(&plan, &seen(0, 0, End::Gone), None), Ok(()));
        assert_eq!(judge(&plan, &seen(0, 21, End::Gone), None), Err(Failure::Missing));
        assert_eq!(
            judge(&plan, &Seen::ended(End::Failed("refused".into())), None),
            Err(Failure::Failed(Side::Client, "refused".into()))
        );
    }
}
