//! What the programs cost: nanoseconds a segment, by `BPF_PROG_TEST_RUN`, also with many connections in
//! the maps, and what these take of memory. As root:
//! `cargo test -p injector-user --lib inline::selftest::cost -- --ignored --nocapture`.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use injector_common::inline::{ACK, PSH, Phase, SYN};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use super::{
    connection::{
        BACKEND, Connection, FIRST, FIRST_OF_BACKEND, PROXY_PORT, PUBLIC, Programs, SERVER_FIRST, place,
    },
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

/// Four million runs of the program, 0.6 GiB of memory, and minutes.
#[test]
#[ignore = "measures, and needs root"]
fn with_many_connections() {
    let curve = || {
        stay_here();
        for connections in [1_000, 65_536, 1_000_000] {
            point(connections);
        }
    };
    std::thread::scope(|scope| scope.spawn(curve).join()).unwrap();
}

/// Keeps this thread on its processor.
fn stay_here() {
    let mut only = CpuSet::new();
    only.set(sched_getcpu());
    sched_setaffinity(None, &only).unwrap();
}

fn measure() {
    stay_here();
    let programs = Programs::load().unwrap();
    for report in reports(&programs.programs) {
        println!("{report:?}");
    }
    for ipv6 in [false, true] {
        let connection = Connection::new(&programs, ipv6, Link::Ethernet, 10_000);
        connection.acknowledge().unwrap();
        let data = Segment { payload: vec![7; 1000], ..connection.client_segment(ACK | PSH) };
        let answer = connection.backend_segment(ACK, connection.behind_header(FIRST.wrapping_add(1000)));
        let other = Connection { public: 26, ..connection.with_port(10_000) };
        for (what, segment) in [
            ("another's segment", other.client_segment(ACK)),
            ("a SYN for another port", other.client_segment(SYN)),
            ("1,000 bytes of the client", data.clone()),
            ("an acknowledgement of the backend", answer.clone()),
            ("1,000 bytes of the backend", Segment { payload: data.payload.clone(), ..answer }),
        ] {
            let packet = segment.packet().unwrap();
            let took = (0..RUNS).map(|_| programs.time(&packet)).collect();
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            println!("{family}, {what}: {}", spread(took));
        }
    }
}

fn spread(mut took: Vec<Duration>) -> String {
    took.sort_unstable();
    let part = |tenths: usize| took[took.len() * tenths / 10].as_nanos();
    format!("{} ns (tenth {})", part(5), part(1))
}

/// One point of the curve: with so many connections.
fn point(connections: u32) {
    let slots = connections + 1;
    // 256 addresses, so that there are enough ports.
    let sources: Vec<u16> = (0xF000..0xF100).collect();
    let programs = Programs::with_room(slots, &sources).unwrap();
    println!("{connections} connections: {}", memory(slots, connections));
    let begun = Instant::now();
    let mut opening = Vec::new();
    let opened: Vec<_> = (0..connections)
        .map(|number| {
            let (opened, took) = Opened::open(&programs, number);
            opening.push(took);
            opened
        })
        .collect();
    assert_eq!(programs.maps.flows_in(Phase::Established).count(), opened.len());
    println!("  opened in {:.1} s", begun.elapsed().as_secs_f64());
    println!(
        "  a SYN, the last of them: {}",
        spread(opening.split_off(opening.len() - opening.len().min(RUNS)))
    );
    // A stride without a common factor goes to all of them, in an order that no cache foresees.
    for (what, stride) in [("of one connection", 0), ("of all in turn", 7_368_787)] {
        for (kind, segment) in [
            ("1,000 bytes of the client", Opened::data as fn(&Opened) -> Segment),
            ("an acknowledgement of the backend", Opened::acknowledgement),
        ] {
            let which = |run: usize| &opened[run * stride % opened.len()];
            let took = (0..RUNS).map(|run| programs.time(&segment(which(run)).packet().unwrap()));
            println!("  {kind}, {what}: {}", spread(took.collect()));
        }
    }
}

/// An established connection, its header acknowledged.
struct Opened {
    client: SocketAddr,
    /// Where the backend answers to.
    edge: SocketAddr,
    /// The sequence number that the backend expects next.
    next: u32,
}

