//! Dialogues: many at a time, one thread for each processor, each with its own poller.

mod arrival_timer;
mod client_thread;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure};

use self::client_thread::ClientThread;
use super::WARM_UP;
use super::failures::Failures;
use crate::cpu::Cpu;
use crate::job::JobOutcome;
use crate::latency::Latencies;
use crate::service::{Script, Service};

/// When the next dialogue starts.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pace {
    /// When an earlier one has ended (closed loop); this many at a time.
    Closed { connections: usize },
    /// At a fixed rate per second (open loop).
    Open { rate: f64 },
}

/// Phases of a run, in this order.
const WARMING: u8 = 0;
const MEASURING: u8 = 1;
const ENDING: u8 = 2;

/// How long the last dialogues of an open loop may still run.
const DRAIN: Duration = Duration::from_secs(2);

/// Limit of simultaneous dialogues of an open loop, per thread: a system that is this far behind
/// does not keep up.
const MAX_OPEN: usize = 4096;

/// How long a thread waits before it reads the phase again.
const TICK: Duration = Duration::from_millis(20);

/// Bytes per read; larger than any response.
const READ_BUFFER: usize = 64 << 10;

pub(super) fn run(
    target: SocketAddr,
    service: &'static Service,
    pace: Pace,
    seconds: f64,
) -> anyhow::Result<JobOutcome> {
    let Script::Dialogue { greeting, steps, ends } = service.script else {
        bail!("{service} is not a dialogue")
    };
    ensure!(
        ends || matches!(pace, Pace::Closed { .. }),
        "{service} does not end, so it cannot run at a fixed rate"
    );
    let processors = thread::available_parallelism()?.get();
    let count = match pace {
        Pace::Closed { connections } => processors.min(connections),
        Pace::Open { .. } => processors,
    };
    let phase = AtomicU8::new(WARMING);
    let phase = &phase;
    thread::scope(|scope| {
        let start = |number: usize| {
            let pace = pace.share(number, count);
            move || {
                let thread = ClientThread::new(target, greeting, steps, ends, phase)?;
                thread.run(pace, number as u64)
            }
        };
        let threads: Vec<_> = (0..count).map(|number| scope.spawn(start(number))).collect();
        thread::sleep(Duration::from_secs_f64(WARM_UP));
        let before = Cpu::now()?;
        let begun = Instant::now();
        phase.store(MEASURING, Ordering::Relaxed);
        thread::sleep(Duration::from_secs_f64(seconds));
        phase.store(ENDING, Ordering::Relaxed);
        let mut outcome = JobOutcome {
            seconds: begun.elapsed().as_secs_f64(),
            cpu: Cpu::now()? - before,
            ..JobOutcome::default()
        };
        let mut latencies = Latencies::new()?;
        let mut failures = Failures::default();
        for thread in threads {
            let done = thread.join().map_err(|_| anyhow!("a client thread panicked"))??;
            outcome.round_trips += done.round_trips;
            outcome.sessions += done.sessions;
            outcome.unfinished += done.unfinished;
            outcome.connections += done.connections;
            latencies.add(&done.latencies)?;
            done.failures.into(&mut outcome);
        }
        if outcome.round_trips == 0 {
            failures.note("measuring", "no request received a response");
        }
        failures.into(&mut outcome);
        outcome.latency = latencies.summary();
        Ok(outcome)
    })
}

impl Pace {
    /// The share of one thread.
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

#[cfg(test)]
mod tests {
    use super::*;

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
