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

use super::content::Content;
use super::conversation::{ConnectionEnd, EndpointResult, LIMIT, run_conversation};
use super::options::Options;
use super::plan::{Plan, Side};
use super::session_log::SessionLog;
use super::testbed::{LISTENERS, MAX_SESSIONS, destination, number, source};

/// Limit of planned bytes per second of the run, both directions together, so that a few large
/// streams do not displace many sessions.
const BYTES_PER_SECOND: u64 = 64 << 20;

/// What both sides share.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub(crate) options: Options,
    pub(crate) content: Arc<Content>,
    pub(crate) log: Arc<SessionLog>,
}

/// A runtime whose sockets belong to the namespace of the calling thread.
fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("no runtime")
}

/// Starts sessions until the time has passed, and waits for their ends; returns their number.
pub(crate) fn clients(shared: &Shared) -> anyhow::Result<u64> {
    runtime()?.block_on(start_all(shared))
}

async fn start_all(shared: &Shared) -> anyhow::Result<u64> {
    let Options { seed, duration, at_once, only, .. } = shared.options;
    let free = Arc::new(Semaphore::new(at_once));
    let start = Instant::now();
    let mut running = JoinSet::new();
    let mut planned = 0;
    let numbers = only.map_or(0..MAX_SESSIONS, |only| only..only + 1);
    let first = numbers.start;
    let mut next = first;
    for number in numbers {
        let permit = Arc::clone(&free).acquire_owned().await?;
        while over_budget(planned, start.elapsed()) && start.elapsed() < duration {
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
                Ok(stream) => run_conversation(stream, &plan, Side::Client, &shared.content, &[]).await,
                // By a fast backend: nothing resets before the daemon has accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    EndpointResult::ended(ConnectionEnd::Reset)
                }
                Err(error) => EndpointResult::ended(ConnectionEnd::Failed(format!("connecting: {error}"))),
            };
            shared.log.record(number, Side::Client, seen);
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

/// Whether more bytes are planned than the time allows; one second is granted in advance.
fn over_budget(planned: u64, elapsed: Duration) -> bool {
    let allowed = u128::from(BYTES_PER_SECOND) * (elapsed.as_millis() + 1000) / 1000;
    u128::from(planned) > allowed
}

async fn connect(plan: &Plan, shared: &Shared) -> io::Result<TcpStream> {
    let destination = destination(plan, shared.options.engine);
    let socket = if destination.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(buffer) = plan.down.receive_buffer {
        // Before connecting, so that the advertised window fits.
        socket.set_recv_buffer_size(buffer)?;
    }
    socket.bind(source(plan.number, plan.family))?;
    let stream = timeout(LIMIT, socket.connect(destination)).await.map_err(io::Error::from)??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Serves on all backend addresses until stopped.
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
        // The receiver is gone only if the run has failed already.
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
            // An error also means that the run has ended.
            _ = stop.wait_for(|stop| *stop) => break,
        };
        shared.log.lock().at_backend += 1;
        let shared = shared.clone();
        running.spawn(async move {
            if let Err(error) = serve(stream, &shared).await {
                shared.log.lock().unmatched.push(format!("{error:#}"));
            }
            shared.log.lock().at_backend -= 1;
        });
        while running.try_join_next().is_some() {}
    }
    while let Some(ended) = running.join_next().await {
        ended.context("the backend panicked")?;
    }
    Ok(())
}

/// Requires a header, complete in the first read, identifies the session by it, and runs its plan.
async fn serve(stream: TcpStream, shared: &Shared) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut first = vec![0; 16 << 10];
    let Some(count) = first_read(&stream, &mut first).await? else {
        shared.log.lock().without_header += 1;
        return Ok(());
    };
    first.truncate(count);
    let beginning = first.get(..count.min(64)).unwrap_or_default();
    let header = parse(&first)
        .with_context(|| format!("no complete header in the first read, but {beginning:02x?}"))?;
    let addresses = header.command.addresses().context("a header without addresses")?;
    let from = addresses.source();
    let number =
        number(from).with_context(|| format!("a header that names {from}, which is not a client"))?;
    let plan = Plan::draw(shared.options.seed, number);
    let (source, destination) = (source(number, plan.family), destination(&plan, shared.options.engine));
    anyhow::ensure!(
        (from, addresses.destination()) == (source, destination),
        "session {number} is from {source} to {destination}, but its header names {from} to {}",
        addresses.destination()
    );
    let rest = first.get(header.len..).unwrap_or_default();
    if let Some(buffer) = plan.up.receive_buffer {
        SockRef::from(&stream).set_recv_buffer_size(usize::try_from(buffer)?)?;
    }
    let seen = run_conversation(stream, &plan, Side::Backend, &shared.content, rest).await;
    shared.log.record(number, Side::Backend, seen);
    Ok(())
}

/// The first bytes of a connection, or `None` if it ended without any.
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
