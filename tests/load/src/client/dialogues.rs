//! Dialogues: many at a time, by as many threads as there are processors, each with a poller of its own.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use super::WARM_UP;
use super::tally::Failures;
use crate::cpu::Cpu;
use crate::latency::Latencies;
use crate::order::Outcome;
use crate::poller::{Events, Interest, Poller, index};
use crate::service::{LARGEST_QUESTION, Service, Talk};

/// When the next dialogue begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pace {
    /// When an earlier one is done; so many at one time.
    Closed { connections: usize },
    /// At so many a second.
    Open { rate: f64 },
}

/// Phases of a run, in this order.
const WARMING: u8 = 0;
const MEASURING: u8 = 1;
const ENDING: u8 = 2;

/// How long the last dialogues of an open loop may take.
const DRAIN: Duration = Duration::from_secs(2);

/// Dialogues of an open loop at one time, in each thread: a peer that is this far behind does not keep up.
const MOST_OPEN: usize = 4096;

/// How long a thread waits before it looks at the phase again.
const TICK: Duration = Duration::from_millis(20);

/// Bytes read at once; more than any answer.
const ROOM: usize = 64 << 10;

pub(super) fn run(
    target: SocketAddr,
    service: &'static Service,
    pace: Pace,
    seconds: f64,
) -> anyhow::Result<Outcome> {
    let Talk::Dialogue { greeting, steps, ends } = service.talk else { bail!("{service} is no dialogue") };
    ensure!(ends || matches!(pace, Pace::Closed { .. }), "{service} does not end, so it has no rate");
    let processors = thread::available_parallelism()?.get();
    let threads = match pace {
        Pace::Closed { connections } => processors.min(connections),
        Pace::Open { .. } => processors,
    };
    let phase = AtomicU8::new(WARMING);
    let phase = &phase;
    thread::scope(|scope| {
        let begin = |thread: usize| {
            let pace = pace.share(thread, threads);
            move || {
                let crew = Crew::new(target, greeting, steps, ends, phase)?;
                crew.work(pace, thread as u64)
            }
        };
        let crews: Vec<_> = (0..threads).map(|thread| scope.spawn(begin(thread))).collect();
        thread::sleep(Duration::from_secs_f64(WARM_UP));
        let before = Cpu::now()?;
        let begun = Instant::now();
        phase.store(MEASURING, Ordering::Relaxed);
        thread::sleep(Duration::from_secs_f64(seconds));
        phase.store(ENDING, Ordering::Relaxed);
        let mut outcome = Outcome {
            seconds: begun.elapsed().as_secs_f64(),
            cpu: Cpu::now()? - before,
            ..Outcome::default()
        };
        let mut latencies = Latencies::new()?;
        let mut failures = Failures::default();
        for crew in crews {
            let done = crew.join().map_err(|_| anyhow!("a client thread panicked"))??;
            outcome.round_trips += done.round_trips;
            outcome.sessions += done.sessions;
            outcome.unfinished += done.unfinished;
            outcome.connections += done.connections;
            latencies.add(&done.latencies)?;
            done.failures.into(&mut outcome);
        }
        if outcome.round_trips == 0 {
            failures.note("measuring", "not one question was answered");
        }
        failures.into(&mut outcome);
        outcome.latency = latencies.summary();
        Ok(outcome)
    })
}

impl Pace {
    /// What one of the threads does of it.
    fn share(self, thread: usize, threads: usize) -> Self {
        match self {
            Self::Closed { connections } => {
                let rest = usize::from(thread < connections % threads);
                Self::Closed { connections: connections / threads + rest }
            }
            #[expect(clippy::cast_precision_loss, reason = "a handful of threads")]
            Self::Open { rate } => Self::Open { rate: rate / threads as f64 },
        }
    }
}

/// One connection.
#[derive(Debug)]
struct Lane {
    stream: TcpStream,
    state: State,
    /// When its dialogue began, or was to begin.
    begun: Instant,
    /// When its question was asked.
    asked: Instant,
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// To be connected.
    Connecting,
    /// The greeting, of which so many bytes have come.
    Greeting { come: usize },
    /// The answer of a step.
    Answer { step: usize, come: usize },
    /// The server's end of the connection, after the last answer.
    End,
}

/// When dialogues begin: a Poisson process, told by a timer of the kernel, which has no slack as `epoll_wait` has.
#[derive(Debug)]
struct Alarm {
    timer: OwnedFd,
    rate: f64,
    chance: ChaCha8Rng,
    next: Instant,
}

