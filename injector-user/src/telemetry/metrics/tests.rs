//! The exported metrics against the documentation.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Seek as _, Write as _},
    process::Command,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::*;
use crate::telemetry::outcome::{Bytes, CloseReason};

#[derive(Debug)]
struct OneBackend;

impl BackendSource for OneBackend {
    fn sample(&self) -> Vec<BackendSample> {
        vec![BackendSample {
            name: "mail.internal:2525".to_owned(),
            up: true,
            active: 0,
            sessions: 0,
            checks_passed: 0,
            checks_failed: 0,
            ejections: 0,
            misread: 0,
            misreads_header: false,
        }]
    }

    fn queued(&self) -> usize {
        0
    }
}

#[derive(Debug)]
struct OneList;

impl GuardSource for OneList {
    fn sample(&self) -> GuardSample {
        let list = ListSample { file: "/etc/deny.txt".to_owned(), networks: 3, failed: false, read_at: None };
        GuardSample {
            bans: vec![("list", 3)],
            dropped: vec![("tc", 5)],
            lists: vec![list],
            ..GuardSample::default()
        }
    }
}

#[derive(Debug)]
struct OneService;

impl ServiceSource for OneService {
    fn sample(&self) -> Vec<ServiceSample> {
        vec![ServiceSample {
            service: "mail/mailserver".to_owned(),
            resource: "endpointslices",
            up: true,
            last_answer: None,
            failures: 0,
            endpoints: Some([("ready", 2), ("terminating", 0), ("not_ready", 0)]),
        }]
    }
}

#[derive(Debug)]
struct Counted;

impl BpfCounters for Counted {
    fn read(&self) -> Vec<(&'static str, &'static str, u64)> {
        vec![("inject", "pushed", 3), ("verdict", "redirected", 5)]
    }

    fn flows(&self) -> u32 {
        7
    }
}

/// Metrics in which every family has at least one sample.
pub(super) fn complete() -> (Metrics, ListenerMetrics) {
    let metrics = Metrics::new();
    metrics.watch_programs(Arc::new(Counted));
    metrics.set_engine("splice", false);
    let took = Duration::from_millis(250);
    metrics.set_check("splice", "carry", true, took);
    metrics.set_check("splice", "slow_reader", false, took);
    metrics.set_max_connections(10);
    metrics.set_draining("smtp", false);
    metrics.watch_guard(Arc::new(OneList));
    metrics.watch_services(Arc::new(OneService));
    metrics.watch_backends("smtp", Arc::new(OneBackend));
    metrics.crowdsec().enable(&["scope"]);
    metrics.crowdsec().set_decisions(vec![("CAPI".to_owned(), 3)]);
    let listener = metrics.listener("smtp", "relay");
    listener.enrolment_failed("not_established");
    (metrics, listener)
}

fn sample(metrics: &Metrics, series: &str) -> f64 {
    let text = metrics.encode().unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().unwrap()
}

/// Family → (type, unit), from the exported text.
fn families(text: &str) -> BTreeMap<&str, (&str, Option<&str>)> {
    let described = |keyword: &str| -> BTreeMap<_, _> {
        text.lines().filter_map(|line| line.strip_prefix(keyword)?.split_once(' ')).collect()
    };
    let units = described("# UNIT ");
    described("# TYPE ").into_iter().map(|(name, kind)| (name, (kind, units.get(name).copied()))).collect()
}

