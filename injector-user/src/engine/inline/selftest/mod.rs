//! Runs the inline engine's real programs over generated packets, by `BPF_PROG_TEST_RUN`, with maps
//! of their own: nothing is attached or pinned, and no packet leaves.
//!
//! Every check runs for IPv4 and IPv6, on a device with Ethernet and on one without link-layer
//! header.

mod cases;
mod connection;
#[cfg(test)]
mod cost;
mod segment;

use std::time::Instant;

use self::{
    cases::{Test, fail_closed, header_added, header_retransmitted, header_waits, left_to_sockets, shifted},
    connection::{Connection, PASS, Programs},
    segment::{Link, Segment},
};
use crate::engine::{
    bpf::reports,
    check::{Check, ProgramReport},
    inline::programs::start_sweep,
};

/// Runs all checks, and returns them with the verifier's cost of the programs. The engine may be
/// used if all checks passed.
#[must_use]
pub fn run() -> (Vec<Check>, Vec<ProgramReport>) {
    let start = Instant::now();
    let programs = match Programs::load() {
        Ok(programs) => programs,
        Err(error) => {
            let result = Err(error.to_string());
            return (vec![Check { name: "load", result, took: start.elapsed() }], Vec::new());
        }
    };
    let seen = "programs verified, maps created".to_owned();
    let mut checks = vec![Check { name: "load", result: Ok(seen), took: start.elapsed() }];
    let tests: [(&'static str, Test, &str); 6] = [
        ("header_added", header_added, "at the end of the handshake, with its lengths and checksums"),
        (
            "header_waits",
            header_waits,
            "for a client that speaks first, and goes in front of its first bytes",
        ),
        ("shifted", shifted, "sequence numbers later, acknowledgements and SACK blocks earlier"),
        (
            "header_retransmitted",
            header_retransmitted,
            "a backend that asks for the header gets it, and its packet goes no further",
        ),
        ("fail_closed", fail_closed, "nothing reaches a PROXY port without a header"),
        ("left_to_sockets", left_to_sockets, "what the program does not take goes on unchanged"),
    ];
    for (number, (name, test, seen)) in (0..).zip(tests) {
        let start = Instant::now();
        let result = for_each_device(&programs, number, test).map(|()| seen.to_owned());
        checks.push(Check { name, result, took: start.elapsed() });
    }
    let start = Instant::now();
    let result =
        sweep_and_stop(&programs).map(|()| "the sweep starts, and no listener takes no SYN".to_owned());
    checks.push(Check { name: "sweep", result, took: start.elapsed() });
    (checks, reports(&programs.programs))
}

/// Runs a check for each family and kind of device, each with a connection of its own.
fn for_each_device(programs: &Programs, number: u16, test: Test) -> Result<(), String> {
    for ipv6 in [false, true] {
        for (link, base) in [(Link::Ethernet, 10_000), (Link::Raw, 20_000)] {
            let connection = Connection::new(programs, ipv6, link, base + number);
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            test(&connection).map_err(|fault| format!("{family}, {link:?}: {fault}"))?;
        }
    }
    Ok(())
}

/// The kernel runs the sweep, and SYNs go to the sockets once there are no listeners.
fn sweep_and_stop(programs: &Programs) -> Result<(), String> {
    start_sweep(&programs.programs).map_err(|error| error.to_string())?;
    programs.remove_listeners()?;
    let connection = Connection::new(programs, false, Link::Ethernet, 12_345);
    let syn: Segment = connection.client_segment(injector_common::inline::SYN);
    connection.expect_verdict("a SYN without listeners", &syn, PASS)
}