impl Alarm {
    fn new(rate: f64, seed: u64) -> anyhow::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let mut alarm = Self { timer, rate, chance: ChaCha8Rng::seed_from_u64(seed), next: Instant::now() };
        alarm.advance();
        alarm.set()?;
        Ok(alarm)
    }

    /// The next beginning that is due; `None`, with the timer set, if none is.
    fn due(&mut self) -> anyhow::Result<Option<Instant>> {
        if self.next > Instant::now() {
            self.set()?;
            return Ok(None);
        }
        let due = self.next;
        self.advance();
        Ok(Some(due))
    }

    fn advance(&mut self) {
        let uniform: f64 = self.chance.random();
        self.next += Duration::from_secs_f64(-(1.0 - uniform).ln() / self.rate);
    }

    /// To set a timer is to forget that it has rung.
    fn set(&self) -> anyhow::Result<()> {
        // Zero would never ring.
        let left = self.next.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let (once, left) = (Duration::ZERO.try_into()?, left.try_into().context("the rate is too low")?);
        let spec = Itimerspec { it_interval: once, it_value: left };
        Ok(timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec).map(drop)?)
    }
}

/// One thread with its connections and what it counts.
#[derive(Debug)]
struct Crew<'a> {
    target: SocketAddr,
    greeting: usize,
    steps: &'static [(usize, usize)],
    ends: bool,
    phase: &'a AtomicU8,
    poller: Poller,
    /// By descriptor.
    lanes: Vec<Option<Lane>>,
    open: usize,
    payload: Vec<u8>,
    buffer: Vec<u8>,
    done: Done,
}

#[derive(Debug)]
struct Done {
    round_trips: u64,
    sessions: u64,
    unfinished: u64,
    connections: u64,
    latencies: Latencies,
    failures: Failures,
}

