//! All results of a run, as they are written to JSON and read back by the reports.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use injector_load::cpu::Cpu;

use super::stats::Sample;

/// The share of the machine that others may use before a run.
pub const MAX_BACKGROUND: f64 = 0.05;

/// One run.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Record {
    /// Seconds since 1970 at which it began.
    pub started: u64,
    /// The machine it ran on.
    pub machine: Machine,
    /// Its options.
    pub settings: Settings,
    /// The systems that were compared, in the order of the reports.
    pub systems: Vec<SystemInfo>,
    /// The workloads, in the same order.
    pub workloads: Vec<WorkloadInfo>,
    /// One for each repeat, workload and system.
    pub measurements: Vec<Measurement>,
}

/// The machine and its versions.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Machine {
    /// Model of the processors.
    pub processor: String,
    /// Number of processors.
    pub processors: usize,
    /// `MemTotal`, in KiB.
    pub memory_kib: u64,
    /// `uname -r`.
    pub kernel: String,
    /// `PRETTY_NAME` of `/etc/os-release`.
    pub system: String,
    /// `injector --version`, and the commit it was built from.
    pub injector: String,
    /// The rustc that built it.
    pub rustc: String,
}

/// The options of a run.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Settings {
    /// Number of repeats.
    pub repeats: usize,
    /// Length of a measurement, in seconds.
    pub seconds: f64,
    /// Whether low-priority spinners kept the processors awake.
    pub spinners: bool,
    /// Share of the processors' time that others used before the run, 0 to 1.
    pub background: f64,
    /// The same after the run: a machine that was quiet at first may have become busy.
    pub background_after: f64,
    /// The part of it that the hypervisor took before the run, 0 to 1.
    pub background_steal: f64,
}

impl Settings {
    /// Whether others used more of the machine before the run than is good for figures.
    #[must_use]
    pub fn was_busy(&self) -> bool {
        self.background > MAX_BACKGROUND
    }
}

/// A system in the report.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct SystemInfo {
    /// Its name.
    pub name: String,
    /// What it is.
    pub about: String,
    /// Its configuration.
    pub config: String,
}

/// A workload in the report.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct WorkloadInfo {
    /// Its name.
    pub name: String,
    /// What it is.
    pub about: String,
    /// What is measured; ratios and charts use the first.
    pub figures: Vec<Figure>,
}

/// One measured quantity.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Figure {
    /// Its name within the workload.
    pub key: String,
    /// Its unit.
    pub unit: String,
    /// Whether larger is better.
    pub more_is_better: bool,
    /// Whether the direct route's share is to be subtracted.
    pub above_direct: bool,
    /// Whether it is a change in percent, to be reported with its interval.
    #[serde(default)]
    pub change: bool,
}

/// The result of one system in one repeat of one workload.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Measurement {
    /// Counted from 0.
    pub repeat: usize,
    /// Name of the workload.
    pub workload: String,
    /// Name of the system.
    pub system: String,
    /// By key.
    pub figures: BTreeMap<String, f64>,
    /// Processor time of the whole machine meanwhile.
    pub cpu: Cpu,
    /// What the system counted itself.
    pub counters: BTreeMap<String, f64>,
    /// Why there are no figures.
    pub failed: Option<String>,
}

impl Measurement {
    /// One measurement of two that are equally long: the means of their figures.
    #[must_use]
    pub(crate) fn joined_with(mut self, other: Self) -> Self {
        for (key, value) in &mut self.figures {
            *value = f64::midpoint(*value, other.figures.get(key).copied().unwrap_or(f64::NAN));
        }
        for (key, value) in other.counters {
            *self.counters.entry(key).or_default() += value;
        }
        self.cpu = self.cpu + other.cpu;
        self.failed = self.failed.or(other.failed);
        if self.failed.is_some() {
            self.figures.clear();
        }
        self
    }
}

impl Record {
    /// A figure of a system, in every repeat that has it.
    #[must_use]
    pub fn samples(&self, workload: &str, system: &str, key: &str) -> Vec<Sample> {
        let ours = self.measurements.iter().filter(|it| it.workload == workload && it.system == system);
        ours.filter_map(|it| it.figures.get(key).map(|value| (it.repeat, *value))).collect()
    }

    /// Measurements that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Measurement> {
        self.measurements.iter().filter(|it| it.failed.is_some())
    }
}

impl Machine {
    /// This machine; what cannot be determined stays empty. The caller fills in `injector` and
    /// `rustc`.
    #[must_use]
    pub fn here() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let after = |text: &str, name: &str, separator: char| {
            let line = text.lines().find(|line| line.starts_with(name));
            let value = line.and_then(|line| line.split_once(separator)).map(|(_, value)| value.trim());
            value.unwrap_or_default().trim_matches('"').to_owned()
        };
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let memory = after(&meminfo, "MemTotal", ':');
        Self {
            processor: after(&cpuinfo, "model name", ':'),
            processors: std::thread::available_parallelism().map_or(0, usize::from),
            memory_kib: memory.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or_default(),
            kernel: kernel.trim().to_owned(),
            system: after(&release, "PRETTY_NAME", '='),
            ..Self::default()
        }
    }
}

/// The first line that a program prints.
#[must_use]
pub fn first_line(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().next().map(str::trim).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn half(rate: f64, cpu: Cpu) -> Measurement {
        let of = |key: &str, value| BTreeMap::from([(key.to_owned(), value)]);
        Measurement { figures: of("rate", rate), counters: of("sent", rate), cpu, ..Measurement::default() }
    }

    #[test]
    fn two_halves_are_one_measurement() {
        let cpu = Cpu { elapsed: 2.0, steal: 1.0, ..Cpu::default() };
        let joined = half(10.0, cpu).joined_with(half(20.0, cpu));
        assert_eq!((joined.figures["rate"], joined.counters["sent"]), (15.0, 30.0));
        assert_eq!((joined.cpu.elapsed, joined.cpu.stolen()), (4.0, 0.5));
    }

    #[test]
    fn a_measurement_of_which_a_half_failed_has_no_figures() {
        let failed = || Measurement { failed: Some("why".to_owned()), ..Measurement::default() };
        let good = || half(10.0, Cpu::default());
        for joined in [good().joined_with(failed()), failed().joined_with(good())] {
            assert_eq!(joined.failed.as_deref(), Some("why"));
            assert!(joined.figures.is_empty());
        }
    }
}
