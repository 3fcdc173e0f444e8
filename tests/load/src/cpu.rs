//! Processor time of the whole machine, from `/proc/stat`.
//!
//! The processes' own times are not enough: the kernel forwards packets in softirqs and kworkers,
//! which are charged to the interrupted process or to none. So the whole machine is counted, and
//! the direct route's share is subtracted later.
//!
//! Busy time is elapsed time minus idle, stolen and low-priority time. The kernel measures idle
//! time to the microsecond (`get_idle_time` in `fs/proc/stat.c`, on tickless kernels). Most kernels
//! only sample user, system and interrupt time at each tick: activity that is in step with the
//! ticks is seen always or never. A loop at 4,000 sessions a second was off thirtyfold that way.
//! These columns are kept to show where time went.

use std::fs;
use std::ops::{Add, Sub};
use std::time::Duration;

use anyhow::Context as _;
use rustix::time::{ClockId, clock_gettime};

/// Clock ticks a second in `/proc/stat` (USER_HZ, 100 on every architecture Rust runs on).
const TICKS: f64 = 100.0;

/// Seconds of all processors together, since boot or between two readings.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Cpu {
    /// By the clock.
    pub elapsed: f64,
    /// In user space, at ordinary priority.
    pub user: f64,
    /// In user space at low priority (`nice`): the spinners that keep processors from idle states
    /// run there, so it is not busy time.
    pub nice: f64,
    /// In the kernel for a process.
    pub system: f64,
    /// In interrupts and softirqs.
    pub interrupts: f64,
    /// Nothing to do, or waiting for disks.
    pub idle: f64,
    /// Taken by other guests of the hypervisor.
    pub steal: f64,
}

impl Cpu {
    /// # Errors
    /// When `/proc/stat` is not in the format of `proc_stat(5)`.
    pub fn now() -> anyhow::Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let clock = Duration::try_from(clock_gettime(ClockId::Boottime)).context("no clock")?;
        Self::parse(&text, clock.as_secs_f64())
            .context("/proc/stat does not begin with the processors' times")
    }

    fn parse(text: &str, clock: f64) -> Option<Self> {
        let each = |line: &&str| {
            line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|it: char| it.is_ascii_digit()))
        };
        let processors = u32::try_from(text.lines().filter(each).count()).ok()?;
        let numbers = text.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
        let ticks: Vec<f64> = numbers.map(|number| number.parse().ok()).collect::<Option<_>>()?;
        // Guest time is part of user time already.
        let [user, nice, system, idle, waiting, hard, soft, steal] = ticks.get(..8)?.try_into().ok()?;
        Some(Self {
            elapsed: clock * f64::from(processors),
            user: user / TICKS,
            nice: nice / TICKS,
            system: system / TICKS,
            interrupts: (hard + soft) / TICKS,
            idle: (idle + waiting) / TICKS,
            steal: steal / TICKS,
        })
    }

    /// Seconds of work.
    #[must_use]
    pub fn busy(&self) -> f64 {
        (self.elapsed - self.idle - self.steal - self.nice).max(0.0)
    }

    /// The share of all time that was work, 0 to 1.
    #[must_use]
    pub fn load(&self) -> f64 {
        self.share(self.busy())
    }

    /// The share of all time that was stolen, 0 to 1.
    #[must_use]
    pub fn stolen(&self) -> f64 {
        self.share(self.steal)
    }

    fn share(&self, part: f64) -> f64 {
        if self.elapsed > 0.0 { part / self.elapsed } else { 0.0 }
    }
}

impl Add for Cpu {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            elapsed: self.elapsed + other.elapsed,
            user: self.user + other.user,
            nice: self.nice + other.nice,
            system: self.system + other.system,
            interrupts: self.interrupts + other.interrupts,
            idle: self.idle + other.idle,
            steal: self.steal + other.steal,
        }
    }
}

impl Sub for Cpu {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            elapsed: self.elapsed - earlier.elapsed,
            user: self.user - earlier.user,
            nice: self.nice - earlier.nice,
            system: self.system - earlier.system,
            interrupts: self.interrupts - earlier.interrupts,
            idle: self.idle - earlier.idle,
            steal: self.steal - earlier.steal,
        }
    }
}

/// What the machine does for so long without us.
///
/// # Errors
/// As [`Cpu::now`].
pub fn background(duration: Duration) -> anyhow::Result<Cpu> {
    let before = Cpu::now()?;
    std::thread::sleep(duration);
    Ok(Cpu::now()? - before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_priority_idle_and_stolen_time_are_no_work() {
        let before = Cpu::parse("cpu  100 0 100 1000 0 0 0 0 0 0\ncpu0 …\ncpu1 …\n", 10.0).unwrap();
        let after = Cpu::parse("cpu  110 400 130 1100 20 5 15 80 30 0\ncpu0 …\ncpu1 …\n", 13.5).unwrap();
        let spent = after - before;
        assert!((spent.elapsed - 7.0).abs() < 1e-9, "{spent:?}");
        assert!((spent.busy() - 1.0).abs() < 1e-9, "whatever the ticks saw: {spent:?}");
        assert!((spent.load() - 1.0 / 7.0).abs() < 1e-9);
        assert!((spent.stolen() - 0.8 / 7.0).abs() < 1e-9);
        assert_eq!(Cpu::parse("intr 1 2", 1.0), None);
    }

    #[test]
    fn a_loop_is_work_and_sleep_is_none() {
        let begun = std::time::Instant::now();
        let before = Cpu::now().unwrap();
        while begun.elapsed() < Duration::from_millis(200) {}
        let spent = Cpu::now().unwrap() - before;
        // Others may use the rest of the machine.
        assert!(spent.busy() > 0.1 && spent.load() > 0.0 && spent.load() <= 1.01, "{spent:?}");
        assert!(background(Duration::from_millis(50)).unwrap().elapsed > 0.04);
    }
}