impl Opened {
    /// Opens the one with this number; also how long the program took for the SYN.
    fn open(programs: &Programs, number: u32) -> (Self, Duration) {
        const HOSTS: u32 = 60_000;
        const FIRST_HOST: u32 = 1000;
        let host = u16::try_from(FIRST_HOST + number % HOSTS).unwrap();
        let client = place(false, host, u16::try_from(10_000 + number / HOSTS).unwrap());
        let sent = |segment: &Segment| {
            let mut out = vec![0; 512];
            let packet = segment.packet().unwrap();
            let took = programs.time_into(&packet, &mut out);
            (Segment::read(&out, Link::Ethernet), took)
        };
        let opened = Self { client, edge: client, next: 0 };
        let syn = Segment { sequence: FIRST.wrapping_sub(1), ..opened.client_segment(SYN) };
        let (seen, took) = sent(&syn);
        let seen = seen.unwrap();
        let opened = Self { edge: seen.source, next: seen.sequence.wrapping_add(1), ..opened };
        let _ = sent(&Segment {
            sequence: FIRST_OF_BACKEND.wrapping_sub(1),
            ..opened.backend_segment(SYN | ACK)
        });
        let header = sent(&opened.client_segment(ACK)).0.unwrap().payload;
        let opened = Self { next: opened.next.wrapping_add(u32::try_from(header.len()).unwrap()), ..opened };
        let _ = sent(&opened.backend_segment(ACK));
        (opened, took)
    }

    fn segment(source: SocketAddr, destination: SocketAddr, flags: u8) -> Segment {
        Segment {
            ethernet: Some([[0; 6], [2, 0, 0, 0, 0, 2]]),
            source,
            destination,
            sequence: FIRST,
            acknowledgement: 0,
            flags,
            window: 60_000,
            options: Vec::new(),
            payload: Vec::new(),
        }
    }

    fn client_segment(&self, flags: u8) -> Segment {
        let acknowledgement = if flags & ACK == 0 { 0 } else { FIRST_OF_BACKEND };
        let public = place(false, PUBLIC, SERVER_FIRST);
        Segment { acknowledgement, ..Self::segment(self.client, public, flags) }
    }

    fn backend_segment(&self, flags: u8) -> Segment {
        let backend = place(false, BACKEND, PROXY_PORT);
        let (sequence, acknowledgement) = (FIRST_OF_BACKEND, self.next);
        Segment { sequence, acknowledgement, ..Self::segment(backend, self.edge, flags) }
    }

    fn data(&self) -> Segment {
        Segment { payload: vec![7; 1000], ..self.client_segment(ACK | PSH) }
    }

    /// Of those bytes.
    fn acknowledgement(&self) -> Segment {
        Segment { acknowledgement: self.next.wrapping_add(1000), ..self.backend_segment(ACK) }
    }
}

/// What the kernel reports of the maps that grow with the number of connections.
fn memory(slots: u32, connections: u32) -> String {
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fdinfo").unwrap().flatten() {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|value| value.trim().parse::<u64>().ok())
        };
        let Some((id, bytes)) = field("map_id").zip(field("memlock")) else { continue };
        if field("max_entries").is_some_and(|entries| [slots, 2 * slots].map(u64::from).contains(&entries)) {
            maps.insert(id, bytes);
        }
    }
    let bytes: u64 = maps.values().sum();
    format!("{bytes} bytes in {} maps, {} for each", maps.len(), bytes / u64::from(connections))
}

impl Programs {
    fn time(&self, packet: &[u8]) -> Duration {
        let program: &SchedClassifier = self.programs.program("inline").unwrap().try_into().unwrap();
        let options = TestRunOptions { data_in: Some(packet), ..TestRunOptions::default() };
        program.test_run(options).unwrap().duration
    }

    /// Also what has become of the packet.
    fn time_into(&self, packet: &[u8], out: &mut Vec<u8>) -> Duration {
        let program: &SchedClassifier = self.programs.program("inline").unwrap().try_into().unwrap();
        let options =
            TestRunOptions { data_in: Some(packet), data_out: Some(out), ..TestRunOptions::default() };
        let ran = program.test_run(options).unwrap();
        out.truncate(usize::try_from(ran.data_size_out).unwrap());
        ran.duration
    }
}
