//! `injector selftest`: tests which engines can run on this machine.

use super::args::SelftestArgs;
use crate::{config::Watermarks, engine::registry::EngineProbes};

/// Connections that the tested splice engine has room for.
const CONNECTIONS: u32 = 16;

/// Runs all self-tests and prints their results.
pub fn run(args: &SelftestArgs) {
    let mut probes = EngineProbes::not_run("");
    probes.probe_inline();
    probes.probe_splice(CONNECTIONS, &Watermarks::default());
    if args.json {
        println!("{:#}", probes.json());
    } else {
        print!("{}", probes.text());
    }
}
