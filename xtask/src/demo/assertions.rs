//! The demo's assertions, checked against what was observed. The demo succeeds only if all hold.

use injector_testbed::daemon::{BYTES, DIRECTION, PIPED, PLANE, RELAYED, SPLICED, TO_BACKEND, TO_CLIENT};
use injector_testbed::metrics::Metrics;

use super::engine::Engine;
use super::scenario::{Run, Transaction};

/// Headers sent, by listener.
pub(super) const HEADERS_SENT: &str = "injector_headers_sent_total";
/// Connections accepted, by listener.
pub(super) const ACCEPTED: &str = "injector_connections_accepted_total";

/// A statement, and the first observation that contradicts it.
#[derive(Debug)]
pub(super) struct Assertion {
    /// The statement.
    pub(super) text: String,
    /// Why it does not hold; `None` if it does.
    pub(super) failure: Option<String>,
}

/// Payload bytes during the demo, by direction and plane, from the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Carried {
    /// Client to backend, by the kernel.
    pub(super) spliced_to_backend: u64,
    /// Client to backend, by the daemon.
    pub(super) relayed_to_backend: u64,
    /// Backend to client, by the kernel.
    pub(super) spliced_to_client: u64,
    /// Backend to client, by the daemon.
    pub(super) relayed_to_client: u64,
}

/// Checks all assertions.
pub(super) fn of(run: &Run, engine: Engine) -> Vec<Assertion> {
    let every = |check: fn(&Transaction) -> Option<String>| run.transactions().find_map(check);
    vec![
        assertion("the backend rejects a connection without a header", without_header(run)),
        assertion(
            "the backend received the client's own address and port on every connection",
            every(source),
        ),
        assertion(
            "the backend received the public address that the client had connected to",
            every(destination),
        ),
        assertion("the TCP peer is not the client: only the header has its address", every(peer)),
        assertion("messages are stored and fetched byte for byte as they were sent", messages(run)),
        assertion("exactly one header was sent for each accepted connection", headers(run)),
        assertion("the injector, its metrics and the backend counted the same bytes", counts(run)),
        assertion(&planes_text(engine), planes(carried(run), engine)),
        assertion("every connection has one access log line and closed cleanly", lines(run, engine)),
        assertion("the daemon exited with success after SIGTERM", stopped(run)),
    ]
}

/// Reads the payload bytes from the metrics.
pub(super) fn carried(run: &Run) -> Carried {
    let sum =
        |direction, plane| moved(&run.before, &run.after, BYTES, &[(DIRECTION, direction), (PLANE, plane)]);
    Carried {
        spliced_to_backend: sum(TO_BACKEND, SPLICED),
        relayed_to_backend: sum(TO_BACKEND, RELAYED) + sum(TO_BACKEND, PIPED),
        spliced_to_client: sum(TO_CLIENT, SPLICED),
        relayed_to_client: sum(TO_CLIENT, RELAYED) + sum(TO_CLIENT, PIPED),
    }
}

/// By how much a counter grew; 0 if it went back.
pub(super) fn moved(before: &Metrics, after: &Metrics, name: &str, labels: &[(&str, &str)]) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates, and counts bytes of a demo"
    )]
    let whole = |value: f64| value as u64;
    whole(after.sum(name, labels) - before.sum(name, labels))
}

pub(super) fn assertion(text: &str, failure: Option<String>) -> Assertion {
    Assertion { text: text.to_owned(), failure }
}

/// `None` if both are equal, else the observed and the expected value.
pub(super) fn difference<T: PartialEq + std::fmt::Debug>(what: &str, seen: T, expected: T) -> Option<String> {
    (seen != expected).then(|| format!("{what}: {seen:?} instead of {expected:?}"))
}

fn without_header(run: &Run) -> Option<String> {
    let visit = &run.without_header;
    match &visit.header {
        Ok(header) => Some(format!("the backend found a header of {} bytes", header.raw.len())),
        Err(_) if visit.sent > 0 => Some(format!("the backend answered {} bytes", visit.sent)),
        Err(_) => None,
    }
}

pub(super) fn source(transaction: &Transaction) -> Option<String> {
    let name = transaction.listener_name();
    match &transaction.visit.header {
        Ok(header) => difference(&name, header.source, Some(transaction.client)),
        Err(refusal) => Some(format!("{name}: {refusal}")),
    }
}

