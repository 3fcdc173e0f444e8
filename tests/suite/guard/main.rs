//! The guard's programs in front of the listeners of every engine. Clients are plain sockets, in the three
//! namespaces.

mod programs;
mod testbed;

use std::sync::{Arc, Mutex, PoisonError};

use injector_testbed::netns;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use testbed::Testbed;

fn main() {
    let mut arguments = Arguments::from_args();
    // Trials share addresses.
    arguments.test_threads.get_or_insert(1);
    let shared = Arc::new(Mutex::new(None));
    let trials = programs::TRIALS.iter().map(|(name, run)| trial(&shared, name, *run)).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(shared);
    conclusion.exit();
}

type Run = fn(&Testbed) -> anyhow::Result<()>;

fn trial(shared: &Arc<Mutex<Option<Testbed>>>, name: &str, run: Run) -> Trial {
    let shared = Arc::clone(shared);
    Trial::ignorable_test(format!("programs/{name}"), move || {
        if let Some(reason) = netns::unavailable() {
            return Ok(Completion::ignored_with(reason));
        }
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.is_none() {
            *shared = Some(Testbed::new().map_err(failed)?);
        }
        let testbed = shared.as_ref().ok_or_else(|| Failed::from("no testbed"))?;
        let ran = run(testbed);
        // For the next one.
        let detached = testbed.detach();
        ran.and(detached).map(|_| Completion::Completed).map_err(failed)
    })
}

fn failed(error: anyhow::Error) -> Failed {
    Failed::from(format!("{error:#}"))
}
