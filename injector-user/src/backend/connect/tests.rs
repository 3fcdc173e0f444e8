use std::sync::Arc;

use super::super::HealthState;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    config::{Config, Kubernetes},
    kubernetes::Watcher,
    net::syn::no_observer,
};

fn backends(list: &str) -> Backends {
    let text = format!(
        "[[listener]]\nname = \"a\"\nbind = [\"127.0.0.1:1\"]\nprotocol = \"smtp\"\nbackends = [{list}]\n"
    );
    Backends::new(&Config::parse(&text, "test.toml").unwrap().listeners[0], None, Arc::default())
}

const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));

async fn connect(backends: &Backends) -> Result<BackendConnection, Unreachable> {
    backends.connect(CLIENT, Duration::from_secs(5), &no_observer).await
}

async fn listening() -> (tokio::net::TcpListener, SocketAddr) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn refusing() -> SocketAddr {
    listening().await.1
}

#[tokio::test]
async fn the_next_address_is_tried_after_a_refusal() {
    let (_listener, good) = listening().await;
    let backends = backends(&format!("\"{}\", \"{good}\"", refusing().await));
    let backend = connect(&backends).await.unwrap();
    assert_eq!(backend.address, good);
}

#[tokio::test]
async fn refusals_of_all_addresses_are_reported_as_refused() {
    let backends = backends(&format!("\"{}\"", refusing().await));
    let error = connect(&backends).await.unwrap_err();
    assert!(matches!(error, Unreachable::Refused { .. }), "{error}");
}

#[tokio::test]
async fn a_connection_waits_for_the_first_addresses() {
    let (_listener, good) = listening().await;
    let backends = Arc::new(backends(&format!("\"localhost:{}\"", good.port())));
    assert_eq!(backends.all()[0].addresses(), []);
    let stop = CancellationToken::new();
    tokio::spawn(Arc::clone(&backends).run(Watcher::new(Kubernetes::default()), stop.clone()));
    let _stop = stop.drop_guard();
    let backend = connect(&backends).await.unwrap();
    assert_eq!(backend.address, good);
}

#[tokio::test]
async fn a_name_without_address_is_unresolved() {
    let backends = Arc::new(backends("\"nowhere.invalid:25\""));
    let stop = CancellationToken::new();
    tokio::spawn(Arc::clone(&backends).run(Watcher::new(Kubernetes::default()), stop.clone()));
    let _stop = stop.drop_guard();
    let error = connect(&backends).await.unwrap_err();
    assert!(matches!(error, Unreachable::Unresolved), "{error}");
}

/// A backend with these addresses, as if its name had resolved to them.
fn resolved(addresses: &[SocketAddr]) -> Backends {
    let backends = backends("\"nowhere.invalid:25\"");
    backends.all[0].set_addresses(addresses);
    backends
}

/// An address that answers no SYN: a socket whose accept queue is full.
async fn silent() -> (socket2::Socket, Vec<tokio::net::TcpStream>, SocketAddr) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    socket.listen(0).unwrap();
    socket.set_nonblocking(true).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let mut queued = Vec::new();
    while let Ok(Ok(stream)) =
        timeout(Duration::from_millis(50), tokio::net::TcpStream::connect(address)).await
    {
        queued.push(stream);
    }
    (socket, queued, address)
}

#[tokio::test]
async fn a_silent_address_costs_the_first_connection_alone_and_not_the_timeout() {
    let (_socket, _queued, silent) = silent().await;
    let (_listener, good) = listening().await;
    let backends = resolved(&[silent, good]);
    let connect = async || {
        let start = Instant::now();
        let connection = connect(&backends).await.unwrap();
        (connection.address, start.elapsed())
    };
    let (address, took) = connect().await;
    assert_eq!(address, good);
    assert!(took >= ATTEMPT_DELAY && took < Duration::from_secs(2), "{took:?}");
    assert_eq!(backends.all()[0].failing_addresses(), [silent]);
    for _ in 0..4 {
        let (address, took) = connect().await;
        assert_eq!(address, good);
        assert!(took < ATTEMPT_DELAY, "{took:?}");
    }
    assert_eq!(backends.all()[0].health_state(), HealthState::Up);
}

#[tokio::test]
async fn the_last_address_is_tried_within_a_short_time_too() {
    let (_socket, _queued, silent) = silent().await;
    let (_listener, good) = listening().await;
    let backends = resolved(&[silent, good]);
    assert_eq!(backends.connect(CLIENT, ATTEMPT_DELAY / 2, &no_observer).await.unwrap().address, good);
}

#[tokio::test]
async fn connections_are_spread_over_the_addresses_of_a_name() {
    let (_one, first) = listening().await;
    let (_other, second) = listening().await;
    let backends = resolved(&[first, refusing().await, second]);
    let mut counts = [0; 2];
    for _ in 0..9 {
        let address = connect(&backends).await.unwrap().address;
        counts[usize::from(address == second)] += 1;
    }
    assert!(counts.iter().all(|count| *count >= 4), "{counts:?}");
}

