//! The daemon's log lines and metrics, compared with what both sides counted.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use super::conversation::EndpointResult;
use super::endpoints::Shared;
use super::plan::{Ending, Plan, Side};
use super::session_log::SessionRecord;
use super::testbed::number;
use super::verdict::{Failure, check};
use injector_testbed::daemon::{BYTES, Injector, Session};
use injector_testbed::metrics::Metrics;

/// How long the last log lines may take.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Close reasons that no session is planned to have.
const NEVER: [&str; 7] =
    ["lost", "header_failed", "internal", "forged_header", "idle", "half_closed", "aborted"];

/// What the daemon logged and counted.
#[derive(Debug)]
pub(crate) struct DaemonReport {
    /// One scrape, after the last session; empty if the daemon does not respond.
    pub(crate) metrics: Metrics,
    /// Why it is empty.
    pub(crate) metrics_error: Option<String>,
    /// How often each close reason was logged.
    pub(crate) ends: BTreeMap<String, u64>,
    /// Log lines that match no session of this run.
    pub(crate) unmatched: u64,
    /// The sum of all bytes, in the log lines and in the metrics.
    pub(crate) bytes: (u64, f64),
    /// Failures by session, with the log lines of the session.
    pub(crate) failures: BTreeMap<u64, (Failure, Vec<Line>)>,
}

/// Waits for the log line of every session, and compares.
pub(crate) fn collect(injector: &Injector, shared: &Shared) -> anyhow::Result<DaemonReport> {
    let sessions = shared.log.lock().sessions.clone();
    let seed = shared.options.seed;
    let deadline = Instant::now() + TIMEOUT;
    let (lines, unmatched) = loop {
        let (lines, unmatched) = by_number(injector.sessions()?);
        let open = |(number, record): (&u64, &SessionRecord)| {
            !lines.contains_key(number) && needs_line(&Plan::draw(seed, *number), record)
        };
        if !sessions.iter().any(open) || Instant::now() > deadline {
            break (lines, unmatched);
        }
        thread::sleep(Duration::from_millis(500));
    };
    let mut failures = BTreeMap::new();
    let mut ends = BTreeMap::new();
    for (number, record) in &sessions {
        let plan = Plan::draw(seed, *number);
        let lines = lines.get(number).map(Vec::as_slice).unwrap_or_default();
        for line in lines {
            *ends.entry(line.end.clone()).or_default() += 1;
        }
        if let Err(failure) = verdict(&plan, record, lines) {
            failures.insert(*number, (failure, lines.to_vec()));
        }
    }
    // A daemon that hangs is a finding; the report continues.
    let (metrics, metrics_error) = match injector.metrics() {
        Ok(metrics) => (metrics, None),
        Err(error) => (Metrics::default(), Some(format!("{error:#}"))),
    };
    let in_lines = lines.values().flatten().map(|line| line.to_backend + line.to_client).sum();
    let bytes = (in_lines, metrics.sum(BYTES, &[]));
    Ok(DaemonReport { metrics, metrics_error, ends, unmatched, bytes, failures })
}

/// The compared fields of a log line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) end: String,
    pub(crate) error: String,
    pub(crate) to_backend: u64,
    pub(crate) to_client: u64,
}

fn by_number(sessions: Vec<Session>) -> (BTreeMap<u64, Vec<Line>>, u64) {
    let mut lines: BTreeMap<u64, Vec<Line>> = BTreeMap::new();
    let mut unmatched = 0;
    for session in sessions {
        let Some(number) = session.client().and_then(number) else {
            unmatched += 1;
            continue;
        };
        lines.entry(number).or_default().push(Line {
            end: session.field("reason").unwrap_or_default(),
            error: session.field("error").unwrap_or_default(),
            to_backend: session.number("bytes_to_backend").unwrap_or(u64::MAX),
            to_client: session.number("bytes_to_client").unwrap_or(u64::MAX),
        });
    }
    (lines, unmatched)
}

/// The daemon may never have accepted a client that reset before it received anything.
fn needs_line(plan: &Plan, record: &SessionRecord) -> bool {
    let client_leaves =
        matches!(plan.ending, Ending::ClientLeavesSilently { .. } | Ending::Reset { by: Side::Client, .. });
    let silent = record.client.as_ref().is_some_and(|client| client.received == 0);
    !(client_leaves && silent && record.backend.is_none())
}

