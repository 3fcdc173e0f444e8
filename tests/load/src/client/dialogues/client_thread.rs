//! One thread of a client, with its connections.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::arrival_timer::ArrivalTimer;
use super::pace::{DRAIN, ENDING, MAX_OPEN, MEASURING, Pace, READ_BUFFER, TICK};
use crate::client::failures::Failures;
use crate::latency::Latencies;
use crate::poller::{Events, Interest, Poller, index};
use crate::service::MAX_REQUEST;

/// One connection.
#[derive(Debug)]
struct ClientConnection {
    stream: TcpStream,
    state: State,
    /// When its dialogue started, or was scheduled to start.
    begun: Instant,
    /// When its last request was sent.
    requested: Instant,
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The connection to be established.
    Connecting,
    /// The greeting, of which `received` bytes have arrived.
    Greeting { received: usize },
    /// The response of a step.
    Response { step: usize, received: usize },
    /// The server to close the connection, after the last response.
    End,
}

/// One thread with its connections and counts.
#[derive(Debug)]
pub(super) struct ClientThread<'a> {
    target: SocketAddr,
    greeting: usize,
    steps: &'static [(usize, usize)],
    ends: bool,
    phase: &'a AtomicU8,
    poller: Poller,
    /// By descriptor.
    connections: Vec<Option<ClientConnection>>,
    open: usize,
    payload: Vec<u8>,
    buffer: Vec<u8>,
    result: ThreadResult,
}

#[derive(Debug)]
pub(super) struct ThreadResult {
    pub(super) round_trips: u64,
    pub(super) sessions: u64,
    pub(super) unfinished: u64,
    pub(super) connections: u64,
    pub(super) latencies: Latencies,
    pub(super) failures: Failures,
}

impl<'a> ClientThread<'a> {
    pub(super) fn new(
        target: SocketAddr,
        greeting: usize,
        steps: &'static [(usize, usize)],
        ends: bool,
        phase: &'a AtomicU8,
    ) -> anyhow::Result<Self> {
        let result = ThreadResult {
            round_trips: 0,
            sessions: 0,
            unfinished: 0,
            connections: 0,
            latencies: Latencies::new()?,
            failures: Failures::default(),
        };
        Ok(Self {
            target,
            greeting,
            steps,
            ends,
            phase,
            poller: Poller::new()?,
            connections: Vec::new(),
            open: 0,
            payload: vec![b'x'; MAX_REQUEST],
            buffer: vec![0; READ_BUFFER],
            result,
        })
    }

    pub(super) fn run(self, pace: Pace, thread: u64) -> anyhow::Result<ThreadResult> {
        match pace {
            Pace::Closed { connections } => self.closed(connections),
            Pace::Open { rate } => self.at_rate(rate, thread),
        }
    }

    fn closed(mut self, connections: usize) -> anyhow::Result<ThreadResult> {
        for _ in 0..connections {
            self.start(Instant::now());
        }
        let mut events = Events::default();
        loop {
            self.poller.wait(&mut events, TICK)?;
            let phase = self.phase.load(Ordering::Relaxed);
            if phase == ENDING {
                return Ok(self.result);
            }
            for (at, readable) in events.iter() {
                // A dialogue that ended or failed is replaced, so that one failure does not end the
                // run.
                if self.advance(at, readable, phase == MEASURING).is_none() {
                    self.start(Instant::now());
                }
            }
        }
    }

    /// Dialogues start at random times, as those of independent clients do, and at the same times
    /// in every run. At equal distances they would synchronise with the kernel's clock, whose ticks
    /// would then always sample the same state.
    fn at_rate(mut self, rate: f64, thread: u64) -> anyhow::Result<ThreadResult> {
        let mut timer = ArrivalTimer::new(rate, thread)?;
        self.poller.add(&timer.timer, Interest::Read)?;
        let (mut events, mut measured_from, mut ending) = (Events::default(), None, None);
        loop {
            self.poller.wait(&mut events, TICK)?;
            let (phase, now) = (self.phase.load(Ordering::Relaxed), Instant::now());
            if phase == MEASURING {
                measured_from.get_or_insert(now);
            }
            if phase == ENDING {
                let ending = *ending.get_or_insert(now);
                if self.open == 0 || now - ending > DRAIN {
                    self.count_unfinished(measured_from);
                    return Ok(self.result);
                }
            }
            for (at, readable) in events.iter() {
                if at == index(&timer.timer) {
                    while let Some(intended) = timer.due()? {
                        if ending.is_none() {
                            self.start_below_limit(intended);
                        }
                    }
                    continue;
                }
                let intended =
                    self.connections.get(at).and_then(Option::as_ref).map(|connection| connection.begun);
                let in_window = measured_from.is_some_and(|from| intended.is_some_and(|it| it >= from));
                self.advance(at, readable, in_window);
            }
        }
    }

