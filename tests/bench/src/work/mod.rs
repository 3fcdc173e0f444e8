//! What the peers have to do. One file for each kind; [`all`] is the list.

mod bulk;
mod idle;
mod mail;
mod mixed;
mod round_trips;
mod short_sessions;

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{bail, ensure};
use injector_load::cpu::Cpu;
use injector_load::order::{Counts, Order, Outcome, Work as Load};
use injector_load::service::{Door, Service};

use super::peers::{Peer, Running};
use super::record::Figure;
use super::stage::Stage;

/// Something to do.
pub trait Work {
    /// Unique; what `--work` and the reports call it.
    fn name(&self) -> String;

    /// What it is, for the report.
    fn about(&self) -> String;

    /// What is measured; the first is what ratios and charts are made of.
    fn figures(&self) -> Vec<Figure>;

    /// Does it once.
    ///
    /// # Errors
    /// When it could not be done, or not by the rules: a header was missing, a connection failed, bytes were lost.
    fn measure(&self, scene: &mut Scene<'_>) -> anyhow::Result<Measured>;
}

/// Everything at hand for one measurement.
pub struct Scene<'a> {
    /// Where.
    pub stage: &'a mut Stage,
    /// Through whom.
    pub peer: &'a Peer,
    /// The same, started.
    pub running: &'a mut dyn Running,
    /// For how long.
    pub seconds: f64,
}

/// What one measurement gave.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// By key.
    pub figures: BTreeMap<String, f64>,
    /// What the whole machine spent.
    pub cpu: Cpu,
}

/// All works, in the order of the reports.
#[must_use]
pub fn all() -> Vec<Box<dyn Work>> {
    let mut works: Vec<Box<dyn Work>> = Vec::new();
    works.extend(bulk::all());
    works.extend(round_trips::all());
    works.extend(short_sessions::all());
    works.push(mail::work());
    works.extend(idle::all());
    works.push(mixed::work());
    works
}

/// Those of `--quick`: one for each way in which a peer can be slow.
pub const QUICK: [&str; 4] = ["bulk-up-16", "bulk-down-16", "round-trips-32", "short-sessions"];

/// Those by which the rules of enrolment are chosen.
pub const ENROLMENT: [&str; 5] =
    ["bulk-up-16", "bulk-down-16", "round-trips-32", "short-sessions", "smtp-dialogue"];

/// How long the server may take to count the last connection.
const SETTLE: Duration = Duration::from_millis(30);

impl Scene<'_> {
    /// Has a client do something through the peer, at this service, and looks whether all was in order.
    fn load(&mut self, service: &Service, work: Load) -> anyhow::Result<(Outcome, Counts)> {
        let order = Order { target: self.peer.target(service), work, seconds: self.seconds };
        self.stage.server.take()?;
        let outcome = self.stage.order(&order)?;
        let counts = self.counts(&outcome)?;
        Ok((outcome, counts))
    }

    /// What the server counted, once it is sure that all was in order.
    fn counts(&mut self, outcome: &Outcome) -> anyhow::Result<Counts> {
        thread::sleep(SETTLE);
        let counts = self.stage.server.take()?;
        in_order(self.peer.door, outcome, &counts)?;
        Ok(counts)
    }
}

/// Whether every connection came as it has to, and none failed.
fn in_order(door: Door, outcome: &Outcome, counts: &Counts) -> anyhow::Result<()> {
    if let Some(failure) = &outcome.failure {
        bail!("{} failures, the first: {failure}", outcome.failures);
    }
    ensure!(counts.bad_headers == 0, "{} connections came without their header", counts.bad_headers);
    match door {
        Door::Header => {
            ensure!(counts.bare == 0, "{} connections came to a port without a header", counts.bare);
            ensure!(counts.headers > 0, "not one header came");
            ensure!(
                counts.headers >= outcome.sessions,
                "{} sessions, but {} headers",
                outcome.sessions,
                counts.headers
            );
        }
        Door::Bare => {
            ensure!(counts.proxied == 0, "{} connections came to a port for headers", counts.proxied);
            ensure!(counts.bare > 0, "not one connection came");
        }
    }
    Ok(())
}

fn figure(key: &str, unit: &str, more_is_better: bool, above_direct: bool) -> Figure {
    Figure { key: key.to_owned(), unit: unit.to_owned(), more_is_better, above_direct }
}

/// The machine's time for each unit of work, of which the direct route has its share.
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
        let names: Vec<_> = all().iter().map(|work| work.name()).collect();
        let mut unique = names.clone();
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), names.len(), "{names:?}");
        for name in QUICK.iter().chain(&ENROLMENT) {
            assert!(names.iter().any(|other| other == name), "{name}");
        }
        for work in all() {
            assert!(!work.figures().is_empty(), "{}", work.name());
        }
    }

    #[test]
    fn a_missing_header_fails_the_measurement() {
        let outcome = Outcome { sessions: 2, connections: 2, ..Outcome::default() };
        let good = Counts { proxied: 2, headers: 2, ..Counts::default() };
        assert!(in_order(Door::Header, &outcome, &good).is_ok());
        for (counts, why) in [
            (Counts { bad_headers: 1, ..good }, "one came without"),
            (Counts { headers: 1, ..good }, "fewer than sessions"),
            (Counts { bare: 1, ..good }, "round the peer"),
            (Counts { headers: 0, proxied: 0, ..good }, "none at all"),
        ] {
            assert!(in_order(Door::Header, &outcome, &counts).is_err(), "{why}");
        }
        let bare = Counts { bare: 2, ..Counts::default() };
        assert!(in_order(Door::Bare, &outcome, &bare).is_ok());
        assert!(in_order(Door::Bare, &outcome, &good).is_err());
        let failed = Outcome { failures: 1, failure: Some("reset".into()), ..outcome };
        assert!(in_order(Door::Header, &failed, &good).is_err());
    }
}
