//! `injector selftest`: tests which engines can run on this machine.

use super::args::SelftestArgs;
use crate::{
    config::Watermarks,
    engine::{kernel, registry::EngineProbes},
};

/// Connections that the tested splice engine has room for.
const CONNECTIONS: u32 = 16;

/// Runs all self-tests and prints their results.
pub fn run(args: &SelftestArgs) {
    let mut probes = EngineProbes::not_run("");
    probes.probe_inline();
    probes.probe_splice(CONNECTIONS, &Watermarks::default());
    let guard = kernel::test_guard();
    if args.json {
        let mut json = probes.json();
        json["guard"] = guard.json();
        println!("{json:#}");
    } else {
        print!("{}\n{}", probes.text(), guard.text("guard"));
        match guard.failure() {
            None => println!("[guard] drops packets of banned sources: all its checks passed"),
            Some(failure) => println!(
                "[guard] cannot drop packets here, and listeners reset connections of banned sources instead: {failure}"
            ),
        }
    }
}
