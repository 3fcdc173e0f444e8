//! The benchmark: systems, workloads and figures, interleaved so that they can be compared.
//!
//! In reading order: [`systems`] are compared, [`workloads`] are what they carry, on a [`testbed`]
//! with the load generator's two processes ([`load_process`]). [`run`] measures every system with
//! every workload, repeatedly, into a [`record`], and [`report`] renders it, with the arithmetic of
//! [`stats`]. Apart from all that, [`instructions`] are counted, not
//! timed, and [`ban_costs`] are measured by running programs without packets on the wire.

pub mod attacker;
pub mod ban_costs;
pub mod bans;
pub mod instructions;
pub mod load_process;
pub mod mail_sink;
pub mod netstat;
pub mod record;
pub mod report;
pub mod spinners;
pub mod stats;
pub mod systems;
pub mod testbed;
pub mod workloads;

use std::fmt::Write as _;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use injector_load::cpu::{Cpu, background};

use self::record::{MAX_BACKGROUND, Machine, Measurement, Record, Settings, SystemInfo, WorkloadInfo};
use self::spinners::Spinners;
use self::systems::{Programs, RunningSystem, System};
use self::testbed::Testbed;
use self::workloads::{MeasurementContext, Workload};

/// How long the machine is watched before a run.
const WATCH: Duration = Duration::from_secs(2);

/// How long a system may settle after its start, and the kernel may take to remove the previous
/// testbed.
const SETTLE: Duration = Duration::from_millis(400);

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Names of systems, or prefixes of names; all if empty.
    pub systems: Vec<String>,
    /// The same for workloads.
    pub workloads: Vec<String>,
    /// Number of repeats.
    pub repeats: usize,
    /// Length of a measurement, in seconds.
    pub seconds: f64,
    /// Run also on a machine that others use; the figures are worth little then, and the report says so.
    pub noisy: bool,
    /// Keep the processors out of idle states.
    pub spinners: bool,
    /// What is compared.
    pub comparison: Comparison,
    /// Programs that were found on this machine.
    pub programs: Programs,
    /// The machine, with the versions that the caller knows.
    pub machine: Machine,
}

/// What is compared: which systems and workloads there are besides those of every comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Comparison {
    /// Engines, proxies and routes.
    #[default]
    Engines,
    /// Rules of enrolment of the splice engine.
    Enrolment,
    /// Engines with the guard, each in turn with itself without, with clean traffic.
    Guard,
    /// Engines without and with the guard during a flood of SYNs.
    Flood {
        /// SYNs per second.
        rate: f64,
    },
}

impl Comparison {
    fn systems(self, programs: &Programs) -> Vec<System> {
        let mut systems = systems::all(programs);
        // The engines are part of these, beside their variants.
        let variants = match self {
            Self::Engines => Vec::new(),
            Self::Enrolment => systems::enrolments(),
            Self::Guard => systems::guarded(),
            Self::Flood { .. } => systems::flooded(),
        };
        systems.retain(|system| variants.iter().all(|variant| variant.name != system.name));
        systems.extend(variants);
        systems
    }

    fn workloads(self) -> Vec<Box<dyn Workload>> {
        let mut workloads = workloads::all();
        match self {
            Self::Engines | Self::Enrolment => {}
            Self::Guard => workloads.push(workloads::in_turn()),
            Self::Flood { rate } => workloads.push(workloads::flood(rate)),
        }
        workloads
    }
}

/// The systems and workloads of a run.
pub type Selection = (Vec<System>, Vec<Box<dyn Workload>>);

/// The systems and workloads that the options name.
///
/// # Errors
/// When no system or workload has such a name.
pub fn select(options: &Options) -> anyhow::Result<Selection> {
    let systems = options.comparison.systems(&options.programs);
    let workloads = options.comparison.workloads();
    let systems =
        select_by_name(systems, &options.systems, |system| system.name.clone()).context("--only")?;
    let workloads =
        select_by_name(workloads, &options.workloads, |workload| workload.name()).context("--workload")?;
    Ok((systems, workloads))
}

/// The items whose name is among `wanted`, or else begins with one of its words.
fn select_by_name<T>(all: Vec<T>, wanted: &[String], name: impl Fn(&T) -> String) -> anyhow::Result<Vec<T>> {
    if wanted.is_empty() {
        return Ok(all);
    }
    let names: Vec<_> = all.iter().map(&name).collect();
    let mut chosen = Vec::new();
    for word in wanted {
        let exact: Vec<_> = names.iter().filter(|name| *name == word).collect();
        let begins = names.iter().filter(|name| name.starts_with(word));
        let found = if exact.is_empty() { begins.collect() } else { exact };
        ensure!(!found.is_empty(), "{word} is not one of {}", names.join(", "));
        chosen.extend(found.into_iter().cloned());
    }
    Ok(all.into_iter().filter(|one| chosen.contains(&name(one))).collect())
}