impl<'a> Crew<'a> {
    fn new(
        target: SocketAddr,
        greeting: usize,
        steps: &'static [(usize, usize)],
        ends: bool,
        phase: &'a AtomicU8,
    ) -> anyhow::Result<Self> {
        let done = Done {
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
            lanes: Vec::new(),
            open: 0,
            payload: vec![b'x'; LARGEST_QUESTION],
            buffer: vec![0; ROOM],
            done,
        })
    }

    fn work(self, pace: Pace, thread: u64) -> anyhow::Result<Done> {
        match pace {
            Pace::Closed { connections } => self.closed(connections),
            Pace::Open { rate } => self.at_rate(rate, thread),
        }
    }

    fn closed(mut self, connections: usize) -> anyhow::Result<Done> {
        for _ in 0..connections {
            self.begin(Instant::now());
        }
        let mut events = Events::default();
        loop {
            self.poller.wait(&mut events, TICK)?;
            let phase = self.phase.load(Ordering::Relaxed);
            if phase == ENDING {
                return Ok(self.done);
            }
            for (at, readable) in events.iter() {
                // What ended makes room for the next; what failed does too, so that one fault is not the end of all.
                if self.go_on(at, readable, phase == MEASURING).is_none() {
                    self.begin(Instant::now());
                }
            }
        }
    }

    /// Dialogues begin at random, as clients that know nothing of each other do, and at the same moments in every run. At
    /// equal distances they would fall into step with the kernel's clock, and its ticks would always find the same.
    fn at_rate(mut self, rate: f64, thread: u64) -> anyhow::Result<Done> {
        let mut alarm = Alarm::new(rate, thread)?;
        self.poller.add(&alarm.timer, Interest::Read)?;
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
                    self.give_up(measured_from);
                    return Ok(self.done);
                }
            }
            for (at, readable) in events.iter() {
                if at == index(&alarm.timer) {
                    while let Some(intended) = alarm.due()? {
                        if ending.is_none() {
                            self.begin_if_room(intended);
                        }
                    }
                    continue;
                }
                let intended = self.lanes.get(at).and_then(Option::as_ref).map(|lane| lane.begun);
                let in_window = measured_from.is_some_and(|from| intended.is_some_and(|it| it >= from));
                self.go_on(at, readable, in_window);
            }
        }
    }

    fn begin_if_room(&mut self, intended: Instant) {
        if self.open < MOST_OPEN {
            self.begin(intended);
        } else {
            self.done.unfinished += 1;
        }
    }

    /// Dialogues that are not done by now took at least as long as they have been waiting: to leave them out would flatter
    /// whoever is slow.
    fn give_up(&mut self, measured_from: Option<Instant>) {
        for lane in self.lanes.drain(..).flatten() {
            self.done.unfinished += 1;
            if measured_from.is_some_and(|from| lane.begun >= from) {
                self.done.latencies.record(lane.begun.elapsed());
            }
        }
    }

    /// Opens a connection for a dialogue that begins, or was to begin, then.
    fn begin(&mut self, begun: Instant) {
        self.done.connections += 1;
        match self.connect() {
            Ok(stream) => {
                let at = index(&stream);
                if self.lanes.len() <= at {
                    self.lanes.resize_with(at + 1, || None);
                }
                self.lanes[at] = Some(Lane { stream, state: State::Connecting, begun, asked: begun });
                self.open += 1;
            }
            Err(error) => self.done.failures.note("connecting", error),
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
        self.poller.add(&stream, Interest::Edges)?;
        Ok(stream)
    }

    /// Goes on with a connection after an event; `None` if that was its last. Counts if `measured`.
    fn go_on(&mut self, at: usize, readable: bool, measured: bool) -> Option<()> {
        let mut lane = self.lanes.get_mut(at)?.take()?;
        match self.step(&mut lane, readable, measured) {
            Ok(true) => {
                self.lanes[at] = Some(lane);
                return Some(());
            }
            Ok(false) => {
                if measured {
                    self.done.sessions += 1;
                    self.done.latencies.record(lane.begun.elapsed());
                }
            }
            Err(error) => self.done.failures.note("a dialogue", error),
        }
        self.open -= 1;
        None
    }

    /// Whether there is more to come.
    fn step(&mut self, lane: &mut Lane, readable: bool, measured: bool) -> io::Result<bool> {
        if lane.state == State::Connecting {
            if let Some(error) = lane.stream.take_error()? {
                return Err(error);
            }
            if self.greeting > 0 {
                lane.state = State::Greeting { come: 0 };
            } else {
                self.ask(lane, 0)?;
            }
        }
        if !readable {
            return Ok(true);
        }
        // An edge comes once: read until there is no more.
        loop {
            let length = match recv(lane.stream.as_fd(), &mut self.buffer[..], RecvFlags::empty()) {
                Ok((_, length)) => length,
                Err(Errno::AGAIN) => return Ok(true),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            if length == 0 {
                let in_order = lane.state == State::End;
                return if in_order { Ok(false) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
            self.take(lane, length, measured)?;
            // A short read has emptied the socket; only the end of the connection may still be there.
            if length < ROOM && lane.state != State::End {
                return Ok(true);
            }
        }
    }

    /// So many bytes have come.
    fn take(&mut self, lane: &mut Lane, length: usize, measured: bool) -> io::Result<()> {
        match lane.state {
            State::Greeting { come } if come + length < self.greeting => {
                lane.state = State::Greeting { come: come + length };
            }
            State::Greeting { come } if come + length == self.greeting => self.ask(lane, 0)?,
            State::Answer { step, come } if come + length < self.steps[step].1 => {
                lane.state = State::Answer { step, come: come + length };
            }
            State::Answer { step, come } if come + length == self.steps[step].1 => {
                self.answered(lane, measured);
                match step + 1 {
                    next if next < self.steps.len() => self.ask(lane, next)?,
                    _ if self.ends => lane.state = State::End,
                    _ => self.ask(lane, 0)?,
                }
            }
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "more came than was asked for")),
        }
        Ok(())
    }

    fn answered(&mut self, lane: &Lane, measured: bool) {
        if measured {
            self.done.round_trips += 1;
            if !self.ends {
                self.done.latencies.record(lane.asked.elapsed());
            }
        }
    }

    fn ask(&self, lane: &mut Lane, step: usize) -> io::Result<()> {
        let (question, _) = self.steps[step];
        if !self.ends {
            lane.asked = Instant::now();
        }
        lane.state = State::Answer { step, come: 0 };
        let said = send(lane.stream.as_fd(), &self.payload[..question], SendFlags::NOSIGNAL)?;
        if said == question { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_come_at_the_rate_and_at_the_same_moments_again() {
        let gaps = || {
            let mut alarm = Alarm::new(1000.0, 7).unwrap();
            let mut last = alarm.next;
            let mut gap = || {
                alarm.advance();
                let gap = alarm.next - last;
                last = alarm.next;
                gap
            };
            (0..10_000).map(|_| gap()).collect::<Vec<_>>()
        };
        let first = gaps();
        assert_eq!(first, gaps());
        let total: Duration = first.iter().sum();
        assert!((9.5..10.5).contains(&total.as_secs_f64()), "{total:?}");
    }

    #[test]
    fn shares_add_up() {
        for (connections, threads) in [(1, 1), (5, 2), (256, 2), (32, 3)] {
            let share = |thread| match (Pace::Closed { connections }).share(thread, threads) {
                Pace::Closed { connections } => connections,
                Pace::Open { .. } => unreachable!(),
            };
            assert_eq!((0..threads).map(share).sum::<usize>(), connections);
        }
    }
}