#[test]
fn every_family_has_its_type_and_unit() {
    let (metrics, _) = complete();
    let text = metrics.encode().unwrap();
    let expected = BTreeMap::from([
        ("injector_backend_active", ("gauge", None)),
        ("injector_backend_checks", ("counter", None)),
        ("injector_backend_ejections", ("counter", None)),
        ("injector_backend_headers_misread", ("counter", None)),
        ("injector_backend_queue", ("gauge", None)),
        ("injector_backend_sessions", ("counter", None)),
        ("injector_backend_up", ("gauge", None)),
        ("injector_backlog_bytes", ("gauge", Some("bytes"))),
        ("injector_bpf_events", ("counter", None)),
        ("injector_build", ("info", None)),
        ("injector_bytes", ("counter", Some("bytes"))),
        ("injector_config_loaded_timestamp_seconds", ("gauge", Some("seconds"))),
        ("injector_config_reloads", ("counter", None)),
        ("injector_connections_accepted", ("counter", None)),
        ("injector_connections_active", ("gauge", None)),
        ("injector_connections_closed", ("counter", None)),
        ("injector_connections_rejected", ("counter", None)),
        ("injector_engine_available", ("gauge", None)),
        ("injector_enrolment_failures", ("counter", None)),
        ("injector_enrolments", ("counter", None)),
        ("injector_guard_bans", ("gauge", None)),
        ("injector_guard_bans_rejected", ("counter", None)),
        ("injector_guard_dropped_packets", ("counter", None)),
        ("injector_guard_kernel_behind", ("gauge", None)),
        ("injector_guard_list_failed", ("gauge", None)),
        ("injector_guard_list_networks", ("gauge", None)),
        ("injector_guard_list_read_timestamp_seconds", ("gauge", Some("seconds"))),
        ("injector_guard_max_bans", ("gauge", None)),
        ("injector_header_to_first_byte_seconds", ("histogram", Some("seconds"))),
        ("injector_guard_crowdsec_decisions", ("gauge", None)),
        ("injector_guard_crowdsec_failures", ("counter", None)),
        ("injector_guard_crowdsec_ignored", ("counter", None)),
        ("injector_guard_crowdsec_last_success_timestamp_seconds", ("gauge", Some("seconds"))),
        ("injector_guard_crowdsec_up", ("gauge", None)),
        ("injector_headers_failed", ("counter", None)),
        ("injector_headers_sent", ("counter", None)),
        ("injector_inline_flows", ("gauge", None)),
        ("injector_inline_max_flows", ("gauge", None)),
        ("injector_kubernetes_endpoints", ("gauge", None)),
        ("injector_kubernetes_last_answer_timestamp_seconds", ("gauge", Some("seconds"))),
        ("injector_kubernetes_watch_failures", ("counter", None)),
        ("injector_kubernetes_watch_up", ("gauge", None)),
        ("injector_listener_draining", ("gauge", None)),
        ("injector_log_lines_dropped", ("counter", None)),
        ("injector_max_connections", ("gauge", None)),
        ("injector_plane_changes", ("counter", None)),
        ("injector_selftest_check", ("gauge", None)),
        ("injector_selftest_check_seconds", ("gauge", Some("seconds"))),
        ("process_start_time_seconds", ("gauge", Some("seconds"))),
    ]);
    assert_eq!(families(&text), expected, "{text}");
    assert!(text.ends_with("# EOF\n"), "{text}");
}

#[test]
fn the_documentation_lists_exactly_what_is_exposed() {
    let (metrics, _) = complete();
    let text = metrics.encode().unwrap();
    // Name with its suffix, labels, type: `injector_bytes_total{direction,…}`.
    let mut exposed = BTreeSet::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, rest) = line.split_once(['{', ' ']).unwrap();
        if name.ends_with("_sum") || name.ends_with("_count") {
            continue;
        }
        let rest = if line.contains('{') { rest } else { "" };
        let labels: Vec<_> = rest.split(',').filter_map(|label| Some(label.split_once('=')?.0)).collect();
        let labels: Vec<_> = labels.into_iter().filter(|label| *label != "le").collect();
        let name = name.strip_suffix("_bucket").unwrap_or(name);
        exposed.insert((name.to_owned(), labels.join(", ")));
    }
    let document = include_str!("../../../../docs/metrics.md");
    let rows = document.lines().filter_map(|line| line.strip_prefix("| `"));
    let documented: BTreeSet<_> = rows
        .filter(|row| row.starts_with("injector_") || row.starts_with("process_"))
        // A test of `injector probe` compares its own.
        .filter(|row| !row.starts_with("injector_probe_"))
        .map(|row| {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            (cells[0].trim_end_matches('`').to_owned(), cells[2].replace('`', ""))
        })
        .collect();
    assert_eq!(documented, exposed);
}