/// Measures everything. `on_measurement` gets the record so far and a line for each measurement.
/// Failed measurements are in the record.
///
/// # Errors
/// When measuring is impossible here, the machine is busy, or `on_measurement` fails.
pub fn run(
    options: &Options,
    on_measurement: &mut dyn FnMut(&Record, &str) -> anyhow::Result<()>,
) -> anyhow::Result<Record> {
    let (systems, workloads) = select(options)?;
    let others = background(WATCH)?;
    ensure!(
        options.noisy || others.load() <= MAX_BACKGROUND,
        "other processes use {:.0} % of this machine, and figures are worthless above {:.0} %; wait, or pass --noisy",
        others.load() * 100.0,
        MAX_BACKGROUND * 100.0
    );
    let spinners = options.spinners.then(Spinners::start).transpose()?;
    let mut record = begin(options, &systems, &workloads, others);
    let total = options.repeats * systems.len() * workloads.len();
    for repeat in 0..options.repeats {
        for workload in &workloads {
            for system in order(repeat, systems.len()).map(|at| &systems[at]) {
                let measurement = measure(system, workload.as_ref(), repeat, options.seconds);
                let number = record.measurements.len() + 1;
                let text = format!("[{number}/{total}] {}", line(workload.as_ref(), &measurement));
                record.measurements.push(measurement);
                on_measurement(&record, &text)?;
            }
        }
    }
    // Spinners are not load, and would leave no idle time to measure.
    drop(spinners);
    record.settings.background_after = background(WATCH)?.load();
    Ok(record)
}

/// The order in which systems take turns in a repeat. The one that is first in a repeat comes later
/// in the next, and every other repeat goes through them backwards, so that none always follows the
/// same one.
fn order(repeat: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |turn| {
        let at = (turn + repeat) % count;
        if repeat.is_multiple_of(2) { at } else { count - 1 - at }
    })
}

fn begin(options: &Options, systems: &[System], workloads: &[Box<dyn Workload>], others: Cpu) -> Record {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let system = |system: &System| SystemInfo {
        name: system.name.clone(),
        about: system.about.clone(),
        config: system.config.clone(),
    };
    Record {
        started: since.map_or(0, |since| since.as_secs()),
        machine: options.machine.clone(),
        settings: Settings {
            repeats: options.repeats,
            seconds: options.seconds,
            spinners: options.spinners,
            background: others.load(),
            background_steal: others.stolen(),
            background_after: 0.0,
        },
        systems: systems.iter().map(system).collect(),
        workloads: workloads.iter().map(|workload| note(workload.as_ref())).collect(),
        measurements: Vec::new(),
    }
}

fn note(workload: &dyn Workload) -> WorkloadInfo {
    WorkloadInfo { name: workload.name(), about: workload.about(), figures: workload.figures() }
}

/// One measurement. If a system and its baseline take turns, both are started first in one half of it each.
///
/// The kernel puts the code of BPF programs where it has room, and the functions of one program far apart where
/// that is in pieces: of two equal engines, the one that is started first can be two percent slower.
fn measure(system: &System, workload: &dyn Workload, repeat: usize, seconds: f64) -> Measurement {
    let measure = |order, seconds| measure_once(system, workload, (repeat, order), seconds);
    if !workload.takes_turns() {
        return measure(Order::SystemFirst, seconds);
    }
    let half = seconds / 2.0;
    measure(Order::SystemFirst, half).joined_with(measure(Order::BaselineFirst, half))
}

/// What is started first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    SystemFirst,
    BaselineFirst,
}

/// A measurement or half of one, from creating the testbed to removing it.
///
/// Each measurement has its own testbed: otherwise, connections of one system that the server still
/// remembers (TIME_WAIT) would meet those of the next under the same addresses with timestamps of
/// another clock, and would get a challenge ACK.
fn measure_once(
    system: &System,
    workload: &dyn Workload,
    (repeat, order): (usize, Order),
    seconds: f64,
) -> Measurement {
    let mut measurement = Measurement {
        repeat,
        workload: workload.name(),
        system: system.name.clone(),
        ..Measurement::default()
    };
    let (mut started, mut baseline) = match start(system, workload, order) {
        Ok(started) => started,
        Err(error) => return Measurement { failed: Some(format!("{error:#}")), ..measurement },
    };
    thread::sleep(SETTLE);
    let Started { running, testbed } = &mut started;
    let baseline = system.baseline.as_deref().zip(baseline.as_mut().map(|started| &mut started.testbed));
    let mut context = MeasurementContext { testbed, baseline, system, running: running.as_mut(), seconds };
    let measured = workload.measure(&mut context).and_then(|measured| Ok((measured, running.counters()?)));
    match measured {
        Ok((measured, counters)) => {
            Measurement { figures: measured.figures, cpu: measured.cpu, counters, ..measurement }
        }
        Err(error) => {
            measurement.failed = Some(format!("{error:#}{}", quote(&running.log())));
            measurement
        }
    }
}

