//! The figures of a run, summarised: medians, spread, and ratios to the references.

use crate::record::{Figure, Record};
use crate::stats::{self, Estimate, Spread};
use crate::systems::{DIRECT, HAPROXY, NAT};

/// The section of one workload.
#[derive(Clone, Debug)]
pub struct Section {
    /// Name of the workload.
    pub workload: String,
    /// What it is.
    pub about: String,
    /// What was measured.
    pub figures: Vec<Figure>,
    /// The HAProxy whose median of the first figure is best; `None` if none was measured.
    pub haproxy: Option<String>,
    /// One row for each system, in their order.
    pub rows: Vec<Row>,
}

/// The row of one system.
#[derive(Clone, Debug)]
pub struct Row {
    /// Name of the system.
    pub system: String,
    /// One for each figure; `None` where there is no measurement.
    pub cells: Vec<Option<Cell>>,
    /// The first figure as a ratio to that of the best HAProxy, within each repeat.
    pub to_haproxy: Option<Spread>,
    /// The same to kernel NAT alone.
    pub to_nat: Option<Spread>,
    /// The same to the direct route.
    pub to_direct: Option<Spread>,
    /// What this system adds to kernel NAT in processor time, as a share of what the best HAProxy
    /// adds.
    pub cpu_share: Option<f64>,
    /// The largest share of the machine's time that was stolen in any of its measurements.
    pub steal: f64,
    /// Measurements that failed.
    pub failures: usize,
}

/// One figure of one system.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    /// As measured.
    pub value: Spread,
    /// The difference to the direct route within each repeat, where it was measured and makes
    /// sense.
    pub above_direct: Option<Spread>,
    /// The same values as an estimate, where the figure is a change.
    pub estimate: Option<Estimate>,
}

/// Summarises a run.
#[must_use]
pub fn sections(record: &Record) -> Vec<Section> {
    record
        .workloads
        .iter()
        .map(|workload| section(record, &workload.name, &workload.about, &workload.figures))
        .collect()
}

fn section(record: &Record, workload: &str, about: &str, figures: &[Figure]) -> Section {
    let haproxy = best_haproxy(record, workload, figures.first());
    let rows =
        record.systems.iter().map(|system| row(record, workload, &system.name, figures, haproxy.as_deref()));
    Section {
        workload: workload.to_owned(),
        about: about.to_owned(),
        figures: figures.to_vec(),
        rows: rows.collect(),
        haproxy,
    }
}

/// The HAProxy configuration that is best with this workload.
fn best_haproxy(record: &Record, workload: &str, figure: Option<&Figure>) -> Option<String> {
    let figure = figure?;
    let median = |system: &str| {
        let values: Vec<_> =
            record.samples(workload, system, &figure.key).iter().map(|sample| sample.1).collect();
        Spread::of(&values).map(|spread| spread.median)
    };
    let haproxies =
        record.systems.iter().map(|system| system.name.as_str()).filter(|name| name.starts_with(HAPROXY));
    let measured = haproxies.filter_map(|name| Some((name, median(name)?)));
    let sign = if figure.more_is_better { 1.0 } else { -1.0 };
    let best = measured.max_by(|left, right| (sign * left.1).total_cmp(&(sign * right.1)));
    best.map(|(name, _)| name.to_owned())
}

fn row(record: &Record, workload: &str, system: &str, figures: &[Figure], haproxy: Option<&str>) -> Row {
    let first = figures.first().map(|figure| figure.key.as_str()).unwrap_or_default();
    let ours = record.samples(workload, system, first);
    let to = |reference: &str| stats::ratio(&ours, &record.samples(workload, reference, first));
    let measurements =
        || record.measurements.iter().filter(|it| it.workload == workload && it.system == system);
    let steal = measurements().map(|it| it.cpu.stolen()).fold(0.0, f64::max);
    Row {
        system: system.to_owned(),
        cells: figures.iter().map(|figure| cell(record, workload, system, figure)).collect(),
        to_haproxy: haproxy.and_then(to),
        to_nat: to(NAT),
        to_direct: to(DIRECT),
        cpu_share: haproxy.and_then(|haproxy| cpu_share(record, workload, system, haproxy)),
        steal,
        failures: measurements().filter(|it| it.failed.is_some()).count(),
    }
}

