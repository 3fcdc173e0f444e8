//! One request to a LAPI that does not do what it should.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
};

use super::*;
use crate::{
    config::Captcha,
    guard::crowdsec::tests::{LIMIT, Lapi, respond},
};

const RULES: Rules = Rules { full: true, captcha: Captcha::Ban, max_kept: 1, max_entries: 1, now_ns: 0 };

/// Shorter than [`LIMIT`] by far.
const SHORT: Duration = Duration::from_millis(200);

/// As long as no test takes.
const NO_LIMITS: Timeouts = Timeouts { resolve: FOREVER, connect: FOREVER, head: FOREVER, body: FOREVER };
const FOREVER: Duration = Duration::from_secs(3600);

fn settings(url: &str, api_key_file: PathBuf) -> CrowdSec {
    CrowdSec {
        url: url.to_owned(),
        api_key_file,
        ca_file: None,
        interval: LIMIT,
        captcha: Captcha::Ban,
        origins: Vec::new(),
        scenarios_containing: Vec::new(),
        usage_metrics: false,
    }
}

/// Why a request fails, on a thread that may be left waiting.
fn failure(
    url: String,
    timeouts: Timeouts,
    request: impl FnOnce(Client<'_>) -> Result<(), RequestError> + Send + 'static,
) -> String {
    let (sender, failure) = mpsc::channel();
    thread::spawn(move || {
        let key = tempfile::NamedTempFile::new().unwrap();
        fs::write(key.path(), "key").unwrap();
        let settings = settings(&url, key.path().to_owned());
        let error = Client::new(&settings, timeouts).and_then(request).unwrap_err();
        // A test that has failed does not listen.
        let _ = sender.send(error.to_string());
    });
    failure.recv_timeout(LIMIT).expect("it waits for ever")
}

fn decisions(client: Client<'_>) -> Result<(), RequestError> {
    client.decisions(&RULES).map(drop)
}

/// A listener that accepts nothing, whose queue is full: further SYNs get no answer.
fn deaf() -> (SocketAddr, Vec<TcpStream>, socket2::Socket) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let queued = std::iter::from_fn(|| TcpStream::connect_timeout(&address, SHORT).ok()).take(100).collect();
    (address, queued, socket)
}

#[test]
fn a_lapi_that_answers_no_syn_is_given_up() {
    let (address, _queued, _listener) = deaf();
    let timeouts = Timeouts { connect: SHORT, ..NO_LIMITS };
    let error = failure(format!("http://{address}"), timeouts, decisions);
    assert_eq!(error, "no answer from the LAPI: timeout: connect");
}

#[test]
fn a_lapi_that_accepts_and_is_silent_is_given_up() {
    // The kernel accepts.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let head = Timeouts { head: SHORT, ..NO_LIMITS };
    let error = failure(format!("http://{address}"), head, decisions);
    assert_eq!(error, "no answer from the LAPI: timeout: receive response");
    // Amid the handshake of TLS.
    let connect = Timeouts { connect: SHORT, ..NO_LIMITS };
    let error = failure(format!("https://{address}"), connect, decisions);
    assert_eq!(error, "no answer from the LAPI: timeout: connect");
}

#[test]
fn a_lapi_that_reads_no_further_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let timeouts = Timeouts { connect: SHORT, ..NO_LIMITS };
    let payload = serde_json::Value::String("x".repeat(64 << 20));
    let error =
        failure(format!("http://{address}"), timeouts, move |client| client.usage(&payload).map(drop));
    assert_eq!(error, "no answer from the LAPI: timeout: send body");
}

#[test]
fn errors_say_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let lapi = Lapi::start(|_, request, stream| {
        let status = request.header("x-api-key").unwrap().to_owned();
        respond(stream, &format!("{status} Status"), "");
    });
    let error = |key: &str, ca: Option<&str>, url: &str| {
        let settings = CrowdSec { ca_file: ca.map(|ca| file("ca", ca)), ..settings(url, file("key", key)) };
        let answer = Client::new(&settings, Timeouts::default()).and_then(|client| client.decisions(&RULES));
        answer.unwrap_err().to_string().replace(directory.path().to_str().unwrap(), "DIR")
    };
    let url = format!("http://{}", lapi.address);
    for (got, expected) in [
        (
            error("", None, &url),
            "DIR/key must contain one line, the API key that `cscli bouncers add` printed",
        ),
        (
            error("a\nb", None, &url),
            "DIR/key must contain one line, the API key that `cscli bouncers add` printed",
        ),
        (
            // A key is not looked for without end.
            error(&format!("{}key", " ".repeat(1 << 20)), None, &url),
            "DIR/key must contain one line, the API key that `cscli bouncers add` printed",
        ),
        (error("k", Some("x"), &url), "DIR/ca contains no certificate in PEM"),
        (
            error("403", None, &url),
            "the LAPI rejected the API key with status 403: make one with `cscli bouncers add injector`, and write it to DIR/key",
        ),
        (error("503", None, &url), "the LAPI answered with status 503"),
        (
            error("404", None, &url),
            &format!(
                "the LAPI has nothing at {url}/v1/decisions/stream (status 404): check guard.crowdsec.url"
            ),
        ),
        (
            error("200", None, &url),
            "the answer is not a list of decisions: EOF while parsing a value at line 1 column 0",
        ),
        (
            error("k", None, "http://127.0.0.1:1"),
            "no answer from the LAPI: io: Connection refused (os error 111)",
        ),
    ] {
        assert_eq!(got, expected);
    }
}
