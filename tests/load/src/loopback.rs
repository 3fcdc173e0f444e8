//! Client and server against each other on loopback, without a proxy between them.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use injector_common::proxy::{Addresses, Command, SAFE_LEN, v2};

use crate::client::execute;
use crate::job::{Job, JobOutcome, Load, ServerCounts};
use crate::server::ServerState;
use crate::service::{ECHO, IMAP, SHORT, SINK, SMTP, SOURCE, Service};

/// The source address that headers must carry.
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7));

/// An address that only this process uses, so that parallel test runs do not collide.
fn address() -> IpAddr {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(127, 100 + high, middle, low.max(1)))
}

/// One server for all tests.
fn server() -> &'static ServerState {
    static SERVER: OnceLock<&'static ServerState> = OnceLock::new();
    SERVER.get_or_init(|| ServerState::start(address(), CLIENT).unwrap())
}

fn run(service: &Service, load: Load) -> JobOutcome {
    let target = SocketAddr::new(address(), service.bare_port());
    let outcome = execute(&Job { target, load, seconds: 0.2 }).unwrap();
    assert_eq!(outcome.failure, None, "{outcome:?}");
    assert!(outcome.seconds >= 0.2, "{outcome:?}");
    outcome
}

/// The sum of the counts, once `enough` accepts it or five seconds have passed.
fn counted(enough: impl Fn(&ServerCounts) -> bool) -> ServerCounts {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut sum = ServerCounts::default();
    while Instant::now() < deadline && !enough(&sum) {
        thread::sleep(Duration::from_millis(10));
        sum.add(server().take_counts());
    }
    sum
}

/// One test, because all cases share the server's counts.
#[test]
fn client_and_server_counts_agree() {
    server();
    let upload = run(&SINK, Load::Upload { connections: 2 });
    let counts = counted(|counts| counts.bytes_in >= upload.bytes);
    assert_eq!((counts.bytes_in, counts.bare), (upload.bytes, 2));
    let download = run(&SOURCE, Load::Download { connections: 2 });
    let counts = counted(|counts| counts.bytes_out >= download.bytes);
    assert_eq!((counts.bytes_out, counts.bare), (download.bytes, 2));
    assert!(upload.bytes > 0 && download.bytes > 0);

    for service in [&ECHO, &IMAP, &SHORT, &SMTP] {
        let outcome = run(service, Load::Closed { service: service.name.into(), connections: 5 });
        assert!(outcome.round_trips > 0 && outcome.latency.is_some(), "{service}: {outcome:?}");
        assert_eq!(outcome.sessions > 0, [&SHORT, &SMTP].contains(&service), "{service}: {outcome:?}");
    }
    let open = run(&SHORT, Load::Open { service: SHORT.name.into(), rate: 200.0 });
    let begun = open.latency.unwrap().count;
    assert!((20..=60).contains(&begun), "40 begin in 0.2 s: {open:?}");
    let refused = Job {
        target: SocketAddr::new(address(), 1),
        load: Load::Closed { service: ECHO.name.into(), connections: 1 },
        seconds: 0.2,
    };
    assert!(execute(&refused).unwrap().failures > 0);

    headers();
}

fn headers() {
    server().take_counts();
    let ends = Addresses::new(SocketAddr::new(CLIENT, 1234), SocketAddr::new(address(), SHORT.port));
    let mut header = [0; SAFE_LEN];
    let length = v2::encode(&Command::Proxy(ends), &[], &mut header).unwrap();
    let request = [&header[..length], &[b'x'; 64]].concat();
    assert_eq!(response_length(&request), 64);
    let counts = counted(|counts| counts.headers == 1);
    assert_eq!((counts.proxied, counts.headers, counts.bad_headers), (1, 1, 0));

    assert_eq!(response_length(&request[length..]), 0, "without the header");
    let counts = counted(|counts| counts.bad_headers == 1);
    assert_eq!((counts.proxied, counts.headers, counts.bad_headers), (1, 0, 1));
}

/// The number of bytes that the port that requires a header sends back.
fn response_length(request: &[u8]) -> usize {
    let mut stream = TcpStream::connect(SocketAddr::new(address(), SHORT.port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(request).unwrap();
    let mut response = Vec::new();
    // The server may reset a connection that it rejects instead of closing it.
    let _ = stream.read_to_end(&mut response);
    response.len()
}