    fn start_below_limit(&mut self, intended: Instant) {
        if self.open < MAX_OPEN {
            self.start(intended);
        } else {
            self.result.unfinished += 1;
        }
    }

    /// An unfinished dialogue took at least as long as it has been waiting. Leaving it out would
    /// flatter a slow system.
    fn count_unfinished(&mut self, measured_from: Option<Instant>) {
        for connection in self.connections.drain(..).flatten() {
            self.result.unfinished += 1;
            if measured_from.is_some_and(|from| connection.begun >= from) {
                self.result.latencies.record(connection.begun.elapsed());
            }
        }
    }

    /// Opens a connection for a dialogue that was scheduled to start at `begun`.
    fn start(&mut self, begun: Instant) {
        self.result.connections += 1;
        match self.connect() {
            Ok(stream) => {
                let at = index(&stream);
                if self.connections.len() <= at {
                    self.connections.resize_with(at + 1, || None);
                }
                self.connections[at] =
                    Some(ClientConnection { stream, state: State::Connecting, begun, requested: begun });
                self.open += 1;
            }
            Err(error) => self.result.failures.note("connecting", error),
        }
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let kind = socket2::Type::STREAM.nonblocking().cloexec();
        let socket = socket2::Socket::new(socket2::Domain::for_address(self.target), kind, None)?;
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&self.target.into()) {
            Ok(()) => {}
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INPROGRESS) => {}
            Err(error) => return Err(error),
        }
        let stream = TcpStream::from(socket);
        self.poller.add(&stream, Interest::EdgeTriggered)?;
        Ok(stream)
    }

    /// Advances a connection after an event; `None` if it has ended. Counts only if `measured`.
    fn advance(&mut self, at: usize, readable: bool, measured: bool) -> Option<()> {
        let mut connection = self.connections.get_mut(at)?.take()?;
        match self.step(&mut connection, readable, measured) {
            Ok(true) => {
                self.connections[at] = Some(connection);
                return Some(());
            }
            Ok(false) => {
                if measured {
                    self.result.sessions += 1;
                    self.result.latencies.record(connection.begun.elapsed());
                }
            }
            Err(error) => self.result.failures.note("a dialogue", error),
        }
        self.open -= 1;
        None
    }

    /// Advances the dialogue; whether it continues.
    fn step(
        &mut self,
        connection: &mut ClientConnection,
        readable: bool,
        measured: bool,
    ) -> io::Result<bool> {
        if connection.state == State::Connecting {
            if let Some(error) = connection.stream.take_error()? {
                return Err(error);
            }
            if self.greeting > 0 {
                connection.state = State::Greeting { received: 0 };
            } else {
                self.send_request(connection, 0)?;
            }
        }
        if !readable {
            return Ok(true);
        }
        // An edge is reported once: read until the socket is empty.
        loop {
            let length = match recv(connection.stream.as_fd(), &mut self.buffer[..], RecvFlags::empty()) {
                Ok((_, length)) => length,
                Err(Errno::AGAIN) => return Ok(true),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            if length == 0 {
                let expected = connection.state == State::End;
                return if expected { Ok(false) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
            self.receive(connection, length, measured)?;
            // A short read has emptied the socket; only the end of the connection may be left.
            if length < READ_BUFFER && connection.state != State::End {
                return Ok(true);
            }
        }
    }

    /// Accounts for `length` received bytes.
    fn receive(
        &mut self,
        connection: &mut ClientConnection,
        length: usize,
        measured: bool,
    ) -> io::Result<()> {
        match connection.state {
            State::Greeting { received } if received + length < self.greeting => {
                connection.state = State::Greeting { received: received + length };
            }
            State::Greeting { received } if received + length == self.greeting => {
                self.send_request(connection, 0)?
            }
            State::Response { step, received } if received + length < self.steps[step].1 => {
                connection.state = State::Response { step, received: received + length };
            }
            State::Response { step, received } if received + length == self.steps[step].1 => {
                self.count_response(connection, measured);
                match step + 1 {
                    next if next < self.steps.len() => self.send_request(connection, next)?,
                    _ if self.ends => connection.state = State::End,
                    _ => self.send_request(connection, 0)?,
                }
            }
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "more bytes arrived than were requested",
                ));
            }
        }
        Ok(())
    }

    fn count_response(&mut self, connection: &ClientConnection, measured: bool) {
        if measured {
            self.result.round_trips += 1;
            if !self.ends {
                self.result.latencies.record(connection.requested.elapsed());
            }
        }
    }

    fn send_request(&self, connection: &mut ClientConnection, step: usize) -> io::Result<()> {
        let (request, _) = self.steps[step];
        if !self.ends {
            connection.requested = Instant::now();
        }
        connection.state = State::Response { step, received: 0 };
        let sent = send(connection.stream.as_fd(), &self.payload[..request], SendFlags::NOSIGNAL)?;
        if sent == request { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}
