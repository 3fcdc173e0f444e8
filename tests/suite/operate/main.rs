//! Operator commands on a running injector, and backend health: reload, drain, disabling a backend,
//! checks, ejection, and the protocols of systemd. Real sockets at both ends, in namespaces.

mod backends;
mod bans;
mod bind;
mod drain;
mod load;
mod names;
mod reload;
mod services;
mod systemd;
mod testbed;

use std::process::ExitCode;

use injector_testbed::group::{self, Group};
use libtest_mimic::Trial;

use testbed::Testbed;

/// What a trial does with an engine.
type Run = fn(&Testbed, &str) -> anyhow::Result<()>;

fn main() -> ExitCode {
    group::run(Vec::new(), vec![of_engine("splice"), of_engine("relay"), others()])
}

fn of_engine(engine: &'static str) -> Vec<Trial> {
    let group = Group::new(engine, Testbed::new);
    let areas = [reload::TRIALS, drain::TRIALS, backends::TRIALS, load::TRIALS, bans::TRIALS];
    let trial = |(name, run): &(&str, Run)| {
        let run = *run;
        group.trial(format!("{engine}/{name}"), move |testbed| run(testbed, engine))
    };
    areas.into_iter().flatten().map(trial).collect()
}

/// Each with one engine.
fn others() -> Vec<Trial> {
    let group = Group::new("others", Testbed::new);
    let areas = [
        ("inline", "inline", backends::INLINE_TRIALS),
        ("names", "relay", names::TRIALS),
        ("services", "relay", services::TRIALS),
        ("bans", "relay", bans::RELAY_TRIALS),
        ("bind", "relay", bind::TRIALS),
        ("systemd", "relay", systemd::TRIALS),
    ];
    let mut trials = Vec::new();
    for (area, engine, of_area) in areas {
        for (name, run) in of_area {
            trials.push(group.trial(format!("{area}/{name}"), move |testbed| run(testbed, engine)));
        }
    }
    trials
}
