//! Memory and processor time of the injector's pods.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{RECOVERY, Testbed, Trial, trial};
use crate::cluster::{
    client::{self, Load},
    deploy::Edge,
    mail, network,
    node::Machine,
    plan::{Node, VIP},
    wait::pause,
};

/// How long each state is measured.
const PERIOD: Duration = Duration::from_secs(15);

/// Short sessions in a second.
const RATE: u32 = 100;

/// Ticks of the kernel's accounts in a second (USER_HZ, 100 on all processors that Linux runs on
/// today).
const TICKS: u64 = 100;

pub(super) fn trials() -> Vec<Trial> {
    [Edge::SPLICE, Edge::INLINE].map(|edge| trial(format!("usage/{}", edge.engine), edge, usage)).into()
}

fn usage(testbed: &Testbed<'_>) -> Result<String> {
    network::announce(Node::Edge1)?;
    mail::place(testbed.cluster, Node::Worker)?;
    client::wait_served(VIP, RECOVERY)?;
    let machine = testbed.cluster.machine(Node::Edge1);
    let idle = measure(machine)?;
    let load = Load::start(VIP, RATE, 0, PERIOD)?;
    let busy = measure(machine);
    let report = load.finish();
    ensure!(report.failures.is_empty(), "{report}");
    Ok(format!("idle {idle}; with {:.0} sessions/s {}", report.served as f32 / PERIOD.as_secs_f32(), busy?))
}

fn measure(machine: &Machine) -> Result<String> {
    let pids = machine.run(&["pgrep", "-f", "-x", "injector run"])?;
    let pid = pids.split_whitespace().next().context("no injector runs")?.to_owned();
    let read = |file: &str| machine.run(&["cat", &format!("/proc/{pid}/{file}")]);
    let before = ticks(&read("stat")?).context("/proc/PID/stat")?;
    pause(PERIOD)?;
    let after = ticks(&read("stat")?).context("/proc/PID/stat")?;
    let resident = resident_kib(&read("status")?).context("no VmRSS")?;
    let percent = (after - before) as f32 * 100.0 / TICKS as f32 / PERIOD.as_secs_f32();
    Ok(format!("{} MiB, {percent:.1} % of a processor", resident / 1024))
}

/// User and system time in a line of /proc/PID/stat (proc_pid_stat(5), fields 14 and 15).
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

fn resident_kib(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_and_memory_are_read() {
        let stat = "7 (a (b) c) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 3 0 1 1 1";
        assert_eq!(ticks(stat), Some(200));
        assert_eq!(resident_kib("Name:\ta\nVmRSS:\t  20480 kB\n"), Some(20480));
        assert_eq!((ticks("7 (a"), resident_kib("")), (None, None));
    }
}
