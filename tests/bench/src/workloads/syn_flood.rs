//! Good sessions at a low, fixed rate, while an attacker floods the edge with forged SYNs.

use std::fs;

use anyhow::{Context as _, ensure};
use injector_load::job::{Job, JobOutcome, Load, WARM_UP};
use injector_load::service::SHORT;

use super::{Measured, MeasurementContext, SETTLE, Workload, figure, float};
use crate::attacker::{Attacker, set_default_backlog};
use crate::netstat::TcpCounts;
use crate::record::Figure;
use crate::systems::{HOOKS, dropped_at};
use crate::testbed::Testbed;

/// Good sessions per second.
const GOOD_RATE: f64 = 100.0;

/// The flood begins before the good sessions and lasts longer: they may take two seconds to end,
/// and their process time to start.
const LONGER: f64 = 10.0;

/// The share of the SYNs that a ban of the attacker must drop where it should.
const MIN_DROPPED: f64 = 0.99;

/// Clock ticks a second in `/proc/PID/stat` (USER_HZ, 100 on every architecture Rust runs on).
const TICKS: f64 = 100.0;

struct SynFlood {
    rate: f64,
}

/// The workload, with this many SYNs per second.
pub(super) fn workload(rate: f64) -> Box<dyn Workload> {
    Box::new(SynFlood { rate })
}

impl Workload for SynFlood {
    fn name(&self) -> String {
        format!("syn-flood-{}", self.rate)
    }

    fn about(&self) -> String {
        format!(
            "short sessions, {GOOD_RATE} begun every second, while {} forged SYNs every second reach the same listener \
             by another device. Latency counts from when a session was to begin. Processor time includes the \
             attacker's: veth runs the edge's softirqs in the context of the sender",
            self.rate
        )
    }

    fn figures(&self) -> Vec<Figure> {
        vec![
            figure("served", "good sessions served, %", true, false),
            figure("median", "ms, median", false, false),
            figure("p99", "ms, 99 %", false, false),
            figure("max", "ms, slowest", false, false),
            figure("syns", "SYNs sent/s", true, false),
            figure("guard", "dropped by the guard/s", true, false),
            figure("cookies", "SYN cookies sent/s", false, false),
            figure("dropped", "dropped by listen sockets/s", false, false),
            figure("each", "ns of processor time/SYN", false, false),
            figure("busy", "processors, % busy", false, false),
            figure("interrupts", "% in softirqs", false, false),
            figure("daemon", "daemon, % of a processor", false, false),
        ]
    }

    fn prepare(&self, testbed: &mut Testbed) -> anyhow::Result<()> {
        set_default_backlog(&testbed.topology.edge)?;
        testbed.attacker = Some(Attacker::join(&testbed.topology.edge)?);
        Ok(())
    }

