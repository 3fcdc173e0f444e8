//! Both ends against each other on loopback, without anybody between them.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use injector_common::proxy::{Addresses, Command, SAFE_LEN, v2};

use crate::client::carry_out;
use crate::order::{Counts, Order, Outcome, Work};
use crate::server::Hall;
use crate::service::{ECHO, IMAP, SHORT, SINK, SMTP, SOURCE, Service};

/// Whom headers must name.
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7));

/// An address of this process alone, so that test runs beside each other do not meet.
fn address() -> IpAddr {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(127, 100 + high, middle, low.max(1)))
}

/// One server for all tests, which takes its counts apart by what they look at.
fn hall() -> &'static Hall {
    static HALL: OnceLock<&'static Hall> = OnceLock::new();
    HALL.get_or_init(|| Hall::start(address(), CLIENT).unwrap())
}

fn order(service: &Service, work: Work) -> Outcome {
    let target = SocketAddr::new(address(), service.bare_port());
    let outcome = carry_out(&Order { target, work, seconds: 0.2 }).unwrap();
    assert_eq!(outcome.failure, None, "{outcome:?}");
    assert!(outcome.seconds >= 0.2, "{outcome:?}");
    outcome
}

/// All that is counted, once it has come to rest.
fn counted(enough: impl Fn(&Counts) -> bool) -> Counts {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut sum = Counts::default();
    while Instant::now() < deadline && !enough(&sum) {
        thread::sleep(Duration::from_millis(10));
        sum.add(hall().take());
    }
    sum
}

/// One test, for all share the server's counts.
#[test]
fn both_ends_agree() {
    hall();
    let upload = order(&SINK, Work::Upload { connections: 2 });
    let counts = counted(|counts| counts.bytes_in >= upload.bytes);
    assert_eq!((counts.bytes_in, counts.bare), (upload.bytes, 2));
    let download = order(&SOURCE, Work::Download { connections: 2 });
    let counts = counted(|counts| counts.bytes_out >= download.bytes);
    assert_eq!((counts.bytes_out, counts.bare), (download.bytes, 2));
    assert!(upload.bytes > 0 && download.bytes > 0);

    for service in [&ECHO, &IMAP, &SHORT, &SMTP] {
        let outcome = order(service, Work::Closed { service: service.name.into(), connections: 5 });
        assert!(outcome.round_trips > 0 && outcome.latency.is_some(), "{service}: {outcome:?}");
        assert_eq!(outcome.sessions > 0, [&SHORT, &SMTP].contains(&service), "{service}: {outcome:?}");
    }
    let open = order(&SHORT, Work::Open { service: SHORT.name.into(), rate: 200.0 });
    let begun = open.latency.unwrap().count;
    assert!((20..=60).contains(&begun), "40 begin in 0.2 s: {open:?}");
    let refused = Order {
        target: SocketAddr::new(address(), 1),
        work: Work::Closed { service: ECHO.name.into(), connections: 1 },
        seconds: 0.2,
    };
    assert!(carry_out(&refused).unwrap().failures > 0);

    headers();
}

fn headers() {
    hall().take();
    let ends = Addresses::new(SocketAddr::new(CLIENT, 1234), SocketAddr::new(address(), SHORT.port));
    let mut header = [0; SAFE_LEN];
    let length = v2::encode(&Command::Proxy(ends), &[], &mut header).unwrap();
    let question = [&header[..length], &[b'x'; 64]].concat();
    assert_eq!(answer(&question), 64);
    let counts = counted(|counts| counts.headers == 1);
    assert_eq!((counts.proxied, counts.headers, counts.bad_headers), (1, 1, 0));

    assert_eq!(answer(&question[length..]), 0, "without its header");
    let counts = counted(|counts| counts.bad_headers == 1);
    assert_eq!((counts.proxied, counts.headers, counts.bad_headers), (1, 0, 1));
}

/// Bytes that come back from the port that demands a header.
fn answer(question: &[u8]) -> usize {
    let mut stream = TcpStream::connect(SocketAddr::new(address(), SHORT.port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(question).unwrap();
    let mut answer = Vec::new();
    // A connection that is refused may be reset rather than closed.
    let _ = stream.read_to_end(&mut answer);
    answer.len()
}