/// A system in a testbed of its own, which is dropped after it.
struct Started {
    running: Box<dyn RunningSystem>,
    testbed: Testbed,
}

/// Starts a system, and its baseline if they take turns.
fn start(
    system: &System,
    workload: &dyn Workload,
    order: Order,
) -> anyhow::Result<(Started, Option<Started>)> {
    let start_system = || {
        let mut testbed = Testbed::new()?;
        workload.prepare(&mut testbed)?;
        Ok::<_, anyhow::Error>(Started { running: system.start(&testbed)?, testbed })
    };
    let start_baseline = || {
        let Some(baseline) = system.baseline.as_deref().filter(|_| workload.takes_turns()) else {
            return Ok(None);
        };
        let testbed = Testbed::second()?;
        Ok::<_, anyhow::Error>(Some(Started { running: baseline.start(&testbed)?, testbed }))
    };
    Ok(match order {
        Order::SystemFirst => (start_system()?, start_baseline()?),
        Order::BaselineFirst => {
            let baseline = start_baseline()?;
            (start_system()?, baseline)
        }
    })
}

/// The last lines of a system's log, set off.
fn quote(log: &str) -> String {
    const SHOWN: usize = 20;
    let lines: Vec<_> = log.lines().collect();
    let last = &lines[lines.len().saturating_sub(SHOWN)..];
    last.iter().map(|line| format!("\n  | {line}")).collect()
}

/// A measurement in one line.
fn line(workload: &dyn Workload, measurement: &Measurement) -> String {
    let mut text = format!("{:<24} {:<22}", measurement.workload, measurement.system);
    if let Some(why) = &measurement.failed {
        // Writing to a String cannot fail.
        let _ = write!(text, " FAILED: {}", why.lines().next().unwrap_or_default());
    }
    for figure in workload.figures() {
        if let Some(value) = measurement.figures.get(&figure.key) {
            let _ = write!(text, "  {} {}", report::digits(*value), figure.unit);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picked(wanted: &[&str]) -> anyhow::Result<Vec<&'static str>> {
        let wanted: Vec<_> = wanted.iter().map(|&word| word.to_owned()).collect();
        select_by_name(vec!["nat", "splice", "splice-never", "relay"], &wanted, |name| (*name).to_owned())
    }

    #[test]
    fn an_exact_name_wins_over_a_prefix() {
        assert_eq!(picked(&[]).unwrap().len(), 4);
        assert_eq!(picked(&["splice"]).unwrap(), ["splice"]);
        assert_eq!(picked(&["splice-", "nat"]).unwrap(), ["nat", "splice-never"]);
        assert!(picked(&["nginx"]).unwrap_err().to_string().contains("splice-never"));
    }

    #[test]
    fn every_system_has_its_turn_in_every_repeat() {
        for repeat in 0..10 {
            let mut turns: Vec<_> = order(repeat, 4).collect();
            turns.sort_unstable();
            assert_eq!(turns, [0, 1, 2, 3]);
        }
        assert_eq!(order(0, 3).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(order(1, 3).collect::<Vec<_>>(), [1, 0, 2]);
        assert_eq!(order(2, 3).collect::<Vec<_>>(), [2, 0, 1]);
        assert_eq!(order(0, 0).count(), 0);
    }

    #[test]
    fn peers_have_distinct_names() {
        let build = |series: &str| systems::Build {
            series: series.to_owned(),
            version: String::new(),
            command: vec!["haproxy".into()],
        };
        let programs = Programs {
            haproxies: vec![build("3.0"), build("2.6")],
            nginx: Some(("nginx".into(), "/usr/lib/nginx/modules".into())),
        };
        for comparison in [
            Comparison::Engines,
            Comparison::Enrolment,
            Comparison::Guard,
            Comparison::Flood { rate: 1000.0 },
        ] {
            let options = Options { programs: programs.clone(), comparison, ..Options::default() };
            let (systems, workloads) = select(&options).unwrap();
            let mut names: Vec<_> = systems.iter().map(|system| system.name.as_str()).collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count, "{comparison:?}");
            for name in [systems::DIRECT, systems::NAT, "haproxy-3.0-splice-2t", "nginx", "splice", "relay"] {
                assert!(names.contains(&name), "{comparison:?}: {name}");
            }
            let floods = workloads.iter().filter(|workload| workload.name() == "syn-flood-1000").count();
            assert_eq!(floods, usize::from(comparison == Comparison::Flood { rate: 1000.0 }));
        }
    }
}
