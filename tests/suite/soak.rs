//! A short soak of either engine, with a fixed seed; `cargo xtask soak` runs long ones.

use std::time::Duration;

use injector_soak::{Engine, Options, run};
use injector_testbed::netns;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

fn main() {
    let mut arguments = Arguments::from_args();
    // A process has one set of namespaces.
    arguments.test_threads = Some(1);
    let trial = |engine: Engine| Trial::ignorable_test(format!("soak/{engine}"), move || soak(engine));
    libtest_mimic::run(&arguments, Engine::ALL.map(trial).into()).exit();
}

fn soak(engine: Engine) -> Result<Completion, Failed> {
    if let Some(reason) = netns::unavailable() {
        return Ok(Completion::ignored_with(reason));
    }
    let options = Options {
        seed: 20_250_307,
        duration: Duration::from_secs(8),
        at_once: 32,
        engine,
        planned: 100,
        only: None,
    };
    let report = run(&options, &mut |line| println!("{line}"))?;
    if report.passed() { Ok(Completion::Completed) } else { Err(Failed::from(report.to_string())) }
}
