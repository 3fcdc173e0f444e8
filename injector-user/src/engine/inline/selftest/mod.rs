//! Drives the inline engine's real programs over packets made here, by `BPF_PROG_TEST_RUN`, with maps of their own: nothing is
//! attached, nothing pinned, and no packet goes anywhere.
//!
//! Every check is made for IPv4 and IPv6, on a device with Ethernet and on one without link-layer header.

mod cases;
mod connection;
#[cfg(test)]
mod cost;
mod segment;

use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use self::{
    cases::{Test, fail_closed, header_added, header_retransmitted, header_waits, shifted, swept},
    connection::{Bench, Way},
    segment::Link,
};
use crate::engine::{
    bpf::reports,
    check::{Check, ProgramReport},
};

/// Runs all checks, and says what the programs cost the verifier. The engine may be used if all passed.
#[must_use]
pub fn run() -> (Vec<Check>, Vec<ProgramReport>) {
    // What `client_in` remembers is the processor's. This thread stays on one, and ends here.
    let on_one = std::thread::scope(|scope| scope.spawn(on_one_processor).join());
    on_one.unwrap_or_else(|_| {
        let fault = Err("the thread that ran it panicked".to_owned());
        (vec![Check { name: "load", result: fault, took: Duration::ZERO }], Vec::new())
    })
}

fn on_one_processor() -> (Vec<Check>, Vec<ProgramReport>) {
    let start = Instant::now();
    let mut only = CpuSet::new();
    only.set(sched_getcpu());
    let loaded = sched_setaffinity(None, &only)
        .map_err(|error| format!("staying on one processor: {error}"))
        .and_then(|()| Bench::load().map_err(|error| error.to_string()));
    let bench = match loaded {
        Ok(bench) => bench,
        Err(fault) => {
            return (vec![Check { name: "load", result: Err(fault), took: start.elapsed() }], Vec::new());
        }
    };
    let seen = "programs verified, maps made".to_owned();
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
        ("swept", swept, "a connection that has ended is taken out, and no other"),
    ];
    for (number, (name, test, seen)) in (0..).zip(tests) {
        let start = Instant::now();
        let result = everywhere(&bench, number, test).map(|()| seen.to_owned());
        checks.push(Check { name, result, took: start.elapsed() });
    }
    (checks, reports(&bench.programs))
}

/// For each family and kind of device, over connections that nobody else uses.
fn everywhere(bench: &Bench, number: u16, test: Test) -> Result<(), String> {
    for ipv6 in [false, true] {
        for (link, base) in [(Link::Ethernet, 40_000), (Link::Raw, 50_000)] {
            let way = Way::new(bench, ipv6, link, base + number);
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            test(&way).map_err(|fault| format!("{family}, {link:?}: {fault}"))?;
        }
    }
    Ok(())
}