pub(super) fn destination(transaction: &Transaction) -> Option<String> {
    let header = transaction.visit.header.as_ref().ok()?;
    difference(&transaction.listener_name(), header.destination, Some(transaction.listener))
}

fn peer(transaction: &Transaction) -> Option<String> {
    let same = transaction.visit.peer == transaction.client;
    same.then(|| format!("{}: the TCP peer is the client already", transaction.listener_name()))
}

fn messages(run: &Run) -> Option<String> {
    run.scenarios.iter().find_map(|scenario| {
        let sizes = format!(
            "{} sent, {} stored, {} fetched",
            scenario.sent.len(),
            scenario.stored.len(),
            scenario.fetched.len()
        );
        (scenario.stored != scenario.sent || scenario.fetched != scenario.sent)
            .then(|| format!("{}: {sizes}", scenario.family.name()))
    })
}

fn headers(run: &Run) -> Option<String> {
    run.transactions().find_map(|transaction| {
        let listener = transaction.listener_name();
        let moved = |name| moved(&run.before, &run.after, name, &[("listener", &listener)]);
        difference(&format!("{listener}: accepted, sent"), (moved(ACCEPTED), moved(HEADERS_SENT)), (1, 1))
    })
}

fn counts(run: &Run) -> Option<String> {
    let line_by_line = run.transactions().find_map(|transaction| {
        let logged = (transaction.logged("bytes_to_backend"), transaction.logged("bytes_to_client"));
        let by_backend = (transaction.visit.received, transaction.visit.sent);
        difference(&format!("{}: to backend, to client", transaction.listener_name()), logged, by_backend)
    });
    let carried = carried(run);
    let total = |field| run.transactions().map(|transaction| transaction.logged(field)).sum::<u64>();
    line_by_line.or_else(|| {
        let logged = Carried {
            spliced_to_backend: total("spliced_to_backend"),
            relayed_to_backend: total("bytes_to_backend") - total("spliced_to_backend"),
            spliced_to_client: total("spliced_to_client"),
            relayed_to_client: total("bytes_to_client") - total("spliced_to_client"),
        };
        difference("metrics and log", carried, logged)
    })
}

fn planes_text(engine: Engine) -> String {
    match engine {
        Engine::Splice => "the kernel carried payload in both directions".to_owned(),
        Engine::Relay => "the daemon carried all payload, as the relay engine does".to_owned(),
    }
}

fn planes(carried: Carried, engine: Engine) -> Option<String> {
    let spliced = (carried.spliced_to_backend, carried.spliced_to_client);
    let relayed = (carried.relayed_to_backend, carried.relayed_to_client);
    let holds = match engine {
        Engine::Splice => spliced.0 > 0 && spliced.1 > 0,
        Engine::Relay => spliced == (0, 0) && relayed.0 > 0 && relayed.1 > 0,
    };
    (!holds).then(|| format!("to backend and to client: spliced {spliced:?}, relayed {relayed:?}"))
}

fn lines(run: &Run, engine: Engine) -> Option<String> {
    run.transactions().find_map(|transaction| {
        let (reason, used) = (&transaction.line["reason"], &transaction.line["engine"]);
        let clean = *reason == "client_closed" || *reason == "backend_closed";
        let holds = clean && *used == engine.name();
        (!holds).then(|| format!("{}: engine {used}, reason {reason}", transaction.listener_name()))
    })
}

