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

use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use self::{
    cases::{Test, fail_closed, header_added, header_retransmitted, header_waits, shifted, swept},
    connection::{Connection, Programs},
    segment::Link,
};
use crate::engine::{
    bpf::reports,
    check::{Check, ProgramReport},
};

/// Runs all checks, and returns them with the verifier's cost of the programs. The engine may be
/// used if all checks passed.
#[must_use]
pub fn run() -> (Vec<Check>, Vec<ProgramReport>) {
    // `client_in` stores SYNs per CPU, so the checks run on a thread that stays on one CPU.
    let on_one = std::thread::scope(|scope| scope.spawn(run_on_one_cpu).join());
    on_one.unwrap_or_else(|_| {
        let fault = Err("the thread that ran it panicked".to_owned());
        (vec![Check { name: "load", result: fault, took: Duration::ZERO }], Vec::new())
    })
}

fn run_on_one_cpu() -> (Vec<Check>, Vec<ProgramReport>) {
    let start = Instant::now();
    let mut only = CpuSet::new();
    only.set(sched_getcpu());
    let loaded = sched_setaffinity(None, &only)
        .map_err(|error| format!("staying on one processor: {error}"))
        .and_then(|()| Programs::load().map_err(|error| error.to_string()));
    let programs = match loaded {
        Ok(programs) => programs,
        Err(fault) => {
            return (vec![Check { name: "load", result: Err(fault), took: start.elapsed() }], Vec::new());
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
        ("fail_closed", fail_closed, "nothing that was forwarded reaches the backend without a header"),
        ("swept", swept, "a connection that has ended is removed, and no other"),
    ];
    for (number, (name, test, seen)) in (0..).zip(tests) {
        let start = Instant::now();
        let result = for_each_device(&programs, number, test).map(|()| seen.to_owned());
        checks.push(Check { name, result, took: start.elapsed() });
    }
    (checks, reports(&programs.programs))
}

/// Runs a check for each family and kind of device, each with a connection of its own.
fn for_each_device(programs: &Programs, number: u16, test: Test) -> Result<(), String> {
    for ipv6 in [false, true] {
        for (link, base) in [(Link::Ethernet, 40_000), (Link::Raw, 50_000)] {
            let connection = Connection::new(programs, ipv6, link, base + number);
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            test(&connection).map_err(|fault| format!("{family}, {link:?}: {fault}"))?;
        }
    }
    Ok(())
}
