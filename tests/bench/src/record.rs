//! All that a run found out, as it is written to JSON and read back by the reports.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use injector_load::cpu::Cpu;

use super::stats::Sample;

/// One run.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Record {
    /// Seconds since 1970 at which it began.
    pub begun: u64,
    /// What it ran on.
    pub machine: Machine,
    /// How it was asked to run.
    pub settings: Settings,
    /// Those that were compared, in the order of the reports.
    pub peers: Vec<PeerNote>,
    /// What they had to do, in the same order.
    pub works: Vec<WorkNote>,
    /// One for each repeat, work and peer.
    pub measurements: Vec<Measurement>,
}

/// The machine and its versions.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Machine {
    /// Model of the processors.
    pub processor: String,
    /// How many there are.
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

/// How it was asked to run.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Settings {
    /// Times everything was measured.
    pub repeats: usize,
    /// Length of a measurement.
    pub seconds: f64,
    /// Whether low-priority spinners kept the processors awake.
    pub spinners: bool,
    /// Whether a busy machine was accepted.
    pub noisy: bool,
    /// Share of the processors' time that others used before the run, 0 to 1.
    pub background: f64,
    /// The same after the run: a machine that was quiet at first may not have stayed so.
    pub background_after: f64,
    /// Share of it that the hypervisor took before the run, 0 to 1.
    pub background_steal: f64,
}

/// A peer in the report.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct PeerNote {
    /// Its name.
    pub name: String,
    /// What it is.
    pub about: String,
    /// Its configuration.
    pub config: String,
}

/// A work in the report.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct WorkNote {
    /// Its name.
    pub name: String,
    /// What it is.
    pub about: String,
    /// What is measured; the first is what ratios and charts are made of.
    pub figures: Vec<Figure>,
}

/// One thing that is measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Figure {
    /// Its name within the work.
    pub key: String,
    /// Its unit.
    pub unit: String,
    /// Whether more of it is better.
    pub more_is_better: bool,
    /// Whether the direct route has a share in it that is to be subtracted.
    pub above_direct: bool,
}

/// What one peer did in one repeat of one work.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Measurement {
    /// Counts from 0.
    pub repeat: usize,
    /// Name of the work.
    pub work: String,
    /// Name of the peer.
    pub peer: String,
    /// By key.
    pub figures: BTreeMap<String, f64>,
    /// What the whole machine spent meanwhile.
    pub cpu: Cpu,
    /// What the peer counted itself.
    pub proof: BTreeMap<String, f64>,
    /// Why there are no figures.
    pub failed: Option<String>,
}

impl Record {
    /// A figure of a peer, in every repeat that has it.
    #[must_use]
    pub fn samples(&self, work: &str, peer: &str, key: &str) -> Vec<Sample> {
        let ours = self.measurements.iter().filter(|it| it.work == work && it.peer == peer);
        ours.filter_map(|it| it.figures.get(key).map(|value| (it.repeat, *value))).collect()
    }

    /// Measurements that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Measurement> {
        self.measurements.iter().filter(|it| it.failed.is_some())
    }
}

impl Machine {
    /// This one; what cannot be found out stays empty. `injector` and `rustc` are the caller's to fill in.
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
