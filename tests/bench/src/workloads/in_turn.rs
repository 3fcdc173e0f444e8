//! Short sessions through a system and its baseline in turn, twenty times a second.
//!
//! A virtual machine's speed changes by more than a percent from second to second. So both run at
//! the same time, each in a testbed of its own, and their clients take turns: while one makes load,
//! the other is stopped. Both share every change of speed that lasts longer than a slice.

use std::ops::AddAssign;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use injector_load::cpu::Cpu;
use injector_load::job::{Job, Load, ServerCounts};
use injector_load::service::SHORT;

use super::{Measured, MeasurementContext, Workload, figure, float, measured};
use crate::load_process::{LoadClient, LoadServer};
use crate::record::Figure;
use crate::stats::Spread;

/// Clients of each.
const CLIENTS: usize = 32;

/// How long a turn lasts.
const SLICE: Duration = Duration::from_millis(50);

/// Turns of each before those that count.
const WARM_UP: usize = 6;

struct InTurn;

pub(super) fn workload() -> Box<dyn Workload> {
    Box::new(InTurn)
}

impl Workload for InTurn {
    fn name(&self) -> String {
        "short-sessions-in-turn".to_owned()
    }

    fn about(&self) -> String {
        format!(
            "connect, 64 bytes there, 64 back, the server closes; {CLIENTS} clients, each begins anew at once. A system \
             and its engine without the guard take turns of {} ms, and each has half of the measured time. Changes are medians over the rounds",
            SLICE.as_millis()
        )
    }

    fn figures(&self) -> Vec<Figure> {
        let change =
            |key, unit, more_is_better| Figure { change: true, ..figure(key, unit, more_is_better, false) };
        vec![
            figure("rate", "sessions/s", true, false),
            figure("baseline", "sessions/s, guard off", true, false),
            change("change", "change of sessions/s", true),
            change("cpu", "change of CPU/session", false),
        ]
    }

    fn takes_turns(&self) -> bool {
        true
    }

    fn measure(&self, context: &mut MeasurementContext<'_>) -> anyhow::Result<Measured> {
        let (baseline, second) =
            context.baseline.as_mut().context("it has no baseline to take turns with")?;
        let job = |target| Job {
            target,
            load: Load::Closed { service: SHORT.name.to_owned(), connections: CLIENTS },
            // Until it is killed.
            seconds: 3600.0,
        };
        let ours = LoadClient::start(&context.testbed.topology.client, &job(context.system.target(&SHORT)))?;
        let theirs = LoadClient::start(&second.topology.client, &job(baseline.target(&SHORT)))?;
        let mut both = [(ours, &mut context.testbed.server), (theirs, &mut second.server)];
        for (client, _) in &both {
            client.stop(true)?;
        }
        let (mut totals, mut changes) = ([Turn::default(); 2], [Vec::new(), Vec::new()]);
        let begun = Cpu::now()?;
        for round in 0..WARM_UP + rounds(context.seconds) {
            // The one that is first in a round is second in the next.
            let mut turns = [Turn::default(); 2];
            for at in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                let (client, server) = &mut both[at];
                turns[at] = take_turn(client, server)?;
            }
            if round >= WARM_UP {
                let [ours, theirs] = turns;
                totals[0] += ours;
                totals[1] += theirs;
                changes[0].push(change(ours.rate(), theirs.rate()));
                changes[1].push(change(ours.busy_each(), theirs.busy_each()));
            }
        }
        let [ours, theirs] = totals;
        // A burst of other processes falls into few rounds.
        let [of_rate, of_cpu] = changes.map(|all| Spread::of(&all).map_or(f64::NAN, |spread| spread.median));
        Ok(measured(
            Cpu::now()? - begun,
            [("rate", ours.rate()), ("baseline", theirs.rate()), ("change", of_rate), ("cpu", of_cpu)],
        ))
    }
}

/// How often both have their turns.
fn rounds(seconds: f64) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "thousands")]
    let rounds = (seconds / SLICE.as_secs_f64() / 2.0).round() as usize;
    rounds.max(1)
}

/// In percent.
fn change(ours: f64, baseline: f64) -> f64 {
    (ours / baseline - 1.0) * 100.0
}

/// What was done in a turn, or in many.
#[derive(Clone, Copy, Debug, Default)]
struct Turn {
    sessions: u64,
    seconds: f64,
    /// Processor time of the machine, in seconds.
    busy: f64,
}

impl Turn {
    fn rate(&self) -> f64 {
        float(self.sessions) / self.seconds
    }

    fn busy_each(&self) -> f64 {
        self.busy / float(self.sessions.max(1))
    }
}

impl AddAssign for Turn {
    fn add_assign(&mut self, other: Self) {
        self.sessions += other.sessions;
        self.seconds += other.seconds;
        self.busy += other.busy;
    }
}

/// Lets a client make load for a slice.
fn take_turn(client: &LoadClient, server: &mut LoadServer) -> anyhow::Result<Turn> {
    // What was under way when it was stopped, or arrived since.
    server.take_counts()?;
    let (begun, before) = (Instant::now(), Cpu::now()?);
    client.stop(false)?;
    thread::sleep(SLICE);
    client.stop(true)?;
    let (seconds, busy) = (begun.elapsed().as_secs_f64(), (Cpu::now()? - before).busy());
    let counts = server.take_counts()?;
    check(&counts)?;
    Ok(Turn { sessions: counts.headers, seconds, busy })
}

fn check(counts: &ServerCounts) -> anyhow::Result<()> {
    ensure!(counts.bad_headers == 0, "{} connections arrived without a header", counts.bad_headers);
    ensure!(counts.bare == 0, "{} connections arrived at a port without a header", counts.bare);
    ensure!(counts.failures == 0, "{} connections failed", counts.failures);
    ensure!(counts.headers > 0, "no session in a turn");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_have_half_of_the_time() {
        assert_eq!(rounds(4.0), 40);
        assert_eq!(rounds(0.1), 1);
    }

    #[test]
    fn turns_add_up() {
        let mut total = Turn { sessions: 500, seconds: 0.1, busy: 0.2 };
        total += Turn { sessions: 1500, seconds: 0.1, busy: 0.1 };
        assert!((total.rate() - 10_000.0).abs() < 1e-6 && (total.busy_each() - 150e-6).abs() < 1e-12);
        assert!((change(total.rate(), 8000.0) - 25.0).abs() < 1e-9);
    }

    #[test]
    fn a_turn_without_a_header_or_with_a_failure_is_invalid() {
        let good = ServerCounts { headers: 1, proxied: 1, ..ServerCounts::default() };
        assert!(check(&good).is_ok());
        for bad in [
            ServerCounts { headers: 0, ..good },
            ServerCounts { bad_headers: 1, ..good },
            ServerCounts { bare: 1, ..good },
            ServerCounts { failures: 1, ..good },
        ] {
            assert!(check(&bad).is_err(), "{bad:?}");
        }
    }
}
