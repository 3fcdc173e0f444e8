//! What the programs cost: nanoseconds a segment, by `BPF_PROG_TEST_RUN`. As root:
//! `cargo test -p injector-user --lib inline::selftest::cost -- --ignored --nocapture`.

use std::time::Duration;

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use injector_common::inline::{ACK, PSH, SYN};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use super::{
    connection::{Connection, FIRST, LOOPBACK, OTHER_DEVICE, Programs},
    segment::{Link, Segment},
};
use crate::engine::bpf::reports;

/// Runs of each; the median counts.
const RUNS: usize = 20_000;

#[test]
#[ignore = "measures, and needs root"]
fn of_each_segment() {
    std::thread::scope(|scope| scope.spawn(measure).join()).unwrap();
}

fn measure() {
    let mut only = CpuSet::new();
    only.set(sched_getcpu());
    sched_setaffinity(None, &only).unwrap();
    let programs = Programs::load().unwrap();
    for report in reports(&programs.programs) {
        println!("{report:?}");
    }
    // Before the many SYNs with the same sequence number, which the program would treat as
    // disputed.
    let connections = [false, true].map(|ipv6| Connection::new(&programs, ipv6, Link::Ethernet, 40_000));
    connections.iter().for_each(|connection| connection.acknowledge().unwrap());
    for connection in &connections {
        let data = Segment { payload: vec![7; 1000], ..connection.to_backend(ACK | PSH) };
        let end = connection.backend_sequence(FIRST.wrapping_add(connection.header_len()).wrapping_add(1000));
        let ack = connection.backend_segment(ACK, end);
        let syn = Segment { sequence: FIRST.wrapping_sub(1), ..connection.client_segment(SYN) };
        for (what, program, segment) in [
            ("another's segment", "client_in", connection.client_segment(ACK)),
            ("a SYN", "client_in", syn),
            ("1,000 bytes", "backend_out", data.clone()),
            ("an acknowledgement", "backend_in", ack.clone()),
            ("1,000 bytes", "backend_in", Segment { payload: data.payload.clone(), ..ack }),
        ] {
            let packet = segment.packet().unwrap();
            let mut took: Vec<_> = (0..RUNS).map(|_| programs.time(program, &packet).as_nanos()).collect();
            took.sort_unstable();
            let family = if connection.ipv6 { "IPv6" } else { "IPv4" };
            println!("{family} {program}, {what}: {} ns (tenth {})", took[RUNS / 2], took[RUNS / 10]);
        }
    }
}

impl Programs {
    fn time(&self, program: &str, packet: &[u8]) -> Duration {
        let program: &SchedClassifier = self.programs.program(program).unwrap().try_into().unwrap();
        let mut context = [0_u8; 44];
        for (field, value) in [(9, OTHER_DEVICE), (10, LOOPBACK)] {
            context[field * 4..field * 4 + 4].copy_from_slice(&value.to_ne_bytes());
        }
        let options =
            TestRunOptions { data_in: Some(packet), ctx_in: Some(&context), ..TestRunOptions::default() };
        program.test_run(options).unwrap().duration
    }
}
