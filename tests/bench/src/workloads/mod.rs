//! The workloads. One file for each kind; [`all`] is the list.

mod beside_bulk;
mod bulk;
mod idle;
mod in_turn;
mod mail;
mod round_trips;
mod short_sessions;
mod syn_flood;

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{bail, ensure};
use injector_load::cpu::Cpu;
use injector_load::job::{Job, JobOutcome, Load, ServerCounts};
use injector_load::service::{PortKind, Service};

use super::record::Figure;
use super::systems::{RunningSystem, System};
use super::testbed::Testbed;

/// A workload.
pub trait Workload {
    /// Unique name, for `--workload` and the reports.
    fn name(&self) -> String;

    /// Description for the report.
    fn about(&self) -> String;

    /// What is measured; ratios and charts use the first.
    fn figures(&self) -> Vec<Figure>;

    /// Changes the testbed before the system starts on it.
    ///
    /// # Errors
    /// When the testbed cannot be changed.
    fn prepare(&self, _testbed: &mut Testbed) -> anyhow::Result<()> {
        Ok(())
    }

    /// Whether it runs a system and its baseline in turn.
    fn takes_turns(&self) -> bool {
        false
    }

    /// Runs it once.
    ///
    /// # Errors
    /// When it fails or its result is invalid: a header was missing, a connection failed, bytes
    /// were lost.
    fn measure(&self, context: &mut MeasurementContext<'_>) -> anyhow::Result<Measured>;
}

/// The context of one measurement.
pub struct MeasurementContext<'a> {
    /// The testbed.
    pub testbed: &'a mut Testbed,
    /// The system's baseline, started in a testbed of its own, for a workload that takes turns.
    pub baseline: Option<(&'a System, &'a mut Testbed)>,
    /// The system under test.
    pub system: &'a System,
    /// The same, started.
    pub running: &'a mut dyn RunningSystem,
    /// Length of the measurement.
    pub seconds: f64,
}

/// The result of one measurement.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// By key.
    pub figures: BTreeMap<String, f64>,
    /// Processor time of the whole machine.
    pub cpu: Cpu,
}

/// All workloads, in the order of the reports.
#[must_use]
pub fn all() -> Vec<Box<dyn Workload>> {
    let mut workloads: Vec<Box<dyn Workload>> = Vec::new();
    workloads.extend(bulk::all());
    workloads.extend(round_trips::all());
    workloads.extend(short_sessions::all());
    workloads.push(mail::workload());
    workloads.extend(idle::all());
    workloads.push(beside_bulk::workload());
    workloads
}

/// Short sessions through a system and its baseline in turn.
#[must_use]
pub fn in_turn() -> Box<dyn Workload> {
    in_turn::workload()
}

/// Good sessions during a flood of this many SYNs per second.
#[must_use]
pub fn flood(rate: f64) -> Box<dyn Workload> {
    syn_flood::workload(rate)
}

/// The workloads of `--quick`: one for each way in which a system can be slow.
pub const QUICK: [&str; 4] = ["bulk-up-16", "bulk-down-16", "round-trips-32", "short-sessions"];

/// The workloads for choosing rules of enrolment.
pub const ENROLMENT: [&str; 5] =
    ["bulk-up-16", "bulk-down-16", "round-trips-32", "short-sessions", "smtp-dialogue"];

/// How long the server may take to count the last connection.
const SETTLE: Duration = Duration::from_millis(30);

impl MeasurementContext<'_> {
    /// Puts a load on the system, at this service, and checks the result.
    fn load(&mut self, service: &Service, load: Load) -> anyhow::Result<(JobOutcome, ServerCounts)> {
        let job = Job { target: self.system.target(service), load, seconds: self.seconds };
        self.testbed.server.take_counts()?;
        let outcome = self.testbed.run(&job)?;
        let counts = self.counts(&outcome)?;
        Ok((outcome, counts))
    }

    /// The server's counts, once they have been checked.
    fn counts(&mut self, outcome: &JobOutcome) -> anyhow::Result<ServerCounts> {
        thread::sleep(SETTLE);
        let counts = self.testbed.server.take_counts()?;
        check(self.system.port_kind, outcome, &counts)?;
        Ok(counts)
    }
}

/// Checks that every connection arrived with or without a header, as required, and that none
/// failed.
fn check(port_kind: PortKind, outcome: &JobOutcome, counts: &ServerCounts) -> anyhow::Result<()> {
    if let Some(failure) = &outcome.failure {
        bail!("{} failures, the first: {failure}", outcome.failures);
    }
    ensure!(counts.bad_headers == 0, "{} connections arrived without a header", counts.bad_headers);
    match port_kind {
        PortKind::Header => {
            ensure!(counts.bare == 0, "{} connections arrived at a port without a header", counts.bare);
            ensure!(counts.headers > 0, "no header arrived");
            ensure!(
                counts.headers >= outcome.sessions,
                "{} sessions, but {} headers",
                outcome.sessions,
                counts.headers
            );
        }
        PortKind::Bare => {
            ensure!(
                counts.proxied == 0,
                "{} connections arrived at a port that requires a header",
                counts.proxied
            );
            ensure!(counts.bare > 0, "no connection arrived");
        }
    }
    Ok(())
}

fn figure(key: &str, unit: &str, more_is_better: bool, above_direct: bool) -> Figure {
    Figure { key: key.to_owned(), unit: unit.to_owned(), more_is_better, above_direct, change: false }
}

/// The machine's time per unit of load, which includes the direct route's share.
fn cpu_figure(unit: &str) -> Figure {
    figure("cpu", unit, false, true)
}

fn measured<const N: usize>(cpu: Cpu, figures: [(&str, f64); N]) -> Measured {
    Measured { figures: figures.map(|(key, value)| (key.to_owned(), value)).into(), cpu }
}

#[expect(clippy::cast_precision_loss, reason = "counts and bytes of seconds are far below 2^53")]
fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_the_short_lists_exist() {
        let names: Vec<_> = all().iter().map(|workload| workload.name()).collect();
        let mut unique = names.clone();
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), names.len(), "{names:?}");
        for name in QUICK.iter().chain(&ENROLMENT) {
            assert!(names.iter().any(|other| other == name), "{name}");
        }
        for workload in all() {
            assert!(!workload.figures().is_empty(), "{}", workload.name());
        }
    }

    #[test]
    fn a_missing_header_fails_the_measurement() {
        let outcome = JobOutcome { sessions: 2, connections: 2, ..JobOutcome::default() };
        let good = ServerCounts { proxied: 2, headers: 2, ..ServerCounts::default() };
        assert!(check(PortKind::Header, &outcome, &good).is_ok());
        for (counts, why) in [
            (ServerCounts { bad_headers: 1, ..good }, "one without a header"),
            (ServerCounts { headers: 1, ..good }, "fewer than sessions"),
            (ServerCounts { bare: 1, ..good }, "past the system"),
            (ServerCounts { headers: 0, proxied: 0, ..good }, "none at all"),
        ] {
            assert!(check(PortKind::Header, &outcome, &counts).is_err(), "{why}");
        }
        let bare = ServerCounts { bare: 2, ..ServerCounts::default() };
        assert!(check(PortKind::Bare, &outcome, &bare).is_ok());
        assert!(check(PortKind::Bare, &outcome, &good).is_err());
        let failed = JobOutcome { failures: 1, failure: Some("reset".into()), ..outcome };
        assert!(check(PortKind::Header, &failed, &good).is_err());
    }
}
