//! The soak: thousands of random sessions through the daemon, each held against its plan byte for byte.
//!
//! Every session follows a `plan` that is drawn from a seed and its number alone, so both ends know it without a word
//! between them, and one session can be run again by itself. In reading order: `plan` draws, `testbed` builds the
//! namespaces and starts the daemon, `endpoints` are the clients and the backend, whose sockets `conversation` carries
//! through the plan and whose bytes `content` follows, `verdict` judges a session by what its ends saw, `daemon_report`
//! by what the daemon says, [`injector_testbed::resource_usage`] measure the machine, and `report` is what a person reads.

mod content;
mod conversation;
mod daemon_report;
mod endpoints;
mod plan;
mod report;
mod session_log;
mod testbed;
mod verdict;

use std::fmt;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use tokio::sync::watch;

use self::content::Content;
use self::conversation::LIMIT;
use self::endpoints::Shared;
use self::plan::Plan;
pub use self::report::Report;
use self::report::{After, Before};
use self::session_log::Ledger;
use self::testbed::{MOST_SESSIONS, Stage};
use injector_testbed::resource_usage::MemoryWatch;

/// What carries the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The kernel, between two sockets.
    Splice,
    /// The daemon, by read and write.
    Relay,
}

impl Engine {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Splice, Self::Relay];

    /// Its name in the daemon's configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Splice => "splice",
            Self::Relay => "relay",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Of all random choices: the same seed gives the same plan to every session.
    pub seed: u64,
    /// How long new sessions are started; those that run then are waited for.
    pub duration: Duration,
    /// How many sessions run at one time.
    pub at_once: usize,
    /// Which engine to run them through.
    pub engine: Engine,
    /// How many sessions there must have been at the end.
    pub planned: u64,
    /// Run this session alone, whatever the duration.
    pub only: Option<u64>,
}

/// Runs a soak in namespaces of its own; `tell` gets a line of progress every ten seconds.
///
/// # Errors
/// When it could not be run. Sessions that failed are in the report.
pub fn run(options: &Options, tell: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    if let Some(only) = options.only {
        anyhow::ensure!(
            only < MOST_SESSIONS,
            "there is no session {only}: the last is {}",
            MOST_SESSIONS - 1
        );
        tell(&Plan::draw(options.seed, only).to_string());
    }
    let stage = Stage::new(options.engine)?;
    let pid = stage.injector.pid();
    let before = Before::settled(pid)?;
    let shared = Shared {
        options: *options,
        content: Arc::new(Content::new(options.seed)),
        ledger: Arc::new(Ledger::default()),
    };
    let memory = MemoryWatch::start(pid);
    let start = Instant::now();
    let sessions = load(&stage, &shared, tell)?;
    let took = start.elapsed();
    let memory = memory.end();
    let accounts = daemon_report::settle(&stage.injector, &shared)?;
    let after = After::settled(&stage.injector, &before)?;
    Report::new(options, &shared, &stage, sessions, took, accounts, memory, (before, after))
}

/// Runs the sessions; returns how many there were.
fn load(stage: &Stage, shared: &Shared, tell: &mut dyn FnMut(&str)) -> anyhow::Result<u64> {
    let (stop, stopped) = watch::channel(false);
    let (ready, listening) = mpsc::channel();
    thread::scope(|scope| {
        let backend =
            scope.spawn(move || stage.topology.mail.run(|| endpoints::backend(shared, &ready, stopped)));
        // Without the backend there is nothing to run: its own error says why.
        let sessions = match listening.recv_timeout(LIMIT) {
            Ok(()) => {
                let clients = scope.spawn(|| stage.topology.client.run(|| endpoints::clients(shared)));
                watch_over(shared, tell, || clients.is_finished());
                clients.join().unwrap_or_else(|_| Err(anyhow!("the clients panicked")))
            }
            Err(_) => Err(anyhow!("no backend")),
        };
        await_backend(shared);
        // Nobody listens only if the backend has ended.
        let _ = stop.send(true);
        backend.join().unwrap_or_else(|_| Err(anyhow!("the backend panicked")))?.context("the backend")?;
        sessions?.context("the clients")
    })
}

fn watch_over(shared: &Shared, tell: &mut dyn FnMut(&str), over: impl Fn() -> bool) {
    const EVERY: Duration = Duration::from_secs(10);
    let start = Instant::now();
    let mut next = EVERY;
    while !over() {
        thread::sleep(Duration::from_millis(20));
        if start.elapsed() >= next {
            next += EVERY;
            let pages = shared.ledger.open();
            let ended = pages.sessions.values().filter(|both| both.client.is_some()).count();
            let (up, down) = pages.arrived;
            let strangers = pages.strangers.len();
            drop(pages);
            let seconds = start.elapsed().as_secs();
            let [up, down] = [up, down].map(report::bytes);
            let odd = if strangers > 0 { format!(", {strangers} FAULTS") } else { String::new() };
            tell(&format!(
                "{seconds:>5} s: {ended} sessions ended, {up} to the backend, {down} to clients{odd}"
            ));
        }
    }
}

/// The backend hears of the last ends a little later than the clients; of some never.
fn await_backend(shared: &Shared) {
    const QUIET: Duration = Duration::from_millis(500);
    let deadline = Instant::now() + LIMIT;
    let mut since = Instant::now();
    while since.elapsed() < QUIET && Instant::now() < deadline {
        if shared.ledger.open().at_backend > 0 {
            since = Instant::now();
        }
        thread::sleep(Duration::from_millis(20));
    }
}
