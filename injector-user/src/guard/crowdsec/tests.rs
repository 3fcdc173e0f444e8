//! The feed against a LAPI that says what a test wants.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    sync::{Arc, Mutex},
};

use tempfile::TempDir;

use super::*;
use crate::config::Captcha;

/// Longer than anything here takes.
pub(super) const LIMIT: Duration = Duration::from_secs(20);

/// A request as the LAPI sees it.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// Method and target.
    line: String,
    /// In lower case.
    headers: Vec<String>,
    body: String,
}

impl Request {
    fn read(stream: &TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let mut line = || {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            line.trim_end().to_owned()
        };
        let first = line();
        let headers: Vec<_> = std::iter::from_fn(|| Some(line()).filter(|line| !line.is_empty()))
            .map(|header| match header.split_once(':') {
                Some((name, value)) => format!("{}:{value}", name.to_ascii_lowercase()),
                None => header,
            })
            .collect();
        let length = headers.iter().find_map(|header| header.strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        reader.read_exact(&mut body).unwrap();
        Self { line: first, headers, body: String::from_utf8(body).unwrap() }
    }

    fn asks_for_all(&self) -> bool {
        self.line.contains("startup=true")
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|header| header.strip_prefix(&format!("{name}: ")))
    }
}

/// A LAPI; `answer` gets the number of the request, from 0.
pub(super) struct Lapi {
    pub(super) address: std::net::SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Lapi {
    pub(super) fn start(answer: impl Fn(usize, &Request, &mut TcpStream) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let mut stream = stream.unwrap();
                let request = Request::read(&stream);
                log.lock().unwrap().push(request.clone());
                answer(number, &request, &mut stream);
            }
        });
        Self { address, requests }
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

/// Writes an answer.
type Response = Box<dyn Fn(&mut TcpStream) + Send>;

pub(super) fn respond(stream: &mut TcpStream, status: &str, body: &str) {
    let length = body.len();
    // The client may have gone.
    let _ =
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
}

