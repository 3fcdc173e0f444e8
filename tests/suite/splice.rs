//! The programs of the splice engine on real sockets, in every case that a daemon can cause: their
//! program type has no BPF_PROG_TEST_RUN. All on loopback, in this process.

use std::future::{Future, poll_fn};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use injector_common::splice::{Counter, HEADER_CAPACITY, Header};
use injector_testbed::netns;
use injector_user::engine::splice::inject::InjectError;
use injector_user::engine::splice::{Splice, verdict::EnrolledFlow};
use injector_user::net::hangup::HangupMonitor;
use injector_user::net::socket::{Endpoint, Interest};
use injector_user::telemetry::metrics::BpfCounters;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(60);

fn main() {
    let trials = vec![
        trial("inject/without payload, every length", |splice| every_length(splice, b"")),
        trial("inject/in front of one byte, every length", |splice| every_length(splice, b"x")),
        trial("inject/in front of 64 KiB", big_payload),
        trial("inject/twice on a socket", twice),
        trial("inject/impossible lengths", impossible_lengths),
        trial("verdict/without a target the bytes are counted as lost", no_target),
        trial("verdict/not before it is established, not after a FIN", only_established),
        trial("verdict/the delivery check waits for a stalled target", stalled_target),
        trial("verdict/enrolled in the middle of a stream", mid_stream),
        trial("verdict/dropping it moves the direction to user space", moved_to_user_space),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn trial<F>(name: &'static str, run: impl Fn(Arc<Splice>) -> F + Send + 'static) -> Trial
where
    F: Future<Output = anyhow::Result<()>>,
{
    Trial::ignorable_test(name, move || {
        if netns::unavailable().is_some() {
            return Ok(Completion::ignored_with("needs root, to load BPF programs"));
        }
        let splice = Arc::new(Splice::load(64, 512 << 10, 64 << 20)?);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let outcome = runtime.block_on(async {
            timeout(LIMIT, run(Arc::clone(&splice))).await.context("took too long")??;
            let left = splice.entries()?;
            ensure!(left == 0, "{left} entries are left in the maps");
            Ok(())
        });
        match outcome {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => Err(Failed::from(format!("{error:#}\n{}", counters(&splice)))),
        }
    })
}

fn counters(splice: &Splice) -> String {
    let counted = splice.read().into_iter().filter(|(.., count)| *count > 0);
    counted.map(|(program, event, count)| format!("{program}/{event}: {count}\n")).collect()
}

fn count(splice: &Splice, counter: Counter) -> u64 {
    let labels = counter.labels();
    let counted = splice.read();
    counted.iter().find(|(program, event, _)| (*program, *event) == labels).map_or(0, |(.., count)| *count)
}

/// A socket of the daemon, and its peer.
async fn pair(splice: &Arc<Splice>) -> io::Result<(Endpoint, TcpStream)> {
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await?;
    let ours = Endpoint::connect(listener.local_addr()?, &|socket| {
        injector_user::engine::Engine::observe_syn(splice, socket)
    })
    .await?;
    // The peer must have its connection before the header arrives.
    ours.ack_now()?;
    Ok((ours, listener.accept().await?.0))
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..251_u8).cycle().skip(seed % 251).take(len).collect()
}

async fn expect(peer: &mut TcpStream, bytes: &[u8]) -> anyhow::Result<()> {
    let mut seen = vec![0; bytes.len()];
    peer.read_exact(&mut seen).await?;
    let same = seen.iter().zip(bytes).take_while(|(seen, sent)| seen == sent).count();
    ensure!(same == bytes.len(), "different from byte {same} of {} on", bytes.len());
    Ok(())
}

async fn every_length(splice: Arc<Splice>, payload: &[u8]) -> anyhow::Result<()> {
    let lengths = Header::SHORTEST..=HEADER_CAPACITY;
    for len in lengths.clone() {
        let (backend, mut peer) = pair(&splice).await?;
        let header = pattern(len, len);
        let sent = splice.inject(&backend, &header, payload).with_context(|| format!("{len} bytes"))?;
        ensure!(sent == payload.len(), "{sent} bytes of payload went along with {len}");
        backend.try_write(b"more")?;
        backend.finish()?;
        let mut seen = Vec::new();
        peer.read_to_end(&mut seen).await?;
        ensure!(seen == [&header, payload, b"more"].concat(), "{len} bytes of header came as {seen:02x?}");
    }
    let counter = if payload.is_empty() { Counter::HeaderAlone } else { Counter::HeaderBeforePayload };
    let (ran, tried) = (count(&splice, counter), lengths.count() as u64);
    ensure!(ran == tried, "{ran} headers counted of {tried}");
    Ok(())
}

/// More than a socket accepts at once: the rest follows without a second header.
async fn big_payload(splice: Arc<Splice>) -> anyhow::Result<()> {
    let (backend, mut peer) = pair(&splice).await?;
    let (header, payload) = (pattern(0, 52), pattern(9, 1 << 16));
    let mut sent = splice.inject(&backend, &header, &payload)?;
    ensure!(sent > 0, "nothing went along");
    let rest = async {
        while sent < payload.len() {
            sent += poll_fn(|task| backend.poll_write(task, payload.get(sent..).unwrap_or_default())).await?;
        }
        anyhow::Ok(())
    };
    let whole = [header, payload.clone()].concat();
    tokio::try_join!(rest, expect(&mut peer, &whole))?;
    ensure!(count(&splice, Counter::HeaderBeforePayload) == 1);
    Ok(())
}

/// The header is sent once: a second attempt is an error of the daemon and must not reach the
/// backend as a header.
async fn twice(splice: Arc<Splice>) -> anyhow::Result<()> {
    let (backend, mut peer) = pair(&splice).await?;
    let (one, two) = (pattern(1, 28), pattern(2, 28));
    splice.inject(&backend, &one, b"a")?;
    splice.inject(&backend, &two, b"b")?;
    expect(&mut peer, &[&one[..], b"a", &two, b"b"].concat()).await
}

async fn impossible_lengths(splice: Arc<Splice>) -> anyhow::Result<()> {
    for len in [0, 1, 15, 537, 1000] {
        let (backend, mut peer) = pair(&splice).await?;
        let refused = splice.inject(&backend, &pattern(0, len), b"payload");
        ensure!(matches!(refused, Err(InjectError::Dropped(_))), "{len}: {refused:?}");
        backend.finish()?;
        let mut seen = Vec::new();
        peer.read_to_end(&mut seen).await?;
        ensure!(seen.is_empty(), "{len}: the backend read {seen:?}");
    }
    Ok(())
}

/// The target's socket is closed while the source still sends: its map entry is removed with it.
async fn no_target(splice: Arc<Splice>) -> anyhow::Result<()> {
    const PAYLOAD: &[u8] = b"this is never read";
    let (source, mut source_peer) = pair(&splice).await?;
    let (target, target_peer) = pair(&splice).await?;
    let spliced = EnrolledFlow::enrol(&splice, &source, &target, 0)?;
    drop((target, target_peer));
    source_peer.write_all(PAYLOAD).await?;
    let lost = async {
        while spliced.flow().map_err(io::Error::other)?.lost == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        anyhow::Ok(())
    };
    timeout(LIMIT, lost).await.context("nothing was counted as lost")??;
    ensure!(spliced.flow()?.lost == PAYLOAD.len() as u64, "{:?}", spliced.flow()?);
    Ok(())
}

/// Half-closed sockets stay in user space, with a matching reason.
async fn only_established(splice: Arc<Splice>) -> anyhow::Result<()> {
    let (source, mut source_peer) = pair(&splice).await?;
    let (target, _target_peer) = pair(&splice).await?;
    source_peer.shutdown().await?;
    tokio::time::sleep(Duration::from_millis(5)).await;
    match EnrolledFlow::enrol(&splice, &source, &target, 0) {
        Err(error) => ensure!(error.reason() == "not_established", "{error}"),
        Ok(_) => anyhow::bail!("a socket that has received a FIN was enrolled"),
    }
    Ok(())
}

/// The FIN has to wait until the target's queue has accepted everything; then no byte is missing.
async fn stalled_target(splice: Arc<Splice>) -> anyhow::Result<()> {
    const BULK: usize = 8 << 20;
    let monitor = HangupMonitor::start()?;
    let (mut source, mut source_peer) = pair(&splice).await?;
    let (target, mut target_peer) = pair(&splice).await?;
    let spliced = EnrolledFlow::enrol(&splice, &source, &target, 0)?;
    source.set_interest(Interest { read: false, write: false }, &monitor)?;
    let bulk = pattern(3, BULK);
    source_peer.write_all(&bulk).await?;
    source_peer.shutdown().await?;
    source.finished().await;
    for _ in 0..20 {
        ensure!(!spliced.delivered(&source, &target, 0)?, "delivered to a reader that reads nothing");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let prove = async {
        while !spliced.delivered(&source, &target, 0)? {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        anyhow::Ok(target.finish()?)
    };
    let read = async {
        expect(&mut target_peer, &bulk).await?;
        let mut rest = Vec::new();
        target_peer.read_to_end(&mut rest).await?;
        ensure!(rest.is_empty(), "{} bytes too many", rest.len());
        Ok(())
    };
    tokio::try_join!(prove, read)?;
    let flow = spliced.flow()?;
    ensure!(flow.redirected == BULK as u64 && flow.lost == 0, "{flow:?}");
    Ok(())
}

/// User space has written before, and more has arrived unread: the order is preserved when the data
/// path changes.
async fn mid_stream(splice: Arc<Splice>) -> anyhow::Result<()> {
    for unread in [0, 1, 1000, 100_000] {
        let (source, mut source_peer) = pair(&splice).await?;
        let (target, mut target_peer) = pair(&splice).await?;
        target.try_write(b"written by user space, ")?;
        let arrived = pattern(4, unread);
        source_peer.write_all(&arrived).await?;
        let spliced = EnrolledFlow::enrol(&splice, &source, &target, 0)?;
        source_peer.write_all(b", and later").await?;
        expect(&mut target_peer, &[b"written by user space, ", &arrived[..], b", and later"].concat())
            .await?;
        ensure!(spliced.flow()?.redirected == unread as u64 + 11, "{:?}", spliced.flow()?);
    }
    Ok(())
}

async fn moved_to_user_space(splice: Arc<Splice>) -> anyhow::Result<()> {
    let (source, mut source_peer) = pair(&splice).await?;
    let (target, mut target_peer) = pair(&splice).await?;
    let spliced = EnrolledFlow::enrol(&splice, &source, &target, 0)?;
    source_peer.write_all(b"kernel").await?;
    expect(&mut target_peer, b"kernel").await?;
    drop(spliced);
    ensure!(splice.entries()? == 0, "entries are left");
    source_peer.write_all(b"user").await?;
    let seen = source.read(<[u8]>::to_vec).await?;
    ensure!(seen == b"user", "user space reads {seen:?}");
    match target_peer.try_read(&mut [0; 8]) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
        other => anyhow::bail!("the target's peer got {other:?}"),
    }
}
