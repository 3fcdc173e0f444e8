//! Dialogues: many at a time, one thread for each processor, each with its own poller.

mod arrival_timer;
mod client_thread;
mod pace;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure};

use self::client_thread::ClientThread;
pub(super) use self::pace::Pace;
use self::pace::{ENDING, MEASURING, WARMING};
use super::failures::Failures;
use crate::cpu::Cpu;
use crate::job::{JobOutcome, WARM_UP};
use crate::latency::Latencies;
use crate::service::{Script, Service};

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