#[tokio::test]
async fn a_backend_fails_when_all_of_its_addresses_have() {
    let addresses = [refusing().await, refusing().await];
    let backends = resolved(&addresses);
    let error = connect(&backends).await.unwrap_err();
    assert!(matches!(error, Unreachable::Refused { .. }), "{error}");
    assert_eq!(backends.all()[0].failing_addresses(), addresses);
    // By connections of the inline engine: one address alone ejects nothing.
    let (_listener, good) = listening().await;
    let backends = resolved(&[good, addresses[0]]);
    (0..100).for_each(|_| backends.note_refused(addresses[0]));
    assert_eq!(backends.all()[0].health_state(), HealthState::Up);
    assert_eq!(backends.all()[0].usable_addresses(false), [good]);
    (0..100).for_each(|_| backends.note_refused(good));
    assert_eq!(backends.all()[0].health_state(), HealthState::Ejected);
    backends.note_connected(good);
    assert_eq!(backends.all()[0].usable_addresses(false), [good]);
    assert_eq!(backends.all()[0].health_state(), HealthState::Up);
}

/// A backend with one place, and settings of its listener.
async fn one_place(settings: &str) -> (tokio::net::TcpListener, Arc<Backends>) {
    let (listener, address) = listening().await;
    let list = format!("{{ address = \"{address}\", max_connections = 1 }}]\n{settings}\n#");
    (listener, Arc::new(backends(&list)))
}

fn spawn(backends: &Arc<Backends>) -> tokio::task::JoinHandle<Result<BackendConnection, Unreachable>> {
    let backends = Arc::clone(backends);
    tokio::spawn(async move { connect(&backends).await })
}

async fn waiting(backends: &Backends, count: usize) {
    while backends.queue.len() != count {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn clients_wait_for_a_place_and_get_it_in_their_order() {
    let (_listener, backends) = one_place("max_queue = 2").await;
    let first = connect(&backends).await.unwrap();
    let second = spawn(&backends);
    waiting(&backends, 1).await;
    let third = spawn(&backends);
    waiting(&backends, 2).await;
    let error = connect(&backends).await.unwrap_err();
    assert!(matches!(error, Unreachable::Full(NoPlace::QueueFull)), "{error}");
    drop(first);
    let second = second.await.unwrap().unwrap();
    assert_eq!((backends.queue.len(), third.is_finished()), (1, false));
    assert_eq!(backends.all()[0].stats().active, 1);
    drop(second);
    drop(third.await.unwrap().unwrap());
    assert_eq!((backends.queue.len(), backends.all()[0].stats().active), (0, 0));
}

#[tokio::test]
async fn a_client_waits_no_longer_than_it_may() {
    let (_listener, backends) = one_place("[listener.timeouts]\nqueue = \"20ms\"").await;
    let _first = connect(&backends).await.unwrap();
    let error = connect(&backends).await.unwrap_err();
    assert!(matches!(error, Unreachable::Full(NoPlace::TimedOut)), "{error}");
    assert_eq!(backends.queue.len(), 0);
}

#[tokio::test]
async fn a_client_that_leaves_gives_its_turn_to_the_next() {
    let (_listener, backends) = one_place("").await;
    let first = connect(&backends).await.unwrap();
    let leaving = spawn(&backends);
    waiting(&backends, 1).await;
    let second = spawn(&backends);
    waiting(&backends, 2).await;
    leaving.abort();
    waiting(&backends, 1).await;
    drop(first);
    assert!(timeout(Duration::from_secs(5), second).await.unwrap().unwrap().is_ok());
}

#[tokio::test]
async fn a_failed_attempt_gives_its_place_back() {
    let address = refusing().await;
    let backends = backends(&format!("{{ address = \"{address}\", max_connections = 1 }}"));
    for _ in 0..3 {
        let error = connect(&backends).await.unwrap_err();
        assert!(matches!(error, Unreachable::Refused { .. }), "{error}");
    }
    assert_eq!(backends.all()[0].stats().active, 0);
}

#[tokio::test]
async fn what_one_backend_has_no_place_for_goes_to_the_next_and_at_last_to_the_backup() {
    let (_one, one) = listening().await;
    let (_two, two) = listening().await;
    let (_backup, backup) = listening().await;
    let backends = backends(&format!(
        "{{ address = \"{one}\", max_connections = 1 }}, {{ address = \"{two}\", max_connections = 1 }}, \
         {{ address = \"{backup}\", backup = true }}"
    ));
    let mut connections = Vec::new();
    for expected in [one, two, backup, backup] {
        let connection = connect(&backends).await.unwrap();
        assert_eq!(connection.address, expected);
        connections.push(connection);
    }
}