fn list(name: &str, values: &[&str]) -> String {
    let entry = |value: &&str| {
        format!(
            r#"{{"duration":"1h","origin":"cscli","scenario":"test","scope":"Ip","type":"ban","value":"{value}"}}"#
        )
    };
    format!(r#""{name}":[{}]"#, values.iter().map(entry).collect::<Vec<_>>().join(","))
}

struct Bench {
    table: Guard,
    metrics: crate::telemetry::metrics::Metrics,
    feed: Feed,
    settings: CrowdSec,
    directory: TempDir,
}

impl Bench {
    fn start(lapi: &Lapi, change: impl FnOnce(&mut CrowdSec)) -> Self {
        Self::start_within(lapi, Duration::from_millis(300), change)
    }

    /// With a limit for each answer.
    fn start_within(lapi: &Lapi, limit: Duration, change: impl FnOnce(&mut CrowdSec)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let api_key_file = directory.path().join("key");
        fs::write(&api_key_file, "right\n").unwrap();
        let mut settings = CrowdSec {
            url: format!("http://{}", lapi.address),
            api_key_file,
            ca_file: None,
            interval: Duration::from_millis(20),
            captcha: Captcha::Ban,
            origins: Vec::new(),
            scenarios_containing: Vec::new(),
            usage_metrics: false,
        };
        change(&mut settings);
        let metrics = crate::telemetry::metrics::Metrics::new();
        let follower = follower(metrics.crowdsec(), limit);
        let table = follower.table.clone();
        let feed = Feed::start_with(Some(settings.clone()), follower).unwrap();
        Self { table, metrics, feed, settings, directory }
    }

    fn bans(&self) -> Vec<String> {
        let bans = self.table.snapshot(Some(Origin::CrowdSec), 100).bans.into_iter();
        bans.map(|listed| listed.ban.network.address().to_string()).collect()
    }

    /// Not a number before the feed has begun.
    fn sample(&self, series: &str) -> f64 {
        let text = self.metrics.encode().unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(f64::NAN, |value| value.parse().unwrap())
    }

    fn failures(&self) -> f64 {
        self.sample("injector_guard_crowdsec_failures_total")
    }
}

/// With a limit for each answer.
fn follower(metrics: CrowdSecMetrics, limit: Duration) -> Follower {
    let timeouts = Timeouts { resolve: LIMIT, connect: LIMIT, head: limit, body: limit };
    Follower { table: Guard::new(None, 100), max_bans: 100, metrics, timeouts }
}

#[track_caller]
fn wait(what: &str, mut is_there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_there() {
        assert!(start.elapsed() < LIMIT, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn all_decisions_come_first_and_then_changes() {
    let lapi = Lapi::start(|number, _, stream| {
        let body = match number {
            0 => format!(
                "{{{},{}}}",
                list("deleted", &["192.0.2.1"]),
                list("new", &["192.0.2.1", "192.0.2.2"])
            ),
            1 => format!("{{{},{}}}", list("deleted", &["192.0.2.1"]), list("new", &["2001:db8::1"])),
            _ => r#"{"deleted":null,"new":null}"#.to_owned(),
        };
        respond(stream, "200 OK", &body);
    });
    let bench = Bench::start(&lapi, |settings| {
        settings.origins = vec!["cscli".to_owned(), "a b&c".to_owned()];
        settings.scenarios_containing = vec!["ssh".to_owned()];
    });
    wait("the fourth request", || lapi.requests().len() >= 4);
    assert_eq!(bench.bans(), ["192.0.2.2", "2001:db8::1"]);
    let requests = lapi.requests();
    assert_eq!(
        requests[0].line,
        "GET /v1/decisions/stream?startup=true&scopes=ip%2Cip,range&origins=x HTTP/1.1".replace(
            "ip%2Cip,range&origins=x",
            "ip%2Crange&origins=cscli%2Ca%20b%26c&scenarios_containing=ssh"
        )
    );
    assert!(requests[1..].iter().all(|request| !request.asks_for_all()));
    assert_eq!(requests[0].header("x-api-key"), Some("right"));
    assert_eq!(requests[0].header("user-agent"), Some(concat!("injector/", env!("CARGO_PKG_VERSION"))));
    assert_eq!(bench.sample("injector_guard_crowdsec_up"), 1.0);
    assert!(bench.sample("injector_guard_crowdsec_last_success_timestamp_seconds") > 1e9);
    assert_eq!(bench.failures(), 0.0);
}

#[test]
fn nonsense_changes_nothing_and_is_followed_by_all_decisions() {
    let cut = format!("{{{},\"new\":[{{\"duration\":\"1h\"", list("deleted", &["192.0.2.1"]));
    let answers: Vec<Response> = vec![
        Box::new(|stream| respond(stream, "200 OK", "<html><body>It works!</body></html>")),
        Box::new(move |stream| respond(stream, "200 OK", &cut)),
        // The connection ends before the length that it announced.
        Box::new(|stream| {
            let body = format!("{{{}}}", list("new", &["192.0.2.9"]));
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{body}").unwrap();
        }),
        Box::new(|stream| respond(stream, "500 Internal Server Error", "{}")),
        // One byte now and then.
        Box::new(|stream| {
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n").unwrap();
            while stream.write_all(b" ").is_ok() {
                thread::sleep(Duration::from_millis(50));
            }
        }),
        // A head without end.
        Box::new(|stream| {
            write!(stream, "HTTP/1.1 200 OK\r\nX: ").unwrap();
            while stream.write_all(&[b'x'; 4096]).is_ok() {}
        }),
        Box::new(|stream| respond(stream, "302 Found\r\nLocation: http://127.0.0.1:1/", "")),
        // Nothing at all.
        Box::new(|stream| drop(stream.read(&mut [0; 1]))),
    ];
    let count = answers.len();
    let (number, ready) = (Mutex::new(0), Arc::new(Mutex::new(())));
    let gate = Arc::clone(&ready);
    // Each nonsense after one good answer.
    let lapi = Lapi::start(move |_, request, stream| {
        if request.asks_for_all() {
            return respond(stream, "200 OK", &format!("{{{}}}", list("new", &["192.0.2.1"])));
        }
        drop(gate.lock().unwrap());
        let mut number = number.lock().unwrap();
        match answers.get(*number) {
            Some(answer) => answer(stream),
            None => respond(stream, "200 OK", r#"{"new":null,"deleted":null}"#),
        }
        *number += 1;
    });
    let bench = Bench::start(&lapi, |_| {});
    #[expect(clippy::cast_precision_loss, reason = "eight")]
    for failed in 1..=count {
        wait(&format!("failure {failed}"), || bench.failures() >= failed as f64);
        assert_eq!(bench.bans(), ["192.0.2.1"], "after nonsense {failed}");
    }
    wait("success again", || bench.sample("injector_guard_crowdsec_up") == 1.0);
    wait("a delta", || !lapi.requests().last().unwrap().asks_for_all());
    let all = lapi.requests().iter().filter(|request| request.asks_for_all()).count();
    assert_eq!(all, count + 1, "all decisions at the start, and after each failure");
    drop(ready);
}

#[test]
fn a_renewed_key_needs_no_reload() {
    let lapi = Lapi::start(|_, request, stream| match request.header("x-api-key") {
        Some("right") => respond(stream, "200 OK", &format!("{{{}}}", list("new", &["192.0.2.1"]))),
        _ => respond(stream, "403 Forbidden", r#"{"message":"access forbidden"}"#),
    });
    let bench = Bench::start(&lapi, |settings| {
        settings.api_key_file = PathBuf::from("/nonexistent/key");
    });
    wait("a failure without a key", || bench.failures() >= 1.0);
    assert!(lapi.requests().is_empty());
    let file = bench.directory.path().join("key");
    fs::write(&file, "wrong").unwrap();
    bench.feed.configure(Some(CrowdSec { api_key_file: file.clone(), ..bench.settings.clone() }));
    wait("a rejected key", || !lapi.requests().is_empty());
    assert_eq!(bench.bans(), [""; 0]);
    fs::write(&file, "right").unwrap();
    wait("a ban", || bench.bans() == ["192.0.2.1"]);
}

/// The key is for this LAPI alone.
#[test]
fn a_redirect_is_not_followed() {
    let other = Lapi::start(|_, _, stream| {
        respond(stream, "200 OK", &format!("{{{}}}", list("new", &["192.0.2.1"])));
    });
    let address = other.address;
    let lapi = Lapi::start(move |_, _, stream| {
        respond(stream, &format!("302 Found\r\nLocation: http://{address}/v1/decisions/stream"), "");
    });
    let bench = Bench::start(&lapi, |_| {});
    wait("a failure", || bench.failures() >= 1.0);
    assert!(other.requests().is_empty() && bench.bans().is_empty());
}

/// A reload while a request is under way: its answer belongs to settings that are no more.
#[test]
fn an_answer_to_old_settings_is_dropped() {
    let (asked, gate) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(())));
    let (count, closed) = (Arc::clone(&asked), gate.lock().unwrap());
    let wait_open = Arc::clone(&gate);
    let lapi = Lapi::start(move |_, _, stream| {
        *count.lock().unwrap() += 1;
        drop(wait_open.lock().unwrap());
        respond(stream, "200 OK", &format!("{{{}}}", list("new", &["192.0.2.1"])));
    });
    let bench = Bench::start_within(&lapi, LIMIT, |_| {});
    wait("a request", || *asked.lock().unwrap() == 1);
    bench.feed.configure(None);
    let changes = bench.table.changes();
    drop(closed);
    wait("the end of the metrics", || !bench.metrics.encode().unwrap().contains("crowdsec"));
    assert!(!changes.has_changed().unwrap() && bench.bans().is_empty());
}

/// A reload that changes something else.
#[test]
fn the_same_settings_again_need_no_full_answer() {
    let lapi = Lapi::start(|_, request, stream| {
        let new = if request.asks_for_all() { list("new", &["192.0.2.1"]) } else { list("new", &[]) };
        respond(stream, "200 OK", &format!("{{{new}}}"));
    });
    let bench = Bench::start(&lapi, |settings| settings.interval = LIMIT);
    wait("a ban", || bench.bans() == ["192.0.2.1"]);
    bench.feed.configure(Some(bench.settings.clone()));
    wait("a second request", || lapi.requests().len() == 2);
    assert!(!lapi.requests()[1].asks_for_all());
    assert_eq!(bench.bans(), ["192.0.2.1"]);
}

/// Threads with mail come first.
#[test]
fn only_the_thread_of_the_feed_has_a_low_priority() {
    let niceness = || rustix::process::getpriority_process(None).unwrap();
    let before = niceness();
    let thread = thread::spawn(move || {
        let (_, inbox) = mpsc::channel();
        follower(CrowdSecMetrics::default(), LIMIT).run(None, &inbox);
        niceness()
    });
    assert_eq!(thread.join().unwrap(), NICENESS);
    assert!(before == niceness() && before < NICENESS);
}

#[test]
fn other_settings_replace_the_bans_and_none_removes_them() {
    let one = Lapi::start(|_, _, stream| {
        respond(stream, "200 OK", &format!("{{{}}}", list("new", &["192.0.2.1"])))
    });
    let other = Lapi::start(|_, _, stream| {
        respond(stream, "200 OK", &format!("{{{}}}", list("new", &["192.0.2.2"])))
    });
    let bench = Bench::start(&one, |_| {});
    wait("the first ban", || bench.bans() == ["192.0.2.1"]);
    let url = format!("http://{}", other.address);
    bench.feed.configure(Some(CrowdSec { url, ..bench.settings.clone() }));
    wait("the second ban", || bench.bans() == ["192.0.2.2"]);
    bench.feed.configure(None);
    wait("no ban", || bench.bans().is_empty());
    wait("no metrics", || !bench.metrics.encode().unwrap().contains("crowdsec"));
    let asked = other.requests().len();
    thread::sleep(Duration::from_millis(100));
    assert_eq!(other.requests().len(), asked, "the LAPI is not asked any more");
}

#[test]
fn usage_metrics_are_sent_to_a_lapi_that_knows_them() {
    for (status, arrives) in [("201 Created", true), ("404 Not Found", false)] {
        let lapi = Lapi::start(move |_, request, stream| {
            if request.line.starts_with("POST") {
                respond(stream, status, "");
            } else if request.asks_for_all() {
                respond(stream, "200 OK", &format!("{{{}}}", list("new", &["192.0.2.1", "2001:db8::1"])));
            } else {
                respond(stream, "200 OK", r#"{"new":null,"deleted":null}"#);
            }
        });
        let bench = Bench::start(&lapi, |settings| settings.usage_metrics = true);
        wait("the fifth request", || lapi.requests().len() >= 5);
        let posts: Vec<_> =
            lapi.requests().into_iter().filter(|request| request.line.starts_with("POST")).collect();
        assert_eq!(posts.len(), 1, "{status}");
        assert_eq!(posts[0].line, "POST /v1/usage-metrics HTTP/1.1");
        assert_eq!(posts[0].header("content-type"), Some("application/json"));
        assert_eq!(posts[0].header("x-api-key"), Some("right"));
        let payload: serde_json::Value = serde_json::from_str(&posts[0].body).unwrap();
        let component = &payload["remediation_components"][0];
        assert_eq!(component["type"], "injector");
        assert_ne!(component["os"]["version"], "");
        let items = component["metrics"][0]["items"].as_array().unwrap();
        assert_eq!(
            items.len(),
            2,
            "bans are not in the kernel, so nothing is known of dropped packets: {items:?}"
        );
        assert!(items.iter().all(|item| item["name"] == "active_decisions" && item["value"] == 1));
        assert_eq!(bench.failures(), 0.0, "{arrives}");
    }
}

#[test]
fn usage_metrics_end_with_a_lapi_that_does_not_know_them() {
    let lapi = Lapi::start(|_, _, stream| respond(stream, "404 Not Found", ""));
    let bench = Bench::start(&lapi, |settings| settings.interval = LIMIT);
    let mut usage = Usage::new(true, 0, 0);
    assert!(usage.is_due(Duration::MAX));
    follower(CrowdSecMetrics::default(), LIMIT).report(&bench.settings, &mut usage, Duration::ZERO);
    assert!(!usage.is_due(Duration::MAX));
}

#[test]
fn what_is_read_of_an_answer_depends_on_the_room_for_bans() {
    let lapi = Lapi::start(|_, _, stream| respond(stream, "503 Status", ""));
    let bench = Bench::start(&lapi, |settings| settings.interval = LIMIT);
    let rules = follower(CrowdSecMetrics::default(), LIMIT).rules(&bench.settings, true);
    assert_eq!((rules.max_kept, rules.max_entries), (100, 200 + MORE_ENTRIES));
}

/// Entries are limited one by one, and answers by their number.
#[test]
fn an_answer_of_twelve_megabytes_is_read() {
    let addresses: Vec<_> = (0..200).map(|host| format!("192.0.2.{host}")).collect();
    let new = list("new", &addresses.iter().map(String::as_str).collect::<Vec<_>>());
    let new = new.replace(r#""origin""#, &format!(r#""uuid":"{}","origin""#, "x".repeat(60_000)));
    let lapi = Lapi::start(move |_, _, stream| respond(stream, "200 OK", &format!("{{{new}}}")));
    let bench = Bench::start_within(&lapi, LIMIT, |settings| settings.interval = LIMIT);
    wait("all bans that there is room for", || bench.bans().len() == 100);
}

#[test]
fn decisions_without_room_are_counted() {
    let lapi = Lapi::start(|number, _, stream| {
        let new = list("new", &[&format!("192.0.2.{}", number % 250)]);
        respond(stream, "200 OK", &format!("{{{new}}}"));
    });
    let bench = Bench::start(&lapi, |_| {});
    let others = (0..100).map(|host| format!("198.51.100.{host}").parse().unwrap());
    let ban = |network| WantedBan { network, until_ns: u64::MAX, reason: "".into() };
    bench.table.change(Origin::List, others.map(ban), Vec::new());
    let full = "injector_guard_crowdsec_ignored_total{reason=\"full\"}";
    wait("a decision without room", || bench.sample(full) >= 1.0);
}