/// Checks what both sides observed, then the daemon's log line.
fn verdict(plan: &Plan, record: &SessionRecord, lines: &[Line]) -> Result<(), Failure> {
    let Some(client) = &record.client else {
        return Err(Failure::Failed(Side::Client, "it never ended".into()));
    };
    check(plan, client, record.backend.as_ref())?;
    let line = match lines {
        [line] => line,
        [] if !needs_line(plan, record) => return Ok(()),
        _ => return Err(Failure::Line(format!("{} lines in the daemon's log", lines.len()))),
    };
    check_reason(plan, line)?;
    let Some(backend) = &record.backend else { return Ok(()) };
    check_bytes("to the backend", line.to_backend, client, backend, plan)?;
    check_bytes("to the client", line.to_client, backend, client, plan)
}

fn check_reason(plan: &Plan, line: &Line) -> Result<(), Failure> {
    let end = line.end.as_str();
    let as_planned = match plan.ending {
        Ending::ClosesFirst(Side::Client) => end == "client_closed",
        Ending::ClosesFirst(Side::Backend) => end == "backend_closed",
        Ending::Together => ["client_closed", "backend_closed"].contains(&end),
        _ => !NEVER.contains(&end),
    };
    if as_planned { Ok(()) } else { Err(Failure::Line(format!("the daemon logged the reason {end:?}"))) }
}

/// The bytes that the daemon read from one side must be bytes that this side wrote, and it cannot
/// have delivered more to the other.
fn check_bytes(
    way: &str,
    line: u64,
    writer: &EndpointResult,
    reader: &EndpointResult,
    plan: &Plan,
) -> Result<(), Failure> {
    let (sent, received) = (writer.sent, reader.received);
    let right = if plan.ending.clean() { line == sent } else { (received..=sent).contains(&line) };
    if right {
        Ok(())
    } else {
        Err(Failure::Accounting(format!(
            "{sent} bytes sent {way}, {received} received, {line} in the daemon's log line"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::ConnectionEnd;

    fn seen(sent: u64, received: u64, end: ConnectionEnd) -> EndpointResult {
        EndpointResult { sent, received, finished: true, end, ..EndpointResult::ended(ConnectionEnd::Fin) }
    }

    fn line(end: &str, to_backend: u64, to_client: u64) -> Line {
        Line { end: end.into(), error: String::new(), to_backend, to_client }
    }

    #[test]
    fn a_clean_session_has_one_log_line_with_its_bytes() {
        let plan = Plan { ending: Ending::ClosesFirst(Side::Client), ..Plan::draw(0, 0) };
        let record = SessionRecord {
            client: Some(seen(10, 20, ConnectionEnd::Fin)),
            backend: Some(seen(20, 10, ConnectionEnd::Fin)),
        };
        let good = line("client_closed", 10, 20);
        assert_eq!(verdict(&plan, &record, std::slice::from_ref(&good)), Ok(()));
        let wrong: [&[Line]; 5] = [
            &[],
            &[good.clone(), good],
            &[line("backend_closed", 10, 20)],
            &[line("client_closed", 9, 20)],
            &[line("client_closed", 10, 21)],
        ];
        for lines in wrong {
            assert!(verdict(&plan, &record, lines).is_err(), "{lines:?}");
        }
        let unfinished = SessionRecord { client: None, ..record };
        assert!(verdict(&plan, &unfinished, &[line("client_closed", 10, 20)]).is_err());
    }

    #[test]
    fn the_daemon_may_count_less_of_an_aborted_session() {
        let plan = Plan {
            ending: Ending::Reset { by: Side::Client, when: crate::plan::Moment::Sent(10) },
            ..Plan::draw(0, 0)
        };
        let record = SessionRecord {
            client: Some(seen(10, 5, ConnectionEnd::Left)),
            backend: Some(seen(20, 3, ConnectionEnd::Reset)),
        };
        for (to_backend, to_client, right) in
            [(3, 5, true), (10, 20, true), (2, 5, false), (11, 5, false), (3, 4, false), (3, 21, false)]
        {
            let line = line("client_reset", to_backend, to_client);
            assert_eq!(verdict(&plan, &record, &[line]).is_ok(), right, "{to_backend} {to_client}");
        }
        assert!(verdict(&plan, &record, &[line("lost", 3, 5)]).is_err());
    }
}
