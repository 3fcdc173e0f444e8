//! Bans that come from elsewhere: the decisions of a real CrowdSec LAPI and of one that answers nonsense, and Debian's
//! fail2ban on the log of a real Postfix.

mod crowdsec;
mod fail2ban;
mod lapi_stub;
mod nonsense;
mod testbed;

use std::sync::{Arc, Mutex, PoisonError};

use injector_testbed::netns;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use testbed::Testbed;

/// A trial.
type Run = fn(&Testbed) -> anyhow::Result<()>;

fn main() {
    let mut arguments = Arguments::from_args();
    // Trials share addresses.
    arguments.test_threads.get_or_insert(1);
    let testbed = Arc::new(Mutex::new(None));
    let each = crowdsec::TRIALS.iter().chain(nonsense::TRIALS).chain(fail2ban::TRIALS);
    let trials = each.map(|(name, run)| trial(&testbed, name, *run)).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(testbed);
    conclusion.exit();
}

fn trial(testbed: &Arc<Mutex<Option<Testbed>>>, name: &str, run: Run) -> Trial {
    let testbed = Arc::clone(testbed);
    Trial::ignorable_test(name, move || {
        if let Some(why) = netns::unavailable() {
            return Ok(Completion::ignored_with(why));
        }
        let mut testbed = testbed.lock().unwrap_or_else(PoisonError::into_inner);
        if testbed.is_none() {
            *testbed = Some(Testbed::new().map_err(|error| Failed::from(format!("{error:#}")))?);
        }
        let Some(testbed) = &*testbed else { return Err("no testbed".into()) };
        run(testbed).map(|()| Completion::Completed).map_err(|error| format!("{error:#}").into())
    })
}
