//! The contents of `deploy/`: units and configuration as files, and the unit started by a systemd,
//! with mail through each engine.

mod booted_systemd;
mod files;
mod service;

use std::sync::Arc;

use anyhow::Context;
use injector_testbed::netns::{self, Family};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use service::{Shared, Testbed};

/// A trial with a running systemd.
type TrialRun = fn(&Testbed) -> anyhow::Result<()>;

fn main() {
    let mut arguments = Arguments::from_args();
    // All trials start and stop the same service.
    arguments.test_threads.get_or_insert(1);
    let mut trials = vec![
        file("files/the units are sound", files::units_are_sound),
        file("files/the unit is hardened", files::unit_is_hardened),
        file("files/the configuration is valid", files::configuration_is_valid),
        file("files/the stop timeout covers the configured deadline", files::a_stop_has_its_time),
    ];
    let shared = Arc::new(Shared::default());
    let systemd_trials: [(&str, TrialRun); 7] = [
        ("systemd/installing twice changes nothing", service::installing_twice),
        ("systemd/the process has only the capabilities that it needs", service::capabilities),
        ("systemd/a stop leaves no socket", service::stop),
        ("systemd/an invalid configuration prevents the start", service::mistake),
        ("systemd/a reload applies, or is rejected and changes nothing", service::reload),
        ("systemd/a daemon that hangs is restarted", service::watchdog),
        ("systemd/the socket unit starts it and keeps the port open", service::activated),
    ];
    for engine in service::ENGINES {
        for family in Family::ALL {
            let name = format!("systemd/mail/{}/{}", engine.name, family.name());
            trials.push(trial(&shared, name, move |testbed| service::mail(testbed, engine, family)));
        }
    }
    trials.extend(systemd_trials.map(|(name, run)| trial(&shared, name.to_owned(), run)));
    // The last trial: it removes everything.
    let last = "systemd/uninstalling removes everything except the configuration";
    trials.push(trial(&shared, last.to_owned(), service::uninstall));
    // Only the trials hold it, so it is dropped with the last of them.
    drop(shared);
    libtest_mimic::run(&arguments, trials).exit();
}

fn file(name: &str, run: fn() -> anyhow::Result<()>) -> Trial {
    Trial::test(name, move || run().map_err(|error| Failed::from(format!("{error:#}"))))
}

fn trial(
    shared: &Arc<Shared>,
    name: String,
    run: impl Fn(&Testbed) -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    let shared = Arc::clone(shared);
    Trial::ignorable_test(name, move || {
        if let Some(reason) = netns::unavailable() {
            return Ok(Completion::ignored_with(reason));
        }
        let testbed = shared.testbed()?;
        let outcome = run(testbed).with_context(|| format!("the journal:\n{}", testbed.journal()));
        match outcome {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => {
                let causes: Vec<_> = error.chain().skip(1).map(ToString::to_string).collect();
                Err(Failed::from(format!("{}\n\n{error}", causes.join(": "))))
            }
        }
    })
}
