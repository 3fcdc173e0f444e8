//! The figures of a run, condensed: medians, spread, and ratios to the references.

use crate::peers::{DIRECT, HAPROXY, NAT};
use crate::record::{Figure, Record};
use crate::stats::{self, Spread};

/// A work's share of the report.
#[derive(Clone, Debug)]
pub struct Section {
    /// Name of the work.
    pub work: String,
    /// What it is.
    pub about: String,
    /// What was measured.
    pub figures: Vec<Figure>,
    /// The HAProxy whose median of the first figure is best; `None` if none was measured.
    pub haproxy: Option<String>,
    /// One for each peer, in their order.
    pub rows: Vec<Row>,
}

/// A peer's line.
#[derive(Clone, Debug)]
pub struct Row {
    /// Name of the peer.
    pub peer: String,
    /// One for each figure; `None` where there is no measurement.
    pub cells: Vec<Option<Cell>>,
    /// The first figure as a ratio to that of the best HAProxy, within each repeat.
    pub to_haproxy: Option<Spread>,
    /// The same to kernel NAT alone.
    pub to_nat: Option<Spread>,
    /// What this peer adds to kernel NAT in the figure of the machine's time, as a share of what the best HAProxy adds.
    pub cpu_share: Option<f64>,
    /// The greatest share of the machine's time that was stolen in any of its measurements.
    pub steal: f64,
    /// Measurements that failed.
    pub failures: usize,
}

/// One figure of one peer.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    /// As measured.
    pub value: Spread,
    /// Above the direct route, within each repeat, where that makes sense and was measured.
    pub above_direct: Option<Spread>,
}

/// Condenses a run.
#[must_use]
pub fn sections(record: &Record) -> Vec<Section> {
    record.works.iter().map(|work| section(record, &work.name, &work.about, &work.figures)).collect()
}

fn section(record: &Record, work: &str, about: &str, figures: &[Figure]) -> Section {
    let haproxy = best_haproxy(record, work, figures.first());
    let rows = record.peers.iter().map(|peer| row(record, work, &peer.name, figures, haproxy.as_deref()));
    Section {
        work: work.to_owned(),
        about: about.to_owned(),
        figures: figures.to_vec(),
        rows: rows.collect(),
        haproxy,
    }
}

/// The HAProxy configuration that is best at this work.
fn best_haproxy(record: &Record, work: &str, figure: Option<&Figure>) -> Option<String> {
    let figure = figure?;
    let median = |peer: &str| {
        let values: Vec<_> = record.samples(work, peer, &figure.key).iter().map(|sample| sample.1).collect();
        Spread::of(&values).map(|spread| spread.median)
    };
    let haproxies =
        record.peers.iter().map(|peer| peer.name.as_str()).filter(|name| name.starts_with(HAPROXY));
    let measured = haproxies.filter_map(|name| Some((name, median(name)?)));
    let sign = if figure.more_is_better { 1.0 } else { -1.0 };
    let best = measured.max_by(|left, right| (sign * left.1).total_cmp(&(sign * right.1)));
    best.map(|(name, _)| name.to_owned())
}

fn row(record: &Record, work: &str, peer: &str, figures: &[Figure], haproxy: Option<&str>) -> Row {
    let first = figures.first().map(|figure| figure.key.as_str()).unwrap_or_default();
    let ours = record.samples(work, peer, first);
    let to = |reference: &str| stats::ratio(&ours, &record.samples(work, reference, first));
    let measurements = || record.measurements.iter().filter(|it| it.work == work && it.peer == peer);
    let steal = measurements().map(|it| it.cpu.stolen()).fold(0.0, f64::max);
    Row {
        peer: peer.to_owned(),
        cells: figures.iter().map(|figure| cell(record, work, peer, figure)).collect(),
        to_haproxy: haproxy.and_then(to),
        to_nat: to(NAT),
        cpu_share: haproxy.and_then(|haproxy| cpu_share(record, work, peer, haproxy)),
        steal,
        failures: measurements().filter(|it| it.failed.is_some()).count(),
    }
}

fn cell(record: &Record, work: &str, peer: &str, figure: &Figure) -> Option<Cell> {
    let samples = record.samples(work, peer, &figure.key);
    let values: Vec<_> = samples.iter().map(|sample| sample.1).collect();
    let direct = || stats::above(&samples, &record.samples(work, DIRECT, &figure.key));
    let above_direct = if figure.above_direct && peer != DIRECT { direct() } else { None };
    Spread::of(&values).map(|value| Cell { value, above_direct })
}

/// `(peer - nat) / (haproxy - nat)` of the machine's time, as medians; `None` for the references themselves, and where
/// HAProxy does not add anything.
fn cpu_share(record: &Record, work: &str, peer: &str, haproxy: &str) -> Option<f64> {
    if [DIRECT, NAT].contains(&peer) {
        return None;
    }
    let samples = |peer| record.samples(work, peer, "cpu");
    let nat = samples(NAT);
    let ours = stats::above(&samples(peer), &nat)?.median;
    let theirs = stats::above(&samples(haproxy), &nat)?.median;
    (theirs > 0.0).then(|| ours / theirs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Measurement, PeerNote, WorkNote};

    fn figure(key: &str, more_is_better: bool) -> Figure {
        Figure { key: key.into(), unit: "u".into(), more_is_better, above_direct: key == "cpu" }
    }

    /// Two repeats of `peer: (rate, cpu)`; in the second the machine is half as fast.
    fn record(peers: &[(&str, f64, f64)], more_is_better: bool) -> Record {
        let mut record = Record {
            works: vec![WorkNote {
                name: "w".into(),
                about: String::new(),
                figures: vec![figure("rate", more_is_better), figure("cpu", false)],
            }],
            ..Record::default()
        };
        for (name, rate, cpu) in peers {
            record.peers.push(PeerNote { name: (*name).into(), ..PeerNote::default() });
            for (repeat, speed) in [(0, 1.0), (1, 0.5)] {
                record.measurements.push(Measurement {
                    repeat,
                    work: "w".into(),
                    peer: (*name).into(),
                    figures: [("rate".into(), rate * speed), ("cpu".into(), *cpu)].into(),
                    ..Measurement::default()
                });
            }
        }
        record
    }

    #[test]
    fn ratios_are_to_the_best_haproxy() {
        let peers = [
            ("direct", 12.0, 1.0),
            ("nat", 10.0, 2.0),
            ("haproxy-a", 4.0, 7.0),
            ("haproxy-b", 5.0, 6.0),
            ("ours", 7.5, 3.0),
        ];
        let sections = sections(&record(&peers, true));
        let section = &sections[0];
        assert_eq!(section.haproxy.as_deref(), Some("haproxy-b"));
        let ours = section.rows.last().unwrap();
        assert!((ours.to_haproxy.unwrap().median - 1.5).abs() < 1e-9);
        assert!((ours.to_nat.unwrap().least - 0.75).abs() < 1e-9);
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