    fn measure(&self, context: &mut MeasurementContext<'_>) -> anyhow::Result<Measured> {
        let target = context.system.target(&SHORT);
        let load = Load::Open { service: SHORT.name.to_owned(), rate: GOOD_RATE };
        let job = Job { target, load, seconds: context.seconds };
        context.testbed.server.take_counts()?;
        let before = Counts::now(context)?;
        let attacker = context.testbed.attacker.as_ref().context("the testbed has no attacker")?;
        let flood = attacker.flood(target, self.rate, 2.0 * WARM_UP + context.seconds + LONGER)?;
        let outcome = context.testbed.run(&job)?;
        let flood = flood.end()?;
        let counted = Counts::now(context)?.since(before);
        std::thread::sleep(SETTLE);
        let served = context.testbed.server.take_counts()?;
        ensure!(served.bad_headers == 0, "{} connections arrived without a header", served.bad_headers);
        ensure!(flood.sent > 0, "no SYN was sent");
        if let Some(hook) = context.system.bans_attacker_at {
            check_ban(hook, &counted.guard, flood.sent)?;
        }
        let a_second = |count: f64| count / flood.seconds;
        let mut figures: std::collections::BTreeMap<_, _> = [
            ("served", share_served(&outcome) * 100.0),
            ("syns", flood.rate()),
            ("guard", a_second(counted.guard.iter().sum())),
            ("cookies", a_second(float(counted.tcp.cookies_sent))),
            ("dropped", a_second(float(counted.tcp.dropped))),
            ("each", outcome.cpu.busy() / outcome.seconds / flood.rate() * 1e9),
            ("busy", outcome.cpu.load() * 100.0),
            ("interrupts", outcome.cpu.interrupts / outcome.cpu.elapsed * 100.0),
            ("daemon", a_second(counted.daemon) * 100.0),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        // No session, no latency.
        if let Some(latency) = outcome.latency {
            let each = [("median", latency.median), ("p99", latency.p99), ("max", latency.max)];
            figures.extend(each.map(|(key, micros)| (key.to_owned(), micros / 1000.0)));
        }
        Ok(Measured { figures, cpu: outcome.cpu })
    }
}

/// Checks that a ban of the attacker has dropped its SYNs at this hook, and not elsewhere.
fn check_ban(hook: &str, dropped: &[f64; HOOKS.len()], sent: u64) -> anyhow::Result<()> {
    let dropped = HOOKS.iter().position(|other| *other == hook).map_or(0.0, |at| dropped[at]);
    ensure!(
        dropped >= MIN_DROPPED * float(sent),
        "{dropped} of {sent} SYNs were dropped at hook {hook}: the ban has no effect there"
    );
    Ok(())
}

/// The share of good sessions that completed within two seconds after the last began, 0 to 1.
fn share_served(outcome: &JobOutcome) -> f64 {
    let offered = outcome.sessions + outcome.unfinished + outcome.failures;
    float(outcome.sessions) / float(offered.max(1))
}

/// What edge and system have counted.
#[derive(Clone, Copy, Debug)]
struct Counts {
    tcp: TcpCounts,
    /// Packets that the guard's programs dropped, for each of [`HOOKS`].
    guard: [f64; HOOKS.len()],
    /// Processor time of the system's processes, in seconds.
    daemon: f64,
}

impl Counts {
    fn now(context: &mut MeasurementContext<'_>) -> anyhow::Result<Self> {
        let (pids, own) = (context.running.pids(), context.running.counters()?);
        Ok(Self {
            tcp: TcpCounts::of(&context.testbed.topology.edge)?,
            guard: HOOKS.map(|hook| own.get(&dropped_at(hook)).copied().unwrap_or_default()),
            daemon: pids.into_iter().map(processor_time).sum::<anyhow::Result<f64>>()?,
        })
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            tcp: self.tcp.since(earlier.tcp),
            guard: std::array::from_fn(|at| self.guard[at] - earlier.guard[at]),
            daemon: self.daemon - earlier.daemon,
        }
    }
}

/// Seconds of processor time of a process, in user space and in the kernel.
fn processor_time(pid: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    parse_stat(&text).with_context(|| format!("{path} is not in the format of proc_pid_stat(5)"))
}

fn parse_stat(text: &str) -> Option<f64> {
    /// Of `utime`, counted after the name, which may contain blanks.
    const USER: usize = 11;
    let (_, fields) = text.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(USER).map(str::parse::<f64>);
    Some((fields.next()?.ok()? + fields.next()?.ok()?) / TICKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_or_did_not_end_was_offered_too() {
        let outcome = JobOutcome { sessions: 60, unfinished: 15, failures: 5, ..JobOutcome::default() };
        assert!((share_served(&outcome) - 0.75).abs() < 1e-9);
        assert!(share_served(&JobOutcome::default()).abs() < 1e-9, "nothing was served");
    }

    #[test]
    fn a_ban_must_drop_at_its_hook() {
        let [xdp, tc, inline] = HOOKS;
        let dropped = [0.0, 995.0, 5.0];
        assert!(check_ban(tc, &dropped, 1000).is_ok());
        assert!(check_ban(tc, &dropped, 1006).is_err(), "too few");
        assert!(check_ban(xdp, &dropped, 1000).is_err(), "another hook did");
        assert!(check_ban(inline, &dropped, 1000).is_err());
    }

    #[test]
    fn processor_time_is_read_after_the_name() {
        let text = "7 (a) b) S 1 7 7 0 -1 4194560 900 0 3 0 150 50 0 0 20 0 4 0 99 1 2 3\n";
        assert_eq!(parse_stat(text), Some(2.0));
        assert_eq!(parse_stat("7 (x) S 1"), None);
        assert!(processor_time(std::process::id()).is_ok());
    }
}
