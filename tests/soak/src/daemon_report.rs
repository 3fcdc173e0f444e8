//! The daemon's own account of the sessions, held against what both ends counted.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use super::conversation::Seen;
use super::endpoints::Shared;
use super::plan::{Ending, Plan, Side};
use super::session_log::Both;
use super::testbed::number;
use super::verdict::{Failure, judge};
use injector_testbed::daemon::{BYTES, Injector, Session};
use injector_testbed::metrics::Metrics;

/// How long the last lines may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// Ends that no session is planned to have.
const NEVER: [&str; 7] =
    ["lost", "header_failed", "internal", "forged_header", "idle", "half_closed", "aborted"];

/// What the daemon says.
#[derive(Debug)]
pub(crate) struct Accounts {
    /// One scrape, after the last session; empty if the daemon does not answer.
    pub(crate) metrics: Metrics,
    /// Why it is empty.
    pub(crate) mute: Option<String>,
    /// How sessions ended, in the daemon's words.
    pub(crate) ends: BTreeMap<String, u64>,
    /// Lines that belong to no session of this run.
    pub(crate) strangers: u64,
    /// The sum of all bytes in the lines and in the metrics.
    pub(crate) bytes: (u64, f64),
    /// What is wrong, by session, with the daemon's lines.
    pub(crate) failures: BTreeMap<u64, (Failure, Vec<Line>)>,
}

/// Waits for the daemon's line of every session, and compares.
pub(crate) fn settle(injector: &Injector, shared: &Shared) -> anyhow::Result<Accounts> {
    let sessions = shared.ledger.open().sessions.clone();
    let seed = shared.options.seed;
    let deadline = Instant::now() + PATIENCE;
    let (lines, strangers) = loop {
        let (lines, strangers) = by_number(injector.sessions()?);
        let open = |(number, both): (&u64, &Both)| {
            !lines.contains_key(number) && needs_line(&Plan::draw(seed, *number), both)
        };
        if !sessions.iter().any(open) || Instant::now() > deadline {
            break (lines, strangers);
        }
        thread::sleep(Duration::from_millis(500));
    };
    let mut failures = BTreeMap::new();
    let mut ends = BTreeMap::new();
    for (number, both) in &sessions {
        let plan = Plan::draw(seed, *number);
        let lines = lines.get(number).map(Vec::as_slice).unwrap_or_default();
        for line in lines {
            *ends.entry(line.end.clone()).or_default() += 1;
        }
        if let Err(failure) = verdict(&plan, both, lines) {
            failures.insert(*number, (failure, lines.to_vec()));
        }
    }
    // A daemon that hangs is a finding, not the end of the report.
    let (metrics, mute) = match injector.metrics() {
        Ok(metrics) => (metrics, None),
        Err(error) => (Metrics::default(), Some(format!("{error:#}"))),
    };
    let in_lines = lines.values().flatten().map(|line| line.to_backend + line.to_client).sum();
    let bytes = (in_lines, metrics.sum(BYTES, &[]));
    Ok(Accounts { metrics, mute, ends, strangers, bytes, failures })
}

/// What is compared of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) end: String,
    pub(crate) error: String,
    pub(crate) to_backend: u64,
    pub(crate) to_client: u64,
}

fn by_number(sessions: Vec<Session>) -> (BTreeMap<u64, Vec<Line>>, u64) {
    let mut lines: BTreeMap<u64, Vec<Line>> = BTreeMap::new();
    let mut strangers = 0;
    for session in sessions {
        let Some(number) = session.client().and_then(number) else {
            strangers += 1;
            continue;
        };
        lines.entry(number).or_default().push(Line {
            end: session.field("reason").unwrap_or_default(),
            error: session.field("error").unwrap_or_default(),
            to_backend: session.number("bytes_to_backend").unwrap_or(u64::MAX),
            to_client: session.number("bytes_to_client").unwrap_or(u64::MAX),
        });
    }
    (lines, strangers)
}

/// A client that has reset before it heard anything may be gone before the daemon has accepted it.
fn needs_line(plan: &Plan, both: &Both) -> bool {
    let goes = matches!(plan.ending, Ending::Leaves { .. } | Ending::Reset { by: Side::Client, .. });
    let unheard = both.client.as_ref().is_some_and(|client| client.received == 0);
    !(goes && unheard && both.backend.is_none())
}

