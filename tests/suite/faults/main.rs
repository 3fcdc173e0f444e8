//! Faults: clients that forge, backends that fail, limits, shutdown, a kernel that refuses.
//! Each trial starts its own injector on the edge; client and backend are plain sockets of the
//! test, in their namespaces, so that every byte and every reset is observed on both sides.

mod close_semantics;
mod connection_limits;
mod engine_selection;
mod headers;
mod killable_backend;
mod peer_timeouts;
mod rejections;
mod retransmissions;
mod segment_counts;
mod session_ends;
mod shutdown;
mod source_limits;
mod stalled_readers;
mod stalls;
mod startup;
mod testbed;
mod transfers;

use std::sync::{Arc, Mutex, PoisonError};

use injector_testbed::netns;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use testbed::Testbed;

/// The engines for every trial that does not name its own.
const ENGINES: [&str; 2] = ["splice", "relay"];

fn main() {
    if let Some(behaviour) = killable_backend::requested() {
        return killable_backend::run(behaviour);
    }
    let mut arguments = Arguments::from_args();
    // Trials share addresses.
    arguments.test_threads.get_or_insert(1);
    let testbed = Arc::new(Mutex::new(None));
    let mut trials = Vec::new();
    for engine in ENGINES {
        let each = rejections::TRIALS
            .iter()
            .chain(headers::TRIALS)
            .chain(transfers::TRIALS)
            .chain(retransmissions::TRIALS)
            .chain(close_semantics::TRIALS)
            .chain(segment_counts::TRIALS)
            .chain(shutdown::TRIALS)
            .chain(connection_limits::TRIALS)
            .chain(source_limits::TRIALS)
            .chain(stalled_readers::TRIALS)
            .chain(peer_timeouts::TRIALS)
            .chain(session_ends::TRIALS);
        for (name, run) in each {
            trials.push(trial(&testbed, format!("{engine}/{name}"), move |testbed| run(testbed, engine)));
        }
    }
    for (name, run) in headers::SPLICE_TRIALS.iter().chain(transfers::SPLICE_TRIALS) {
        trials.push(trial(&testbed, format!("splice/{name}"), |testbed| run(testbed, "splice")));
    }
    for (name, run) in startup::TRIALS {
        trials.push(trial(&testbed, format!("start/{name}"), run));
    }
    for (name, run) in stalls::TRIALS {
        trials.push(trial(&testbed, format!("stalls/{name}"), run));
    }
    for (name, run) in engine_selection::TRIALS {
        trials.push(trial(&testbed, format!("start/{name}"), run));
    }
    for case in engine_selection::INVALID_STARTS {
        let name = format!("start/inline/rejected: {}", case.name);
        trials.push(trial(&testbed, name, |testbed| engine_selection::check_rejected(testbed, case)));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(testbed);
    conclusion.exit();
}

/// What a trial does with an engine.
type Run = fn(&Testbed, &str) -> anyhow::Result<()>;

fn trial(
    shared: &Arc<Mutex<Option<Testbed>>>,
    name: String,
    run: impl Fn(&Testbed) -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    let shared = Arc::clone(shared);
    Trial::ignorable_test(name, move || {
        if let Some(reason) = netns::unavailable() {
            return Ok(Completion::ignored_with(reason));
        }
        let mut testbed = shared.lock().unwrap_or_else(PoisonError::into_inner);
        if testbed.is_none() {
            *testbed = Some(Testbed::new()?);
        }
        match testbed.as_ref() {
            Some(testbed) => run(testbed)
                .map(|()| Completion::Completed)
                .map_err(|error| Failed::from(format!("{error:#}"))),
            None => Err(Failed::without_message()),
        }
    })
}
