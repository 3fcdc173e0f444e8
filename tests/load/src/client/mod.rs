//! The client: carries out one order and tells what came of it.

mod bulk;
mod dialogues;
mod idle;
mod tally;

use std::io::Write as _;
use std::thread;

use anyhow::{Context as _, bail};

use self::dialogues::Pace;
use crate::descriptors;
use crate::order::{Order, Outcome, Work};
use crate::service::{ECHO, Service};

pub use self::idle::OPEN;

/// Seconds before the measured time in which dialogues run already: slow start, enrolment and caches are behind them.
pub const WARM_UP: f64 = 0.3;

/// Carries out an order (one line of JSON) and prints the outcome (another).
///
/// # Errors
/// When the order is none, or could not be carried out. Connections that fail are counted in the outcome.
pub fn run(order: &str) -> anyhow::Result<()> {
    let order: Order = serde_json::from_str(order).context("not an order")?;
    descriptors::raise_limit();
    let outcome = carry_out(&order)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(&outcome)?)?;
    Ok(out.flush()?)
}

pub(crate) fn carry_out(order: &Order) -> anyhow::Result<Outcome> {
    let Order { target, work, seconds } = order;
    match work {
        Work::Upload { connections } => bulk::upload(*target, *connections, *seconds),
        Work::Download { connections } => bulk::download(*target, *connections, *seconds),
        Work::Closed { service, connections } => {
            let pace = Pace::Closed { connections: *connections };
            dialogues::run(*target, dialogue(service)?, pace, *seconds)
        }
        Work::Open { service, rate } => {
            dialogues::run(*target, dialogue(service)?, Pace::Open { rate: *rate }, *seconds)
        }
        Work::Idle { connections } => idle::run(*target, *connections),
        Work::Beside { connections, bulk_connections, bulk } => thread::scope(|scope| {
            // Longer than what it runs beside, at both ends.
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
    Service::named(name).with_context(|| format!("there is no service {name}"))
}