/// What both ends saw first, then what the daemon says of it.
fn verdict(plan: &Plan, both: &Both, lines: &[Line]) -> Result<(), Failure> {
    let Some(client) = &both.client else {
        return Err(Failure::Failed(Side::Client, "it never came to an end".into()));
    };
    judge(plan, client, both.backend.as_ref())?;
    let line = match lines {
        [line] => line,
        [] if !needs_line(plan, both) => return Ok(()),
        _ => return Err(Failure::Line(format!("{} lines in the daemon's log", lines.len()))),
    };
    ended_as_planned(plan, line)?;
    let Some(backend) = &both.backend else { return Ok(()) };
    counted("to the backend", line.to_backend, client, backend, plan)?;
    counted("to the client", line.to_client, backend, client, plan)
}

fn ended_as_planned(plan: &Plan, line: &Line) -> Result<(), Failure> {
    let end = line.end.as_str();
    let as_planned = match plan.ending {
        Ending::FinishesFirst(Side::Client) => end == "client_closed",
        Ending::FinishesFirst(Side::Backend) => end == "backend_closed",
        Ending::Together => ["client_closed", "backend_closed"].contains(&end),
        _ => !NEVER.contains(&end),
    };
    if as_planned { Ok(()) } else { Err(Failure::Line(format!("the daemon says that it ended by {end:?}"))) }
}

/// What the daemon took of one end it has taken from what that end wrote, and it cannot have given the other more.
fn counted(way: &str, line: u64, writer: &Seen, reader: &Seen, plan: &Plan) -> Result<(), Failure> {
    let (sent, received) = (writer.sent, reader.received);
    let right = if plan.ending.clean() { line == sent } else { (received..=sent).contains(&line) };
    if right {
        Ok(())
    } else {
        Err(Failure::Accounting(format!(
            "{sent} bytes sent {way}, {received} received, {line} in the daemon's line"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::End;

    fn seen(sent: u64, received: u64, end: End) -> Seen {
        Seen { sent, received, finished: true, end, ..Seen::ended(End::Fin) }
    }

    fn line(end: &str, to_backend: u64, to_client: u64) -> Line {
        Line { end: end.into(), error: String::new(), to_backend, to_client }
    }

    #[test]
    fn a_clean_session_has_one_line_with_its_bytes() {
        let plan = Plan { ending: Ending::FinishesFirst(Side::Client), ..Plan::draw(0, 0) };
        let both = Both { client: Some(seen(10, 20, End::Fin)), backend: Some(seen(20, 10, End::Fin)) };
        let good = line("client_closed", 10, 20);
        assert_eq!(verdict(&plan, &both, std::slice::from_ref(&good)), Ok(()));
        let wrong: [&[Line]; 5] = [
            &[],
            &[good.clone(), good],
            &[line("backend_closed", 10, 20)],
            &[line("client_closed", 9, 20)],
            &[line("client_closed", 10, 21)],
        ];
        for lines in wrong {
            assert!(verdict(&plan, &both, lines).is_err(), "{lines:?}");
        }
        let unfinished = Both { client: None, ..both };
        assert!(verdict(&plan, &unfinished, &[line("client_closed", 10, 20)]).is_err());
    }

    #[test]
    fn of_a_session_that_was_broken_off_the_daemon_may_have_seen_less() {
        let plan = Plan {
            ending: Ending::Reset { by: Side::Client, when: crate::plan::Moment::Sent(10) },
            ..Plan::draw(0, 0)
        };
        let both = Both { client: Some(seen(10, 5, End::Gone)), backend: Some(seen(20, 3, End::Reset)) };
        for (to_backend, to_client, right) in
            [(3, 5, true), (10, 20, true), (2, 5, false), (11, 5, false), (3, 4, false), (3, 21, false)]
        {
            let line = line("client_reset", to_backend, to_client);
            assert_eq!(verdict(&plan, &both, &[line]).is_ok(), right, "{to_backend} {to_client}");
        }
        assert!(verdict(&plan, &both, &[line("lost", 3, 5)]).is_err());
    }
}