fn stopped(run: &Run) -> Option<String> {
    (!run.stopped.success()).then(|| run.stopped.to_string())
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    use injector_testbed::demo_backend::{Header, HeaderError, Visit};
    use injector_testbed::netns::Family;
    use serde_json::json;

    use super::super::scenario::Scenario;
    use super::super::service::{IMAP, SMTP, Service};
    use super::*;

    /// A complete connection: 10 bytes to the backend, 20 to the client, 4 and 5 of them spliced.
    pub(in super::super) fn transaction(service: Service) -> Transaction {
        let client = "198.51.100.7:40000".parse().unwrap();
        let listener = "192.0.2.10:25".parse().unwrap();
        let header = Header { raw: vec![0; 28], source: Some(client), destination: Some(listener) };
        let visit = Visit {
            protocol: service.protocol,
            peer: "10.25.0.1:50000".parse().unwrap(),
            header: Ok(header),
            received: 10,
            sent: 20,
        };
        let line = json!({
            "bytes_to_backend": 10, "bytes_to_client": 20, "spliced_to_backend": 4, "spliced_to_client": 5,
            "engine": "splice", "reason": "client_closed",
        });
        Transaction { service, client, listener, visit, line }
    }

    /// A successful demo over IPv4 alone.
    fn run() -> Run {
        let mut after = String::new();
        for listener in ["smtp-ipv4", "imap-ipv4"] {
            for (direction, plane, bytes) in [
                (TO_BACKEND, SPLICED, 4),
                (TO_BACKEND, RELAYED, 6),
                (TO_CLIENT, SPLICED, 5),
                (TO_CLIENT, RELAYED, 15),
            ] {
                let labels =
                    format!("listener=\"{listener}\",{DIRECTION}=\"{direction}\",{PLANE}=\"{plane}\"");
                after += &format!("{BYTES}{{{labels}}} {bytes}\n");
            }
            after += &format!(
                "{ACCEPTED}{{listener=\"{listener}\"}} 1\n{HEADERS_SENT}{{listener=\"{listener}\"}} 1\n"
            );
        }
        let without_header = Visit {
            header: Err(HeaderError::Malformed { seen: b"EHLO".to_vec(), reason: "no signature".to_owned() }),
            sent: 0,
            ..transaction(SMTP).visit
        };
        let message = b"Subject: x\r\n\r\n".to_vec();
        Run {
            without_header,
            scenarios: vec![Scenario {
                family: Family::V4,
                sent: message.clone(),
                stored: message.clone(),
                fetched: message,
                transactions: [transaction(SMTP), transaction(IMAP)],
            }],
            before: Metrics::default(),
            after: Metrics::parse(&(after + "# EOF\n")).unwrap(),
            stopped: ExitStatus::from_raw(0),
        }
    }

    fn failed(run: &Run, engine: Engine) -> Vec<String> {
        of(run, engine)
            .into_iter()
            .filter(|assertion| assertion.failure.is_some())
            .map(|assertion| assertion.text)
            .collect()
    }

    #[test]
    fn a_successful_run_passes() {
        assert_eq!(failed(&run(), Engine::Splice), Vec::<String>::new());
    }

    #[test]
    fn every_assertion_can_fail() {
        type Spoil = fn(&mut Run);
        let cases: [(&str, Spoil); 12] = [
            ("without a header", |p| {
                p.without_header.header = p.scenarios[0].transactions[0].visit.header.clone()
            }),
            ("without a header", |p| p.without_header.sent = 9),
            ("own address and port", |p| p.scenarios[0].transactions[1].client.set_port(1)),
            ("own address and port", |p| {
                p.scenarios[0].transactions[0].visit.header = Err(HeaderError::Silent)
            }),
            ("connected to", |p| p.scenarios[0].transactions[0].listener.set_port(1)),
            ("TCP peer is not the client", |p| {
                p.scenarios[0].transactions[0].visit.peer = p.scenarios[0].transactions[0].client
            }),
            ("byte for byte", |p| p.scenarios[0].fetched[3] ^= 1),
            ("byte for byte", |p| p.scenarios[0].stored.truncate(3)),
            ("one header", |p| p.before = p.after.clone()),
            ("counted the same", |p| p.scenarios[0].transactions[0].visit.received += 1),
            ("closed cleanly", |p| p.scenarios[0].transactions[0].line["reason"] = json!("lost")),
            ("after SIGTERM", |p| p.stopped = ExitStatus::from_raw(9)),
        ];
        for (text, spoil) in cases {
            let mut run = run();
            spoil(&mut run);
            let failed = failed(&run, Engine::Splice);
            assert!(failed.iter().any(|failed| failed.contains(text)), "{text}: {failed:?}");
        }
    }

    #[test]
    fn the_engine_decides_which_plane_must_carry() {
        let all = Carried {
            spliced_to_backend: 1,
            relayed_to_backend: 1,
            spliced_to_client: 1,
            relayed_to_client: 1,
        };
        let cases = [
            (Engine::Splice, all, true),
            (Engine::Splice, Carried { spliced_to_client: 0, ..all }, false),
            (Engine::Splice, Carried { spliced_to_backend: 0, ..all }, false),
            (Engine::Relay, all, false),
            (Engine::Relay, Carried { spliced_to_backend: 0, spliced_to_client: 0, ..all }, true),
            (Engine::Relay, Carried::default(), false),
        ];
        for (engine, carried, holds) in cases {
            assert_eq!(planes(carried, engine).is_none(), holds, "{engine:?} {carried:?}");
        }
    }
}
