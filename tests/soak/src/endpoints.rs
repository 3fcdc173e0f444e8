//! The clients and the backend: sockets in their namespaces, one conversation each.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use injector_common::proxy::parse;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Options;
use super::content::Content;
use super::conversation::{End, LIMIT, Seen, converse};
use super::plan::{Plan, Side};
use super::session_log::Ledger;
use super::testbed::{LISTENERS, MOST_SESSIONS, destination, number, source};

/// Bytes that may be planned per second of the run, both directions together, so that large streams do not eat the time
/// that many sessions are to have.
const BYTES_PER_SECOND: u64 = 64 << 20;

/// What both ends share.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub(crate) options: Options,
    pub(crate) content: Arc<Content>,
    pub(crate) ledger: Arc<Ledger>,
}

/// A runtime whose sockets belong to the namespace of the thread that calls this.
fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("no runtime")
}

/// Starts sessions until the time is over, and waits for their ends; returns how many there were.
pub(crate) fn clients(shared: &Shared) -> anyhow::Result<u64> {
    runtime()?.block_on(start_all(shared))
}

async fn start_all(shared: &Shared) -> anyhow::Result<u64> {
    let Options { seed, duration, at_once, only, .. } = shared.options;
    let free = Arc::new(Semaphore::new(at_once));
    let start = Instant::now();
    let mut running = JoinSet::new();
    let mut planned = 0;
    let numbers = only.map_or(0..MOST_SESSIONS, |only| only..only + 1);
    let first = numbers.start;
    let mut next = first;
    for number in numbers {
        let permit = Arc::clone(&free).acquire_owned().await?;
        while within(planned, start.elapsed()) && start.elapsed() < duration {
            sleep(Duration::from_millis(5)).await;
        }
        if start.elapsed() >= duration && only.is_none() {
            break;
        }
        let plan = Plan::draw(seed, number);
        planned += plan.up.len + plan.down.len;
        let shared = shared.clone();
        running.spawn(async move {
            let seen = match connect(&plan, &shared).await {
                Ok(stream) => converse(stream, &plan, Side::Client, &shared.content, &[]).await,
                // By a backend that is quick: the daemon has accepted before, and only then can anybody reset.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Seen::ended(End::Reset),
                Err(error) => Seen::ended(End::Failed(format!("connecting: {error}"))),
            };
            shared.ledger.enter(number, Side::Client, seen);
            drop(permit);
        });
        next = number + 1;
        while running.try_join_next().is_some() {}
    }
    while let Some(ended) = running.join_next().await {
        ended.context("a client panicked")?;
    }
    Ok(next - first)
}

/// Whether so many bytes are too many after that time; the first second's are given in advance.
fn within(planned: u64, elapsed: Duration) -> bool {
    let allowed = u128::from(BYTES_PER_SECOND) * (elapsed.as_millis() + 1000) / 1000;
    u128::from(planned) > allowed
}

async fn connect(plan: &Plan, shared: &Shared) -> io::Result<TcpStream> {
    let destination = destination(plan, shared.options.engine);
    let socket = if destination.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(buffer) = plan.down.receive_buffer {
        // Before connecting, so that the window is announced to fit.
        socket.set_recv_buffer_size(buffer)?;
    }
    socket.bind(source(plan.number, plan.family))?;
    let stream = timeout(LIMIT, socket.connect(destination)).await.map_err(io::Error::from)??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Answers on all backend addresses until told to stop.
pub(crate) fn backend(
    shared: &Shared,
    ready: &std::sync::mpsc::Sender<()>,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let mut accepting = JoinSet::new();
        for listener in LISTENERS {
            let socket = TcpListener::bind(listener.backend).await;
            let socket = socket.with_context(|| format!("backend at {}", listener.backend))?;
            accepting.spawn(accept(socket, shared.clone(), stop.clone()));
        }
        // Nobody waits only if the run has failed already.
        let _ = ready.send(());
        while let Some(ended) = accepting.join_next().await {
            ended.context("the backend panicked")??;
        }
        Ok(())
    })
}

async fn accept(
    listener: TcpListener,
    shared: Shared,
    mut stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut running = JoinSet::new();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted.context("accepting at the backend")?.0,
            // An error means that the run is over as well.
            _ = stop.wait_for(|stop| *stop) => break,
        };
        shared.ledger.open().at_backend += 1;
        let shared = shared.clone();
        running.spawn(async move {
            if let Err(error) = answer(stream, &shared).await {
                shared.ledger.open().strangers.push(format!("{error:#}"));
            }
            shared.ledger.open().at_backend -= 1;
        });
        while running.try_join_next().is_some() {}
    }
    while let Some(ended) = running.join_next().await {
        ended.context("the backend panicked")?;
    }
    Ok(())
}

/// Demands a header, which must come whole in the first read, finds the session in it, and plays its part.
async fn answer(stream: TcpStream, shared: &Shared) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut first = vec![0; 16 << 10];
    let Some(count) = first_read(&stream, &mut first).await? else {
        shared.ledger.open().without_header += 1;
        return Ok(());
    };
    first.truncate(count);
    let beginning = first.get(..count.min(64)).unwrap_or_default();
    let header = parse(&first).with_context(|| format!("no whole header at first, but {beginning:02x?}"))?;
    let addresses = header.command.addresses().context("a header without addresses")?;
    let from = addresses.source();
    let number = number(from).with_context(|| format!("a header that names {from}, which is no client"))?;
    let plan = Plan::draw(shared.options.seed, number);
    let (source, destination) = (source(number, plan.family), destination(&plan, shared.options.engine));
    anyhow::ensure!(
        (from, addresses.destination()) == (source, destination),
        "session {number} goes from {source} to {destination}, its header says {from} to {}",
        addresses.destination()
    );
    let rest = first.get(header.len..).unwrap_or_default();
    if let Some(buffer) = plan.up.receive_buffer {
        SockRef::from(&stream).set_recv_buffer_size(usize::try_from(buffer)?)?;
    }
    let seen = converse(stream, &plan, Side::Backend, &shared.content, rest).await;
    shared.ledger.enter(number, Side::Backend, seen);
    Ok(())
}

/// The first bytes of a connection, or `None` if it went without any.
async fn first_read(stream: &TcpStream, buffer: &mut [u8]) -> anyhow::Result<Option<usize>> {
    let reading = async {
        loop {
            stream.readable().await?;
            match stream.try_read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    };
    match timeout(LIMIT, reading).await.context("a connection without a byte")? {
        Ok(0) => Ok(None),
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        Err(error) => Err(error).context("reading the header"),
    }
}