fn cell(record: &Record, workload: &str, system: &str, figure: &Figure) -> Option<Cell> {
    let samples = record.samples(workload, system, &figure.key);
    let values: Vec<_> = samples.iter().map(|sample| sample.1).collect();
    let direct = || stats::above(&samples, &record.samples(workload, DIRECT, &figure.key));
    let above_direct = if figure.above_direct && system != DIRECT { direct() } else { None };
    let estimate = figure.change.then(|| Estimate::of(&values)).flatten();
    Spread::of(&values).map(|value| Cell { value, above_direct, estimate })
}

/// `(system - nat) / (haproxy - nat)` of the machine's time, as medians; `None` for the references
/// themselves, and where HAProxy adds nothing.
fn cpu_share(record: &Record, workload: &str, system: &str, haproxy: &str) -> Option<f64> {
    if [DIRECT, NAT].contains(&system) {
        return None;
    }
    let samples = |system| record.samples(workload, system, "cpu");
    let nat = samples(NAT);
    let ours = stats::above(&samples(system), &nat)?.median;
    let theirs = stats::above(&samples(haproxy), &nat)?.median;
    (theirs > 0.0).then(|| ours / theirs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Measurement, SystemInfo, WorkloadInfo};

    fn figure(key: &str, more_is_better: bool) -> Figure {
        Figure {
            key: key.into(),
            unit: "u".into(),
            more_is_better,
            above_direct: key == "cpu",
            change: false,
        }
    }

    /// Two repeats of `system: (rate, cpu)`; in the second the machine is half as fast.
    fn record(systems: &[(&str, f64, f64)], more_is_better: bool) -> Record {
        let mut record = Record {
            workloads: vec![WorkloadInfo {
                name: "w".into(),
                about: String::new(),
                figures: vec![figure("rate", more_is_better), figure("cpu", false)],
            }],
            ..Record::default()
        };
        for (name, rate, cpu) in systems {
            record.systems.push(SystemInfo { name: (*name).into(), ..SystemInfo::default() });
            for (repeat, speed) in [(0, 1.0), (1, 0.5)] {
                record.measurements.push(Measurement {
                    repeat,
                    workload: "w".into(),
                    system: (*name).into(),
                    figures: [("rate".into(), rate * speed), ("cpu".into(), *cpu)].into(),
                    ..Measurement::default()
                });
            }
        }
        record
    }

    #[test]
    fn ratios_are_to_the_best_haproxy() {
        let systems = [
            ("direct", 12.0, 1.0),
            ("nat", 10.0, 2.0),
            ("haproxy-a", 4.0, 7.0),
            ("haproxy-b", 5.0, 6.0),
            ("ours", 7.5, 3.0),
        ];
        let sections = sections(&record(&systems, true));
        let section = &sections[0];
        assert_eq!(section.haproxy.as_deref(), Some("haproxy-b"));
        let ours = section.rows.last().unwrap();
        assert!((ours.to_haproxy.unwrap().median - 1.5).abs() < 1e-9);
        assert!((ours.to_nat.unwrap().min - 0.75).abs() < 1e-9);
        assert!((ours.to_direct.unwrap().max - 0.625).abs() < 1e-9);
        assert!((ours.cpu_share.unwrap() - 0.25).abs() < 1e-9, "adds 1 where HAProxy adds 4");
        let above = ours.cells[1].unwrap().above_direct.unwrap();
        assert!((above.median - 2.0).abs() < 1e-9);
        assert!(ours.cells[0].unwrap().above_direct.is_none());
        assert!(section.rows[0].cpu_share.is_none() && section.rows[1].cpu_share.is_none());
    }

    #[test]
    fn where_less_is_better_the_best_haproxy_has_the_least() {
        let record = record(&[("haproxy-a", 4.0, 1.0), ("haproxy-b", 5.0, 1.0)], false);
        assert_eq!(sections(&record)[0].haproxy.as_deref(), Some("haproxy-a"));
    }

    #[test]
    fn a_failed_measurement_is_counted_and_has_no_figures() {
        let mut record = record(&[("ours", 4.0, 1.0)], true);
        record.measurements[1].failed = Some("no header".into());
        record.measurements[1].figures.clear();
        let section = &sections(&record)[0];
        assert_eq!(section.rows[0].failures, 1);
        assert!(section.haproxy.is_none() && section.rows[0].to_haproxy.is_none());
        assert!((section.rows[0].cells[0].unwrap().value.median - 4.0).abs() < 1e-9);
    }
}
