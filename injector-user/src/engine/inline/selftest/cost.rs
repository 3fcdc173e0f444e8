//! What the programs cost: nanoseconds a segment, by `BPF_PROG_TEST_RUN`. As root:
//! `cargo test -p injector-user --lib inline::selftest::cost -- --ignored --nocapture`.

use std::time::Duration;

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use injector_common::inline::{ACK, PSH, SYN};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use super::{
    connection::{Bench, ELSEWHERE, FIRST, LOOPBACK, Way},
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
    let bench = Bench::load().unwrap();
    for report in reports(&bench.programs) {
        println!("{report:?}");
    }
    // Before the many SYNs with one number, which would be disputed.
    let ways = [false, true].map(|ipv6| Way::new(&bench, ipv6, Link::Ethernet, 40_000));
    ways.iter().for_each(|way| way.acknowledge().unwrap());
    for way in &ways {
        let data = Segment { payload: vec![7; 1000], ..way.to_backend(ACK | PSH) };
        let end = way.there(FIRST.wrapping_add(way.header_len()).wrapping_add(1000));
        let ack = way.of_backend(ACK, end);
        let syn = Segment { sequence: FIRST.wrapping_sub(1), ..way.of_client(SYN) };
        for (what, program, segment) in [
            ("another's segment", "client_in", way.of_client(ACK)),
            ("a SYN", "client_in", syn),
            ("1,000 bytes", "backend_out", data.clone()),
            ("an acknowledgement", "backend_in", ack.clone()),
            ("1,000 bytes", "backend_in", Segment { payload: data.payload.clone(), ..ack }),
        ] {
            let packet = segment.packet().unwrap();
            let mut took: Vec<_> = (0..RUNS).map(|_| bench.time(program, &packet).as_nanos()).collect();
            took.sort_unstable();
            let family = if way.ipv6 { "IPv6" } else { "IPv4" };
            println!("{family} {program}, {what}: {} ns (tenth {})", took[RUNS / 2], took[RUNS / 10]);
        }
    }
}

impl Bench {
    fn time(&self, program: &str, packet: &[u8]) -> Duration {
        let program: &SchedClassifier = self.programs.program(program).unwrap().try_into().unwrap();
        let mut context = [0_u8; 44];
        for (field, value) in [(9, ELSEWHERE), (10, LOOPBACK)] {
            context[field * 4..field * 4 + 4].copy_from_slice(&value.to_ne_bytes());
        }
        let options =
            TestRunOptions { data_in: Some(packet), ctx_in: Some(&context), ..TestRunOptions::default() };
        program.test_run(options).unwrap().duration
    }
}
