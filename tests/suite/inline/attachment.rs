//! How the programs are attached to devices while daemons start and stop: clsact filters, and tcx.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use injector_testbed::bpf;
use injector_testbed::daemon::Injector;
use injector_testbed::netns::{Family, Netns};

use crate::Run;
use crate::lifecycle::{serve, session};
use crate::site::events;
use crate::testbed::{LIMIT, Testbed, accept, own_header, pass};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("survives/clsact, daemon killed twenty times", killed_with_clsact),
    ("survives/from clsact to tcx and back", from_one_to_the_other),
];

const CLSACT: &str = "attachment = \"clsact\"";
const TCX: &str = "attachment = \"tcx\"";

/// The devices that have the program.
const DEVICES: [&str; 2] = ["outside", "inside"];

/// The kernel's filter events, from `tc monitor`.
struct Monitor {
    process: Child,
    output: tempfile::NamedTempFile,
}

impl Monitor {
    fn start(netns: &Netns) -> anyhow::Result<Self> {
        let output = tempfile::NamedTempFile::new()?;
        let mut command = netns.command("tc");
        command.arg("monitor").stdout(output.reopen()?).stdin(Stdio::null());
        let monitor = Self { process: command.spawn().context("tc monitor")?, output };
        // It reports nothing until it has subscribed.
        let deadline = Instant::now() + LIMIT;
        while !monitor.read()?.contains("qdisc") {
            ensure!(Instant::now() < deadline, "tc monitor reports nothing");
            tc(netns, &["qdisc", "add", "dev", "lo", "clsact"])?;
            tc(netns, &["qdisc", "del", "dev", "lo", "clsact"])?;
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(monitor)
    }

    fn read(&self) -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(self.output.path())?)
    }

    /// Waits until filters were added or replaced this many times, and returns how many had been
    /// deleted by then.
    fn deleted_of(&self, changed: usize) -> anyhow::Result<usize> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let output = self.read()?;
            // `added filter dev …`, `filter dev …` when it was replaced, `deleted filter dev …`.
            let of_filters = output.lines().filter(|line| line.contains("filter dev "));
            let (deletions, changes): (Vec<_>, Vec<_>) =
                of_filters.partition(|line| line.starts_with("deleted"));
            let (deleted, seen) = (deletions.len(), changes.len());
            if seen >= changed {
                return Ok(deleted);
            }
            ensure!(Instant::now() < deadline, "{seen} changes of {changed}:\n{output}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait()) {
            eprintln!("tc monitor: {error}");
        }
    }
}

fn tc(netns: &Netns, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command: Command = netns.command("tc");
    let output = command.args(arguments).output()?;
    ensure!(output.status.success(), "tc {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The number of filters of the program on each device.
fn filters(testbed: &Testbed) -> anyhow::Result<Vec<usize>> {
    let of = |device: &str| {
        let shown = tc(&testbed.topology.edge, &["filter", "show", "dev", device, "ingress"])?;
        Ok(shown.lines().filter(|line| line.contains(" inline ")).count())
    };
    DEVICES.into_iter().map(of).collect()
}

/// The number of programs that are attached by tcx links, of all devices.
fn links(testbed: &Testbed) -> anyhow::Result<usize> {
    let count = || DEVICES.into_iter().map(|device| Ok(bpf::tcx_links(device)?.len())).sum();
    testbed.topology.edge.run(count)?
}

/// With clsact no program may be missing while one daemon replaces another. Clients keep
/// connecting, and each must arrive with its header. The moment is short, and the clients may miss
/// it; so the kernel must not report a deleted filter either.
fn killed_with_clsact(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    const TIMES: usize = 20;
    let edge = &testbed.topology.edge;
    let config = testbed.config("smtp", CLSACT);
    let backend = testbed.backend(family)?;
    backend.set_nonblocking(true)?;
    let monitor = Monitor::start(edge)?;
    let _attached = testbed.attached();
    let mut injector = Some(Injector::start(edge, &config)?);
    ensure!(monitor.deleted_of(DEVICES.len())? == 0, "something was deleted at first: {}", monitor.read()?);
    let (done, over, all_over) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| serve(&backend, &all_over));
        let clients = scope.spawn(|| -> anyhow::Result<()> {
            while !over.load(Ordering::Relaxed) {
                let (number, start) = (done.load(Ordering::Relaxed), Instant::now());
                session(testbed, family).with_context(|| format!("session {number}"))?;
                done.fetch_add(1, Ordering::Relaxed);
                // Most of the time is the daemon's startup, on slow processors.
                std::thread::sleep(start.elapsed() * 4);
            }
            Ok(())
        });
        let restarted = (0..TIMES).try_for_each(|_| {
            // SIGKILL.
            drop(injector.take());
            injector = Some(Injector::start_next(edge, &config)?);
            anyhow::Ok(())
        });
        over.store(true, Ordering::Relaxed);
        let clients = clients.join().map_err(|_| anyhow::anyhow!("panicked"));
        // The last client has been served.
        all_over.store(true, Ordering::Relaxed);
        let served = serving.join().map_err(|_| anyhow::anyhow!("panicked"));
        restarted.context("started again")?;
        let events = || injector.as_ref().and_then(|injector| events(injector).ok()).unwrap_or_default();
        served?.with_context(|| format!("the backend; {}", events()))?;
        clients?.with_context(|| format!("a client; {}", events()))
    })?;
    eprintln!("    {} sessions during {TIMES} restarts", done.into_inner());
    let deleted = monitor.deleted_of(DEVICES.len() * (TIMES + 1))?;
    ensure!(deleted == 0, "{deleted} filters were deleted:\n{}", monitor.read()?);
    ensure!(filters(testbed)? == [1; 2], "{:?} filters for {DEVICES:?}", filters(testbed)?);
    Ok(())
}

/// A daemon that attaches the other way removes the earlier daemon's programs; otherwise packets
/// would be changed twice.
fn from_one_to_the_other(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let _attached = testbed.attached();
    let mut open = Vec::new();
    for (how, of_filters, of_links) in [(CLSACT, 1, 0), (TCX, 0, 2), (CLSACT, 1, 0)] {
        let injector = Injector::start(&testbed.topology.edge, &testbed.config("smtp", how))?;
        let mut client = testbed.client(family).context(how)?;
        let mut server = accept(&backend)?;
        own_header(&mut server, &client)?;
        pass(&mut server, &mut client, b"220 hello\r\n")?;
        pass(&mut client, &mut server, b"EHLO client\r\n")?;
        ensure!(filters(testbed)? == [of_filters; 2], "{how}: {:?} filters", filters(testbed)?);
        ensure!(links(testbed)? == of_links, "{how}: {} links", links(testbed)?);
        open.push((client, server));
        // What an earlier daemon has opened goes on.
        for (client, server) in &mut open {
            pass(server, client, b"250 still here\r\n")?;
            pass(client, server, b"NOOP\r\n")?;
        }
        drop(injector);
    }
    Ok(())
}
