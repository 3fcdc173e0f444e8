//! All results of a run, as they are written to JSON and read back by the reports.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use injector_load::cpu::Cpu;

use super::stats::Sample;

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
    /// Whether a busy machine was accepted.
    pub noisy: bool,
    /// Share of the processors' time that others used before the run, 0 to 1.
    pub background: f64,
    /// The same after the run: a machine that was quiet at first may have become busy.
    pub background_after: f64,
    /// The part of it that the hypervisor took before the run, 0 to 1.
    pub background_steal: f64,
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
