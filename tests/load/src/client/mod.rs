//! The client: executes one job and prints its outcome.

mod bulk;
mod dialogues;
mod failures;
mod idle;

use std::io::Write as _;
use std::thread;

use anyhow::{Context as _, bail};

use self::dialogues::Pace;
use crate::descriptors;
use crate::job::{Job, JobOutcome, Load, WARM_UP};
use crate::service::{ECHO, Service};

pub use self::idle::OPEN;

/// Executes a job (one line of JSON) and prints the outcome (another line).
///
/// # Errors
/// When `job` is invalid or cannot be executed. Failed connections are counted in the outcome.
pub fn run(job: &str) -> anyhow::Result<()> {
    let job: Job = serde_json::from_str(job).context("not a job")?;
    descriptors::raise_limit();
    let outcome = execute(&job)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(&outcome)?)?;
    Ok(out.flush()?)
}

pub(crate) fn execute(job: &Job) -> anyhow::Result<JobOutcome> {
    let Job { target, load, seconds } = job;
    match load {
        Load::Upload { connections } => bulk::upload(*target, *connections, *seconds),
        Load::Download { connections } => bulk::download(*target, *connections, *seconds),
        Load::Closed { service, connections } => {
            let pace = Pace::Closed { connections: *connections };
            dialogues::run(*target, dialogue(service)?, pace, *seconds)
        }
        Load::Open { service, rate } => {
            dialogues::run(*target, dialogue(service)?, Pace::Open { rate: *rate }, *seconds)
        }
        Load::Idle { connections } => idle::run(*target, *connections),
        Load::Beside { connections, bulk_connections, bulk } => thread::scope(|scope| {
            // Starts before the round trips and ends after them.
            let long = seconds + 2.0 * WARM_UP;
            let beside = scope.spawn(move || bulk::upload(*bulk, *bulk_connections, long));
            let pace = Pace::Closed { connections: *connections };
            let mut outcome = dialogues::run(*target, &ECHO, pace, *seconds)?;
            let Ok(bulk) = beside.join() else { bail!("the upload panicked") };
            let bulk = bulk?;
            outcome.connections += bulk.connections;
            outcome.failures += bulk.failures;
            outcome.failure = outcome.failure.or(bulk.failure);
            outcome.bytes = bulk.bytes;
            Ok(outcome)
        }),
    }
}

fn dialogue(name: &str) -> anyhow::Result<&'static Service> {
    Service::named(name).with_context(|| format!("unknown service {name}"))
}
