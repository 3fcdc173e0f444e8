//! The soak: thousands of random sessions through the daemon, each checked byte for byte against
//! its plan.
//!
//! Every session follows a `plan` that is drawn from a seed and its number alone, so that both
//! sides know it without communicating, and one session can be run again by itself. In reading
//! order: `plan` draws, `testbed` creates the namespaces and starts the daemon, `endpoints` are the
//! clients and the backend, `conversation` runs one of their sockets through the plan, `content`
//! checks the received bytes, `verdict` checks what both sides observed, `daemon_report` checks the
//! daemon's log lines and metrics, [`injector_testbed::resource_usage`] measures the machine, and
//! `report` prints the result.

mod content;
mod conversation;
mod daemon_report;
mod endpoints;
mod options;
mod plan;
mod report;
mod session_log;
mod testbed;
mod verdict;

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use tokio::sync::watch;

use self::content::Content;
use self::conversation::LIMIT;
use self::endpoints::Shared;
pub use self::options::{Engine, Options};
use self::plan::Plan;
pub use self::report::Report;
use self::report::{ResourcesAfter, ResourcesBefore};
use self::session_log::SessionLog;
use self::testbed::{MAX_SESSIONS, Testbed};
use injector_testbed::resource_usage::MemoryWatch;

/// Runs a soak in its own namespaces; `on_progress` gets a line every ten seconds.
///
/// # Errors
/// When it cannot be run. Sessions that failed are in the report.
pub fn run(options: &Options, on_progress: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    if let Some(only) = options.only {
        anyhow::ensure!(
            only < MAX_SESSIONS,
            "session {only} does not exist: the last is {}",
            MAX_SESSIONS - 1
        );
        on_progress(&Plan::draw(options.seed, only).to_string());
    }
    let testbed = Testbed::new(options.engine)?;
    let pid = testbed.injector.pid();
    let before = ResourcesBefore::settled(pid)?;
    let shared = Shared {
        options: *options,
        content: Arc::new(Content::new(options.seed)),
        log: Arc::new(SessionLog::default()),
    };
    let memory = MemoryWatch::start(pid);
    let start = Instant::now();
    let sessions = run_sessions(&testbed, &shared, on_progress)?;
    let took = start.elapsed();
    let memory = memory.end();
    let daemon_report = daemon_report::collect(&testbed.injector, &shared)?;
    let after = ResourcesAfter::settled(&testbed.injector, &before)?;
    Report::new(options, &shared, &testbed, sessions, took, daemon_report, memory, (before, after))
}

/// Runs the sessions; returns their number.
fn run_sessions(
    testbed: &Testbed,
    shared: &Shared,
    on_progress: &mut dyn FnMut(&str),
) -> anyhow::Result<u64> {
    let (stop, stopped) = watch::channel(false);
    let (ready, listening) = mpsc::channel();
    thread::scope(|scope| {
        let backend =
            scope.spawn(move || testbed.topology.mail.run(|| endpoints::backend(shared, &ready, stopped)));
        // Without the backend nothing can run; its own error has the reason.
        let sessions = match listening.recv_timeout(LIMIT) {
            Ok(()) => {
                let clients = scope.spawn(|| testbed.topology.client.run(|| endpoints::clients(shared)));
                report_progress(shared, on_progress, || clients.is_finished());
                clients.join().unwrap_or_else(|_| Err(anyhow!("the clients panicked")))
            }
            Err(_) => Err(anyhow!("no backend")),
        };
        wait_for_backend(shared);
        // The receiver is gone only if the backend has ended.
        let _ = stop.send(true);
        backend.join().unwrap_or_else(|_| Err(anyhow!("the backend panicked")))?.context("the backend")?;
        sessions?.context("the clients")
    })
}

fn report_progress(shared: &Shared, on_progress: &mut dyn FnMut(&str), is_over: impl Fn() -> bool) {
    const EVERY: Duration = Duration::from_secs(10);
    let start = Instant::now();
    let mut next = EVERY;
    while !is_over() {
        thread::sleep(Duration::from_millis(20));
        if start.elapsed() >= next {
            next += EVERY;
            let log = shared.log.lock();
            let ended = log.sessions.values().filter(|record| record.client.is_some()).count();
            let (up, down) = log.arrived;
            let unmatched = log.unmatched.len();
            drop(log);
            let seconds = start.elapsed().as_secs();
            let [up, down] = [up, down].map(report::bytes);
            let odd = if unmatched > 0 { format!(", {unmatched} UNMATCHED") } else { String::new() };
            on_progress(&format!(
                "{seconds:>5} s: {ended} sessions ended, {up} to the backend, {down} to clients{odd}"
            ));
        }
    }
}

/// The backend sees the last closes a little later than the clients, and some never.
fn wait_for_backend(shared: &Shared) {
    const QUIET: Duration = Duration::from_millis(500);
    let deadline = Instant::now() + LIMIT;
    let mut since = Instant::now();
    while since.elapsed() < QUIET && Instant::now() < deadline {
        if shared.log.lock().at_backend > 0 {
            since = Instant::now();
        }
        thread::sleep(Duration::from_millis(20));
    }
}
