//! The server: all services, with and without a header, one thread for each processor.
//!
//! Each thread waits on its own poller. Any thread accepts, and distributes the connections
//! round-robin, so that long ones are spread evenly. The thread that a connection is assigned to
//! takes it out of its slot at the first event.

mod connection;

use std::io::{self, BufRead as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use rustix::net::{SocketFlags, accept_with, sockopt};

use self::connection::{Connection, Next};
use crate::descriptors;
use crate::job::ServerCounts;
use crate::poller::{Events, Interest, Poller, index};
use crate::service::{ALL, PortKind, Script, Service};

/// The server prints this line when it accepts clients.
pub const READY: &str = "ready";

/// Length of the accept queue; the kernel limits it to `net.core.somaxconn`.
const BACKLOG: i32 = 16_384;

/// Bytes per write.
pub(crate) const CHUNK: usize = 256 << 10;

/// Bytes of bulk per read; the kernel drops them (MSG_TRUNC), so that this costs no memory traffic.
const DISCARD_CHUNK: usize = 1 << 20;

/// The longest wait of a thread, so that none can hang forever.
const TICK: Duration = Duration::from_secs(1);

/// A listen socket and its service.
#[derive(Debug)]
struct ListenSocket {
    listener: TcpListener,
    service: &'static Service,
    port_kind: PortKind,
}

/// What all threads share.
#[derive(Debug)]
pub(crate) struct ServerState {
    /// The address that headers must carry.
    client: IpAddr,
    listen_sockets: Vec<ListenSocket>,
    /// One for each thread.
    pollers: Vec<Poller>,
    /// By descriptor: connections that are assigned but not yet taken, with the index of their
    /// listen socket.
    slots: Vec<Mutex<Option<(TcpStream, usize)>>>,
    /// The worker that gets the next connection, modulo their number.
    next_worker: AtomicUsize,
    /// One for each thread.
    counts: Vec<Mutex<ServerCounts>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves until standard input ends; responds to any line on it with the [`ServerCounts`] since the
/// last.
///
/// `client` is the address that headers must carry.
///
/// # Errors
/// When a port is taken, or the standard streams fail.
pub fn run(address: IpAddr, client: IpAddr) -> anyhow::Result<()> {
    descriptors::raise_limit();
    let server = ServerState::start(address, client)?;
    let mut out = io::stdout().lock();
    writeln!(out, "{READY}")?;
    out.flush()?;
    for line in io::stdin().lock().lines() {
        line?;
        writeln!(out, "{}", serde_json::to_string(&server.take_counts())?)?;
        out.flush()?;
    }
    Ok(())
}

fn run_worker(server: &'static ServerState, worker: usize) {
    if let Err(error) = serve(server, worker) {
        eprintln!("server thread {worker}: {error:#}");
        // A server that lost a thread would only appear slow.
        std::process::exit(1);
    }
}

impl ServerState {
    /// Opens all ports and starts the threads, which live as long as the process.
    pub(crate) fn start(address: IpAddr, client: IpAddr) -> anyhow::Result<&'static Self> {
        let server: &'static Self = Box::leak(Box::new(Self::open(address, client)?));
        for worker in 0..server.pollers.len() {
            thread::Builder::new()
                .name(format!("server-{worker}"))
                .spawn(move || run_worker(server, worker))?;
        }
        Ok(server)
    }

    fn open(address: IpAddr, client: IpAddr) -> anyhow::Result<Self> {
        let workers = thread::available_parallelism()?.get();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let slots = usize::try_from(limit.unwrap_or(1 << 20)).unwrap_or(1 << 20).min(1 << 20);
        let mut listen_sockets = Vec::new();
        for service in &ALL {
            for (port, port_kind) in [(service.port, PortKind::Header), (service.bare_port(), PortKind::Bare)]
            {
                let at = SocketAddr::new(address, port);
                let listener = listen(at).with_context(|| format!("cannot listen on {at}"))?;
                listen_sockets.push(ListenSocket { listener, service, port_kind });
            }
        }
        let pollers = (0..workers).map(|_| Poller::new()).collect::<io::Result<Vec<_>>>()?;
        for poller in &pollers {
            for listen_socket in &listen_sockets {
                poller.add(&listen_socket.listener, Interest::Exclusive)?;
            }
        }
        Ok(Self {
            client,
            listen_sockets,
            pollers,
            slots: (0..slots).map(|_| Mutex::default()).collect(),
            next_worker: AtomicUsize::new(0),
            counts: (0..workers).map(|_| Mutex::default()).collect(),
        })
    }

    /// The counts since the last call.
    pub(crate) fn take_counts(&self) -> ServerCounts {
        let mut sum = ServerCounts::default();
        for counts in &self.counts {
            sum.add(std::mem::take(&mut *lock(counts)));
        }
        sum
    }

    /// Accepts one connection and assigns it to the next worker; `false` when there is none.
    fn accept(&self, listen_socket: usize, payload: &[u8], counts: &mut ServerCounts) -> io::Result<bool> {
        let ListenSocket { listener, service, port_kind } = &self.listen_sockets[listen_socket];
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let stream = match accept_with(listener.as_fd(), flags) {
            Ok(stream) => TcpStream::from(stream),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        match port_kind {
            PortKind::Header => counts.proxied += 1,
            PortKind::Bare => counts.bare += 1,
        }
        // On a port that requires a header, the greeting is sent after it.
        if let (PortKind::Bare, Script::Dialogue { greeting, .. }) = (port_kind, service.script)
            && greeting > 0
            && connection::send_all(&stream, payload, greeting).is_err()
        {
            counts.failures += 1;
            return Ok(true);
        }
        let at = index(&stream);
        let Some(slot) = self.slots.get(at) else { return Err(io::ErrorKind::QuotaExceeded.into()) };
        let worker = self.next_worker.fetch_add(1, Ordering::Relaxed) % self.pollers.len();
        let mut slot = lock(slot);
        self.pollers[worker].add(&stream, Interest::Read)?;
        *slot = Some((stream, listen_socket));
        Ok(true)
    }
}

fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(at), socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    // Accepted sockets inherit it.
    sockopt::set_tcp_nodelay(&socket, true)?;
    Ok(socket.into())
}

/// The loop of one thread.
fn serve(server: &ServerState, worker: usize) -> anyhow::Result<()> {
    let payload = vec![b'x'; CHUNK];
    let mut buffer = vec![0; DISCARD_CHUNK];
    let mut connections: Vec<Option<Connection>> = Vec::new();
    connections.resize_with(server.slots.len(), || None);
    let mut events = Events::default();
    let listen_sockets: Vec<_> =
        server.listen_sockets.iter().map(|listen_socket| index(&listen_socket.listener)).collect();
    loop {
        server.pollers[worker].wait(&mut events, TICK)?;
        let mut counts = ServerCounts::default();
        for (at, readable) in events.iter() {
            if let Some(listen_socket) = listen_sockets.iter().position(|listener| *listener == at) {
                server.accept(listen_socket, &payload, &mut counts)?;
                continue;
            }
            let Some(entry) = connections.get_mut(at) else { continue };
            if entry.is_none()
                && let Some((stream, listen_socket)) = lock(&server.slots[at]).take()
            {
                let ListenSocket { service, port_kind, .. } = &server.listen_sockets[listen_socket];
                *entry = Some(Connection::new(stream, service, *port_kind));
            }
            let Some(connection) = entry else { continue };
            match connection.advance(readable, server.client, &payload, &mut buffer, &mut counts) {
                Next::Wait => {}
                Next::WaitWritable => {
                    server.pollers[worker].change(connection.stream(), Interest::ReadWrite)?;
                }
                Next::Close => *entry = None,
                Next::Fail => {
                    counts.failures += 1;
                    *entry = None;
                }
            }
        }
        lock(&server.counts[worker]).add(counts);
    }
}

impl ServerCounts {
    pub(crate) fn add(&mut self, other: Self) {
        self.proxied += other.proxied;
        self.headers += other.headers;
        self.bad_headers += other.bad_headers;
        self.silent += other.silent;
        self.bare += other.bare;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        self.failures += other.failures;
    }
}