#[test]
fn the_documentation_lists_the_values_of_labels() {
    let document = include_str!("../../../../docs/metrics.md");
    for word in
        CloseReason::ALL.map(CloseReason::name).iter().chain(&RejectReason::ALL.map(RejectReason::name))
    {
        assert!(document.contains(&format!("`{word}`")), "{word} is not in docs/metrics.md");
    }
}

#[test]
fn series_of_a_listener_exist_from_the_start() {
    let (metrics, _) = complete();
    for reason in RejectReason::ALL {
        let series =
            format!("injector_connections_rejected_total{{listener=\"smtp\",reason=\"{}\"}}", reason.name());
        assert_eq!(sample(&metrics, &series), 0.0);
    }
    for reason in CloseReason::ALL {
        let labels = format!("listener=\"smtp\",engine=\"relay\",reason=\"{reason}\"");
        assert_eq!(sample(&metrics, &format!("injector_connections_closed_total{{{labels}}}")), 0.0);
    }
}

#[test]
fn each_event_increments_its_series() {
    let (metrics, listener) = complete();
    listener.accepted();
    listener.rejected(RejectReason::TooManyConnections);
    listener.header_sent();
    listener.header_failed();
    listener.enrolled();
    listener.enrolment_failed("not_established");
    listener.bytes(Bytes { relayed: 1, piped: 5, spliced: 2 }, Bytes { relayed: 3, piped: 6, spliced: 4 });
    listener.first_byte(Duration::from_millis(3));
    let served = r#"listener="smtp",engine="relay""#;
    let bytes = |direction, plane| {
        format!(r#"injector_bytes_total{{listener="smtp",direction="{direction}",plane="{plane}"}}"#)
    };
    let first_byte =
        |le| format!(r#"injector_header_to_first_byte_seconds_bucket{{le="{le}",listener="smtp"}}"#);
    for (series, value) in [
        (r#"injector_connections_accepted_total{listener="smtp"}"#.to_owned(), 1.0),
        (
            r#"injector_connections_rejected_total{listener="smtp",reason="too_many_connections"}"#
                .to_owned(),
            1.0,
        ),
        (format!("injector_headers_sent_total{{{served}}}"), 1.0),
        (format!("injector_headers_failed_total{{{served}}}"), 1.0),
        (r#"injector_enrolments_total{listener="smtp"}"#.to_owned(), 1.0),
        (r#"injector_enrolment_failures_total{listener="smtp",reason="not_established"}"#.to_owned(), 2.0),
        (bytes("client_to_backend", "relayed"), 1.0),
        (bytes("client_to_backend", "piped"), 5.0),
        (bytes("client_to_backend", "spliced"), 2.0),
        (bytes("backend_to_client", "relayed"), 3.0),
        (bytes("backend_to_client", "piped"), 6.0),
        (bytes("backend_to_client", "spliced"), 4.0),
        (first_byte("0.0025"), 0.0),
        (first_byte("0.005"), 1.0),
        (r#"injector_bpf_events_total{program="verdict",event="redirected"}"#.to_owned(), 5.0),
        (r#"injector_engine_available{engine="splice"}"#.to_owned(), 0.0),
        (r#"injector_selftest_check{engine="splice",check="carry"}"#.to_owned(), 1.0),
        (r#"injector_selftest_check{engine="splice",check="slow_reader"}"#.to_owned(), 0.0),
        (r#"injector_selftest_check_seconds{engine="splice",check="carry"}"#.to_owned(), 0.25),
        ("injector_max_connections".to_owned(), 10.0),
        (format!(r#"injector_build_info{{version="{}"}}"#, env!("CARGO_PKG_VERSION")), 1.0),
    ] {
        assert_eq!(sample(&metrics, &series), value, "{series}");
    }
    let age = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
        - sample(&metrics, "process_start_time_seconds");
    assert!((0.0..60.0).contains(&age), "{age}");
}

#[test]
fn a_connection_is_active_until_its_guard_is_dropped() {
    let (metrics, listener) = complete();
    let active = || sample(&metrics, r#"injector_connections_active{listener="smtp",engine="relay"}"#);
    let (one, two) = (listener.active(), listener.active());
    assert_eq!(active(), 2.0);
    drop(one);
    assert_eq!(active(), 1.0);
    drop(two);
    assert_eq!(active(), 0.0);
}

#[test]
fn connections_of_a_source_are_read_at_each_scrape() {
    let (metrics, listener) = complete();
    let counts = Arc::new(Mutex::new(ConnectionCounts { active: 1, accepted: 40 }));
    let watch = || {
        let counts = Arc::clone(&counts);
        metrics.watch_connections("smtp", "inline", move || *counts.lock().unwrap());
    };
    let seen = || {
        let active = sample(&metrics, r#"injector_connections_active{listener="smtp",engine="inline"}"#);
        (active, sample(&metrics, r#"injector_connections_accepted_total{listener="smtp"}"#))
    };
    watch();
    // What an earlier daemon has counted does not count again.
    assert_eq!(seen(), (1.0, 0.0));
    *counts.lock().unwrap() = ConnectionCounts { active: 3, accepted: 45 };
    listener.accepted();
    assert_eq!(seen(), (3.0, 6.0));
    // Watched again by a reload: nothing is lost or counted twice.
    counts.lock().unwrap().accepted = 47;
    watch();
    assert_eq!(seen(), (3.0, 8.0));
    assert_eq!(listener.snapshot().accepted, 8);
    // A removed listener is followed until its last connection has ended.
    metrics.forget_listener("smtp");
    counts.lock().unwrap().active = 1;
    assert_eq!(seen().0, 1.0);
    counts.lock().unwrap().active = 0;
    assert_eq!(seen().0, 0.0);
    assert_eq!(Arc::strong_count(&counts), 1);
}

#[test]
fn a_close_before_the_backend_spoke_also_counts_as_rejected() {
    let (metrics, listener) = complete();
    CloseReason::ALL.into_iter().for_each(|reason| listener.closed(reason));
    for reason in CloseReason::ALL {
        let labels = format!("listener=\"smtp\",engine=\"relay\",reason=\"{reason}\"");
        assert_eq!(sample(&metrics, &format!("injector_connections_closed_total{{{labels}}}")), 1.0);
    }
    let refusals = [
        "backend_refused",
        "connect_timeout",
        "no_source_ports",
        "backend_unreachable",
        "backend_unresolved",
        "backend_full",
        "no_banner",
        "header_misread",
    ];
    for reason in RejectReason::ALL.map(RejectReason::name) {
        let series = format!("injector_connections_rejected_total{{listener=\"smtp\",reason=\"{reason}\"}}");
        let expected = refusals.contains(&reason) || reason == "forged_header";
        assert_eq!(sample(&metrics, &series), f64::from(u8::from(expected)), "{reason}");
    }
}

/// The search in "first five minutes": samples that are not zero, and no comments.
#[test]
fn the_documented_search_prints_only_what_was_counted() {
    let page = include_str!("../../../../docs/operations.md");
    let (_, rest) = page.split_once("/metrics \\| ").unwrap();
    let (command, _) = rest.split_once('`').unwrap();
    let found = |metrics: &Metrics| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(metrics.encode().unwrap().as_bytes()).unwrap();
        file.rewind().unwrap();
        let mut shell = Command::new("sh");
        let output = shell.args(["-c", &command.replace("\\|", "|")]).stdin(file).output().unwrap();
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let (metrics, listener) = complete();
    assert_eq!(found(&metrics), [""; 0]);
    listener.rejected(RejectReason::ALL[0]);
    listener.header_failed();
    let found = found(&metrics);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].starts_with("injector_connections_rejected_total{"), "{found:?}");
    assert!(found[1].starts_with("injector_headers_failed_total{"), "{found:?}");
}
