//! `injector doctor`, run from the edge, against real Postfix and Dovecot with one misconfiguration
//! each, and against small receivers for cases that those two cannot produce.

mod doctor_run;
mod dovecot;
mod other_trials;
mod others;
mod postfix;
mod receivers;
mod testbed;
mod trials;

use std::sync::{Arc, Mutex, PoisonError};

use injector_testbed::netns;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use testbed::Testbed;

fn main() {
    let mut arguments = Arguments::from_args();
    // Trials wait for servers, which need 5 s to detect a missing header; the servers are shared,
    // but each trial has its own ports.
    arguments.test_threads.get_or_insert(8);
    let shared: Shared = Arc::default();
    let all = other_trials::ALL.iter().chain(trials::ALL);
    let trials = all.map(|(name, run)| trial(&shared, name, *run)).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(shared);
    conclusion.exit();
}

/// Created by the first trial that runs.
type Shared = Arc<Mutex<Option<Arc<Testbed>>>>;

fn trial(shared: &Shared, name: &str, run: fn(&Testbed) -> anyhow::Result<()>) -> Trial {
    let shared = Arc::clone(shared);
    Trial::ignorable_test(name, move || {
        if let Some(reason) = netns::unavailable() {
            return Ok(Completion::ignored_with(reason));
        }
        let testbed = testbed(&shared).map_err(|error| format!("{error:#}"))?;
        let outcome = run(&testbed).and_then(|()| testbed.nothing_died());
        outcome.map(|()| Completion::Completed).map_err(|error| Failed::from(format!("{error:#}")))
    })
}

fn testbed(shared: &Shared) -> anyhow::Result<Arc<Testbed>> {
    let mut testbed = shared.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(testbed) = &*testbed {
        return Ok(Arc::clone(testbed));
    }
    Ok(Arc::clone(testbed.insert(Arc::new(Testbed::new()?))))
}
