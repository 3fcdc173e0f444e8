//! The guard's programs in front of the listeners of every engine. Clients are plain sockets, in the three
//! namespaces.

mod attachment;
mod forged;
mod frames;
mod programs;
mod testbed;

use std::process::ExitCode;

use injector_testbed::group::{self, Group};
use libtest_mimic::Trial;

use testbed::Testbed;

type Run = fn(&Testbed) -> anyhow::Result<()>;

fn main() -> ExitCode {
    group::run(
        Vec::new(),
        vec![
            trials("programs", programs::TRIALS),
            trials("frames", frames::TRIALS),
            trials("attachment", attachment::TRIALS),
            trials("limits", forged::TRIALS),
        ],
    )
}

fn trials(area: &'static str, trials: &[(&str, Run)]) -> Vec<Trial> {
    let group = Group::new(area, Testbed::new);
    let trial = |(name, run): &(&str, Run)| {
        let run = *run;
        group.trial(format!("{area}/{name}"), move |testbed| {
            let ran = run(testbed);
            // For the next one.
            let detached = testbed.detach();
            ran.and(detached).map(drop)
        })
    };
    trials.iter().map(trial).collect()
}
