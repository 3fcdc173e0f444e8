//! Operator commands on a running injector, and backend health: reload, drain, disabling a backend,
//! checks, ejection, and the protocols of systemd. Real sockets at both ends, in namespaces.

mod backends;
mod bans;
mod bind;
mod drain;
mod load;
mod names;
mod reload;
mod systemd;
mod testbed;

use std::sync::{Arc, Mutex, PoisonError};

use injector_testbed::netns;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use testbed::Testbed;

/// The engines for every trial that does not name its own.
const ENGINES: [&str; 2] = ["splice", "relay"];

/// What a trial does with an engine.
type Run = fn(&Testbed, &str) -> anyhow::Result<()>;

fn main() {
    let mut arguments = Arguments::from_args();
    // Trials share addresses.
    arguments.test_threads.get_or_insert(1);
    let testbed = Arc::new(Mutex::new(None));
    let mut trials = Vec::new();
    for engine in ENGINES {
        let each = reload::TRIALS.iter().chain(drain::TRIALS).chain(backends::TRIALS).chain(load::TRIALS);
        let each = each.chain(bans::TRIALS);
        for (name, run) in each {
            trials.push(trial(&testbed, format!("{engine}/{name}"), move |testbed| run(testbed, engine)));
        }
    }
    for (name, run) in backends::INLINE_TRIALS {
        trials.push(trial(&testbed, format!("inline/{name}"), |testbed| run(testbed, "inline")));
    }
    for (name, run) in names::TRIALS {
        trials.push(trial(&testbed, format!("names/{name}"), |testbed| run(testbed, "relay")));
    }
    for (name, run) in bans::RELAY_TRIALS {
        trials.push(trial(&testbed, format!("bans/{name}"), |testbed| run(testbed, "relay")));
    }
    for (name, run) in bind::TRIALS {
        trials.push(trial(&testbed, format!("bind/{name}"), |testbed| run(testbed, "relay")));
    }
    for (name, run) in systemd::TRIALS {
        trials.push(trial(&testbed, format!("systemd/{name}"), |testbed| run(testbed, "relay")));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(testbed);
    conclusion.exit();
}

fn trial(
    testbed: &Arc<Mutex<Option<Testbed>>>,
    name: String,
    run: impl Fn(&Testbed) -> anyhow::Result<()> + Send + 'static,
) -> Trial {
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
