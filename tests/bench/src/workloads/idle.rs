//! Thousands of idle connections: the memory that they take, and the time to close them.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use injector_load::job::{Job, Load};
use injector_load::service::ECHO;

use super::{Measured, MeasurementContext, Workload, figure, measured};
use crate::load_process::LoadClient;
use crate::record::Figure;
use injector_testbed::netns::Netns;

/// How long memory may settle before it is read.
const SETTLE: Duration = Duration::from_millis(700);

/// How long closing all connections may take.
const CLOSE_LIMIT: Duration = Duration::from_secs(60);

struct Idle {
    connections: usize,
}

pub(super) fn all() -> impl Iterator<Item = Box<dyn Workload>> {
    [1000, 5000, 9000].into_iter().map(|connections| Box::new(Idle { connections }) as Box<dyn Workload>)
}

impl Workload for Idle {
    fn name(&self) -> String {
        format!("idle-{}", self.connections)
    }

    fn about(&self) -> String {
        format!(
            "{} connections that have made one round trip. User space is the proportional set size of the system's \
             processes, the kernel's share is slab, kernel stacks, page tables, per-CPU memory and socket buffers of \
             the whole machine, both above what was there before the first connection",
            self.connections
        )
    }

    fn figures(&self) -> Vec<Figure> {
        vec![
            figure("user", "KiB/connection, user space", false, false),
            figure("kernel", "KiB/connection, kernel", false, true),
            figure("close", "ms to close all", false, false),
        ]
    }

    fn measure(&self, context: &mut MeasurementContext<'_>) -> anyhow::Result<Measured> {
        let (job, pids) = (self.job(context), context.running.pids());
        context.testbed.server.take_counts()?;
        let sockets = sockets(context)?;
        thread::sleep(SETTLE);
        let before = Memory::now(&pids)?;
        let mut client = LoadClient::start(&context.testbed.topology.client, &job)?;
        client.wait_open()?;
        thread::sleep(SETTLE);
        let after = Memory::now(&pids)?;
        let begun = Instant::now();
        client.close()?;
        wait_closed(context, sockets)?;
        let close = begun.elapsed();
        let outcome = client.outcome()?;
        context.counts(&outcome)?;
        ensure!(outcome.sessions == self.connections as u64, "only {} were open", outcome.sessions);
        #[expect(clippy::cast_precision_loss, reason = "thousands")]
        let each = |after: f64, before: f64| (after - before) / self.connections as f64;
        Ok(measured(
            outcome.cpu,
            [
                ("user", each(after.user, before.user)),
                ("kernel", each(after.kernel, before.kernel)),
                ("close", close.as_secs_f64() * 1000.0),
            ],
        ))
    }
}

impl Idle {
    fn job(&self, context: &MeasurementContext<'_>) -> Job {
        let load = Load::Idle { connections: self.connections };
        // Opening takes an unknown time: this only sets the client's limit.
        Job { target: context.system.target(&ECHO), load, seconds: 60.0 }
    }
}

/// TCP sockets on the edge and the mail host, without listening ones and those in TIME_WAIT.
fn sockets(context: &MeasurementContext<'_>) -> anyhow::Result<u64> {
    Ok(in_use(&context.testbed.topology.edge)? + in_use(&context.testbed.topology.mail)?)
}

fn in_use(netns: &Netns) -> anyhow::Result<u64> {
    let text = netns.run(|| fs::read_to_string("/proc/thread-self/net/sockstat"))??;
    tcp(&text, "inuse").context("sockstat has no TCP sockets")
}

/// A number of the line `TCP: inuse 5 orphan 0 tw 2 alloc 7 mem 1`.
fn tcp(sockstat: &str, name: &str) -> Option<u64> {
    let line = sockstat.lines().find_map(|line| line.strip_prefix("TCP:"))?;
    let mut words = line.split_whitespace();
    words.find(|word| *word == name)?;
    words.next()?.parse().ok()
}

fn wait_closed(context: &MeasurementContext<'_>, before: u64) -> anyhow::Result<()> {
    let deadline = Instant::now() + CLOSE_LIMIT;
    loop {
        let left = sockets(context)?;
        if left <= before {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{} sockets are still open", left - before);
        thread::sleep(Duration::from_millis(1));
    }
}

/// Memory in use, in KiB.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Memory {
    user: f64,
    kernel: f64,
}

impl Memory {
    fn now(pids: &[u32]) -> anyhow::Result<Self> {
        let mut user = 0.0;
        for pid in pids {
            let path = format!("/proc/{pid}/smaps_rollup");
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            user += kib(&text, "Pss").with_context(|| format!("{path} has no Pss"))?;
        }
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let parts = ["Slab", "KernelStack", "PageTables", "Percpu"];
        let mut kernel: f64 = parts.iter().filter_map(|part| kib(&meminfo, part)).sum();
        // Pages of socket buffers; this number is the whole machine's in every namespace.
        let pages = tcp(&fs::read_to_string("/proc/net/sockstat")?, "mem").unwrap_or_default();
        kernel += super::float(pages * 4);
        Ok(Self { user, kernel })
    }
}

/// `NAME:  123 kB`.
fn kib(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_by_whole_names() {
        let text = "Rss:  900 kB\nPss:   77 kB\nPss_Anon: 5 kB\n";
        assert_eq!(kib(text, "Pss"), Some(77.0));
        assert_eq!(kib(text, "Slab"), None);
        let sockstat = "sockets: used 9\nTCP: inuse 5 orphan 0 tw 2 alloc 7 mem 12\nUDP: inuse 1 mem 0\n";
        assert_eq!(tcp(sockstat, "inuse"), Some(5));
        assert_eq!(tcp(sockstat, "mem"), Some(12));
        assert_eq!(tcp(sockstat, "none"), None);
    }

    #[test]
    fn this_process_has_memory() {
        let memory = Memory::now(&[std::process::id()]).unwrap();
        assert!(memory.user > 0.0 && memory.kernel > 0.0, "{memory:?}");
    }
}
