//! The server: all services, with and without a header, by as many threads as there are processors.
//!
//! Each thread waits on a poller of its own. Any of them accepts, and deals the connections out in turn, so that long ones
//! lie evenly on the threads; the one that a connection falls to takes it out of its slot at the first event.

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
use crate::order::Counts;
use crate::poller::{Events, Interest, Poller, index};
use crate::service::{ALL, Door, Service, Talk};

/// The line after which clients may come.
pub const READY: &str = "ready";

/// Connections that wait to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 16_384;

/// Bytes written at once.
pub(crate) const CHUNK: usize = 256 << 10;

/// Bytes of bulk taken at once; the kernel drops them (MSG_TRUNC), so this costs no memory traffic.
const SWALLOW: usize = 1 << 20;

/// How long a thread waits before it looks again: bounded, so that it can never hang for good.
const TICK: Duration = Duration::from_secs(1);

/// A port and what is behind it.
#[derive(Debug)]
struct Gate {
    listener: TcpListener,
    service: &'static Service,
    door: Door,
}

/// What all threads see.
#[derive(Debug)]
pub(crate) struct Hall {
    /// The address that headers must carry.
    client: IpAddr,
    gates: Vec<Gate>,
    /// One for each thread.
    pollers: Vec<Poller>,
    /// By descriptor: connections on their way to their thread, and the gate they came through.
    slots: Vec<Mutex<Option<(TcpStream, usize)>>>,
    /// Whose turn it is.
    turn: AtomicUsize,
    /// One for each thread.
    counts: Vec<Mutex<Counts>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves until standard input ends; any line on it is answered by the [`Counts`] since the last.
///
/// `client` is the address that headers must carry.
///
/// # Errors
/// When a port is taken, or the standard streams fail.
pub fn run(address: IpAddr, client: IpAddr) -> anyhow::Result<()> {
    descriptors::raise_limit();
    let hall = Hall::start(address, client)?;
    let mut out = io::stdout().lock();
    writeln!(out, "{READY}")?;
    out.flush()?;
    for line in io::stdin().lock().lines() {
        line?;
        writeln!(out, "{}", serde_json::to_string(&hall.take())?)?;
        out.flush()?;
    }
    Ok(())
}

fn work(hall: &'static Hall, worker: usize) {
    if let Err(error) = serve(hall, worker) {
        eprintln!("server thread {worker}: {error:#}");
        // A server with a dead thread would only look slow.
        std::process::exit(1);
    }
}

impl Hall {
    /// Opens all ports and starts the threads, which live as long as the process.
    pub(crate) fn start(address: IpAddr, client: IpAddr) -> anyhow::Result<&'static Self> {
        let hall: &'static Self = Box::leak(Box::new(Self::open(address, client)?));
        for worker in 0..hall.pollers.len() {
            thread::Builder::new().name(format!("server-{worker}")).spawn(move || work(hall, worker))?;
        }
        Ok(hall)
    }

    fn open(address: IpAddr, client: IpAddr) -> anyhow::Result<Self> {
        let workers = thread::available_parallelism()?.get();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let slots = usize::try_from(limit.unwrap_or(1 << 20)).unwrap_or(1 << 20).min(1 << 20);
        let mut gates = Vec::new();
        for service in &ALL {
            for (port, door) in [(service.port, Door::Header), (service.bare_port(), Door::Bare)] {
                let at = SocketAddr::new(address, port);
                let listener = listen(at).with_context(|| format!("cannot listen on {at}"))?;
                gates.push(Gate { listener, service, door });
            }
        }
        let pollers = (0..workers).map(|_| Poller::new()).collect::<io::Result<Vec<_>>>()?;
        for poller in &pollers {
            for gate in &gates {
                poller.add(&gate.listener, Interest::Shared)?;
            }
        }
        Ok(Self {
            client,
            gates,
            pollers,
            slots: (0..slots).map(|_| Mutex::default()).collect(),
            turn: AtomicUsize::new(0),
            counts: (0..workers).map(|_| Mutex::default()).collect(),
        })
    }

    /// What was counted since the last time.
    pub(crate) fn take(&self) -> Counts {
        let mut sum = Counts::default();
        for counts in &self.counts {
            sum.add(std::mem::take(&mut *lock(counts)));
        }
        sum
    }

    /// Takes one connection from a gate and hands it to the thread whose turn it is; `false` when there is none.
    fn accept(&self, gate: usize, payload: &[u8], counts: &mut Counts) -> io::Result<bool> {
        let Gate { listener, service, door } = &self.gates[gate];
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let stream = match accept_with(listener.as_fd(), flags) {
            Ok(stream) => TcpStream::from(stream),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        match door {
            Door::Header => counts.proxied += 1,
            Door::Bare => counts.bare += 1,
        }
        // Where a header is due, the greeting waits for it.
        if let (Door::Bare, Talk::Dialogue { greeting, .. }) = (door, service.talk)
            && greeting > 0
            && connection::say(&stream, payload, greeting).is_err()
        {
            counts.failures += 1;
            return Ok(true);
        }
        let at = index(&stream);
        let Some(slot) = self.slots.get(at) else { return Err(io::ErrorKind::QuotaExceeded.into()) };
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.pollers.len();
        let mut slot = lock(slot);
        self.pollers[turn].add(&stream, Interest::Read)?;
        *slot = Some((stream, gate));
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

/// One thread.
fn serve(hall: &Hall, worker: usize) -> anyhow::Result<()> {
    let payload = vec![b'x'; CHUNK];
    let mut buffer = vec![0; SWALLOW];
    let mut connections: Vec<Option<Connection>> = Vec::new();
    connections.resize_with(hall.slots.len(), || None);
    let mut events = Events::default();
    let gates: Vec<_> = hall.gates.iter().map(|gate| index(&gate.listener)).collect();
    loop {
        hall.pollers[worker].wait(&mut events, TICK)?;
        let mut counts = Counts::default();
        for (at, readable) in events.iter() {
            if let Some(gate) = gates.iter().position(|listener| *listener == at) {
                hall.accept(gate, &payload, &mut counts)?;
                continue;
            }
            let Some(entry) = connections.get_mut(at) else { continue };
            if entry.is_none()
                && let Some((stream, gate)) = lock(&hall.slots[at]).take()
            {
                let Gate { service, door, .. } = &hall.gates[gate];
                *entry = Some(Connection::new(stream, service, *door));
            }
            let Some(connection) = entry else { continue };
            match connection.go_on(readable, hall.client, &payload, &mut buffer, &mut counts) {
                Next::Wait => {}
                Next::WaitForRoom => {
                    hall.pollers[worker].change(connection.stream(), Interest::ReadWrite)?;
                }
                Next::Close => *entry = None,
                Next::Fail => {
                    counts.failures += 1;
                    *entry = None;
                }
            }
        }
        lock(&hall.counts[worker]).add(counts);
    }
}

impl Counts {
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
