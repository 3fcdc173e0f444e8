//! Drives the inline engine's real programs over packets made here, by `BPF_PROG_TEST_RUN`, with maps of their own: nothing is
//! attached, nothing pinned, and no packet goes anywhere.
//!
//! Every check is made for IPv4 and IPv6, on a device with Ethernet and on one without link-layer header.

#[cfg(test)]
mod cost;
mod segment;

use std::{
    cell::Cell,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use injector_common::{
    inline::{ACK, ClosedFlow, Key, PSH, SYN},
    proxy,
};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use self::segment::{Link, Segment};
use super::{
    maps::{Maps, Services},
    programs::{LoadError, load_programs, sweep, template},
};
use crate::{
    config::Receiver,
    engine::{
        bpf::reports,
        check::{Check, ProgramReport},
    },
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

type Test = fn(&Way<'_>) -> Result<(), String>;

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

/// The programs with maps of their own.
struct Bench {
    programs: Ebpf,
    maps: Maps,
}

/// The verdicts of a tc program (include/uapi/linux/pkt_cls.h); `TC_ACT_UNSPEC` is -1.
const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;

/// The loopback device, over which a test run goes.
const LOOPBACK: u32 = 1;
/// Some other device that a packet came by: it was forwarded.
const ELSEWHERE: u32 = 2;

impl Bench {
    fn load() -> Result<Self, LoadError> {
        let mut loader = EbpfLoader::new();
        loader
            .map_max_entries("LISTENERS", 16)
            .map_max_entries("BACKENDS", 16)
            .map_max_entries("TEMPLATES", 4)
            .map_max_entries("PENDING", 1024)
            .map_max_entries("FLOWS", 1024)
            .override_global("SELF_TEST", &1_u32, true);
        let (programs, maps) = load_programs(&mut loader)?;
        let both = |host: u16, port: u16| [false, true].map(|ipv6| place(ipv6, host, port));
        let failed = |what| LoadError::Listener { listener: "self-test".to_owned(), what };
        let mut services = Services { backends: both(BACKEND, 2525).to_vec(), ..Services::default() };
        for (id, (port, waits)) in (0..).zip([(SERVER_FIRST, false), (CLIENT_FIRST, true)]) {
            services.listen.extend(both(PUBLIC, port).map(|address| (address, id)));
            for ipv6 in [false, true] {
                services.templates.push(template(&Receiver::default(), ipv6, waits).map_err(failed)?);
            }
        }
        maps.replace(&services)?;
        Ok(Self { programs, maps })
    }

    /// Runs a program once; `from` is the device that the packet came by, 0 if it began here.
    fn run(&self, program: &str, packet: &[u8], from: u32, mark: u32) -> Result<Ran, String> {
        let program: &SchedClassifier = self
            .programs
            .program(program)
            .ok_or_else(|| format!("no program {program}"))?
            .try_into()
            .map_err(|error| format!("{program}: {error}"))?;
        // The beginning of struct __sk_buff, include/uapi/linux/bpf.h; the kernel takes the rest for zero.
        let mut context = [0_u8; 44];
        for (field, value) in [(2, mark), (9, from), (10, LOOPBACK)] {
            let place = context.get_mut(field * 4..field * 4 + 4).ok_or("no such field")?;
            place.copy_from_slice(&value.to_ne_bytes());
        }
        // It gives back the whole structure of its own version, which must fit.
        let (mut out, mut context_out) = (vec![0; 2048], [0_u8; 512]);
        let ran = program.test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ctx_out: Some(&mut context_out),
            ..TestRunOptions::default()
        });
        let ran = ran.map_err(|error| format!("BPF_PROG_TEST_RUN: {}", crate::engine::bpf::chain(&error)))?;
        out.truncate(usize::try_from(ran.data_size_out).map_err(|error| error.to_string())?);
        let (words, _) = context_out.as_chunks::<4>();
        let mark = words.get(2).copied().map_or(0, u32::from_ne_bytes);
        Ok(Ran { verdict: ran.return_value, packet: out, mark })
    }
}

/// What a program made of a packet.
struct Ran {
    verdict: u32,
    packet: Vec<u8>,
    mark: u32,
}

/// The hosts of a test, by the last part of their address.
const CLIENT: u16 = 7;
const PUBLIC: u16 = 10;
const EDGE: u16 = 1;
const BACKEND: u16 = 2;

/// The ports of two listeners, by who speaks first there.
const SERVER_FIRST: u16 = 25;
const CLIENT_FIRST: u16 = 993;

/// A test run reads the type of a packet where Ethernet has it, also for a program that expects no Ethernet: addresses that
/// begin with the type have it there by themselves. Nothing is ever sent to them.
fn place(ipv6: bool, host: u16, port: u16) -> SocketAddr {
    let ip = if ipv6 {
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x86DD, 0, 0, 0, 0, host))
    } else {
        let [high, low] = host.to_be_bytes();
        IpAddr::V4(Ipv4Addr::new(0x08, 0x00, high, low))
    };
    SocketAddr::new(ip, port)
}

/// One connection's way through the host.
struct Way<'a> {
    bench: &'a Bench,
    ipv6: bool,
    link: Link,
    /// The client's, and the edge's.
    port: u16,
    /// The listener's.
    public: u16,
    /// What the programs add to the client's numbers: [`Flow::offset`], read off the SYN.
    offset: Cell<u32>,
}

/// The numbers of the client's first byte and of the backend's: adding the header to the one wraps round.
const FIRST: u32 = u32::MAX - 9;
const FIRST_OF_BACKEND: u32 = 7000;
const WINDOW: u16 = 60_000;

impl<'a> Way<'a> {
    fn new(bench: &'a Bench, ipv6: bool, link: Link, port: u16) -> Self {
        Self { bench, ipv6, link, port, public: SERVER_FIRST, offset: Cell::new(0) }
    }

    /// The same with another port of the client.
    fn at(&self, port: u16) -> Self {
        Self { port, offset: Cell::new(0), ..*self }
    }

    /// One of the client's numbers as the backend counts.
    fn there(&self, number: u32) -> u32 {
        number.wrapping_add(self.offset.get())
    }

    fn segment(&self, [source, destination]: [SocketAddr; 2], flags: u8) -> Segment {
        let ethernet = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
        Segment {
            ethernet: (self.link == Link::Ethernet).then_some(ethernet),
            source,
            destination,
            sequence: FIRST,
            acknowledgement: 0,
            flags,
            window: WINDOW,
            options: Vec::new(),
            payload: Vec::new(),
        }
    }

    /// From the client, before NAT.
    fn of_client(&self, flags: u8) -> Segment {
        self.segment([self.client(), self.public()], flags)
    }

    /// The same behind NAT.
    fn to_backend(&self, flags: u8) -> Segment {
        let ends = [place(self.ipv6, EDGE, self.port), place(self.ipv6, BACKEND, 2525)];
        let acknowledgement = FIRST_OF_BACKEND;
        Segment { acknowledgement, ..self.segment(ends, flags) }
    }

    /// What the backend answers.
    fn of_backend(&self, flags: u8, acknowledgement: u32) -> Segment {
        let ends = [place(self.ipv6, BACKEND, 2525), place(self.ipv6, EDGE, self.port)];
        Segment { sequence: FIRST_OF_BACKEND, acknowledgement, ..self.segment(ends, flags) }
    }

    fn client(&self) -> SocketAddr {
        place(self.ipv6, CLIENT, self.port)
    }

    fn public(&self) -> SocketAddr {
        place(self.ipv6, PUBLIC, self.public)
    }

    fn header_len(&self) -> u32 {
        if self.ipv6 { 52 } else { 28 }
    }

    /// Runs a program of this way's kind of device over a packet that came from elsewhere.
    fn run(&self, program: &str, segment: &Segment) -> Result<Ran, String> {
        self.run_with(program, segment, ELSEWHERE, 0)
    }

    fn run_with(&self, program: &str, segment: &Segment, from: u32, mark: u32) -> Result<Ran, String> {
        let variant = match self.link {
            Link::Ethernet => program.to_owned(),
            Link::Raw => format!("{program}_raw"),
        };
        let ran = self.bench.run(&variant, &segment.packet()?, from, mark);
        ran.map_err(|fault| format!("{variant}: {fault}"))
    }

    /// The program lets the segment go on, in this form.
    fn becomes(&self, program: &str, what: &str, sent: &Segment, expected: &Segment) -> Result<(), String> {
        let ran = self.run(program, sent)?;
        self.is(&ran, NEXT, program, what, expected)
    }

    fn is(
        &self,
        ran: &Ran,
        verdict: u32,
        program: &str,
        what: &str,
        segment: &Segment,
    ) -> Result<(), String> {
        if ran.verdict != verdict {
            return Err(format!("{program} gave verdict {} for {what}", ran.verdict.cast_signed()));
        }
        let seen = Segment::read(&ran.packet, self.link).map_err(|fault| format!("{what}: {fault}"))?;
        if seen == *segment {
            return Ok(());
        }
        Err(format!("{program} made {seen:?} of {what}, and should have made {segment:?}"))
    }

    /// The SYN, to `backend_out`.
    fn open(&self) -> Result<(), String> {
        let mut syn = self.of_client(SYN);
        syn.sequence = FIRST.wrapping_sub(1);
        let mut forwarded = self.to_backend(SYN);
        (forwarded.sequence, forwarded.acknowledgement) = (syn.sequence, 0);
        let seen = self.run("client_in", &syn)?;
        self.is(&seen, NEXT, "client_in", "a SYN", &syn)?;
        if seen.mark == 0 {
            return Err("client_in gives a SYN no token".to_owned());
        }
        let ran = self.run_with("backend_out", &forwarded, ELSEWHERE, seen.mark)?;
        let left = Segment::read(&ran.packet, self.link)?;
        self.offset.set(left.sequence.wrapping_sub(forwarded.sequence));
        forwarded.sequence = left.sequence;
        self.is(&ran, NEXT, "backend_out", "a SYN that client_in has seen", &forwarded)?;
        // The token is good for one packet.
        let again = self.run_with("backend_out", &forwarded, ELSEWHERE, seen.mark)?;
        if again.verdict == DROP { Ok(()) } else { Err("a token lets two packets through".to_owned()) }
    }

    /// To the backend's answer, in which the header takes the first of the window.
    fn accept(&self) -> Result<(), String> {
        self.open()?;
        let answer = self.of_backend(SYN | ACK, self.there(FIRST));
        let answer = Segment { sequence: FIRST_OF_BACKEND.wrapping_sub(1), ..answer };
        let window = u32::from(WINDOW) - self.header_len();
        let window = u16::try_from(window).unwrap_or(0);
        let smaller = Segment { window, acknowledgement: FIRST, ..answer.clone() };
        self.becomes("backend_in", "a SYN-ACK", &answer, &smaller)
    }

    /// To the end of the handshake; returns the header that was put into it.
    fn establish(&self) -> Result<Vec<u8>, String> {
        self.accept()?;
        let ack = self.to_backend(ACK);
        let ran = self.run("backend_out", &ack)?;
        let longer = Segment::read(&ran.packet, self.link)
            .map_err(|fault| format!("the end of the handshake: {fault}"))?;
        let header = longer.payload;
        let (sequence, flags) = (self.there(FIRST), longer.flags & PSH | ack.flags);
        let expected = Segment { payload: header.clone(), sequence, flags, ..ack };
        self.is(&ran, NEXT, "backend_out", "the end of the handshake", &expected)?;
        Ok(header)
    }

    /// To the backend's acknowledgement of the header, of which the client hears nothing new.
    fn acknowledge(&self) -> Result<(), String> {
        self.establish()?;
        let ack = self.of_backend(ACK, self.there(FIRST.wrapping_add(self.header_len())));
        let ran = self.run("backend_in", &ack)?;
        if ran.verdict == DROP { Ok(()) } else { Err("the client hears of the header".to_owned()) }
    }

    /// These bytes are the header of this way's client, and no more.
    fn is_header(&self, header: &[u8]) -> Result<(), String> {
        let parsed = proxy::parse(header).map_err(|error| format!("no header in {header:02x?}: {error}"))?;
        let addresses = parsed.command.addresses().ok_or("a header without addresses")?;
        if parsed.len != header.len() || header.len() != self.header_len() as usize {
            return Err(format!("a header of {} bytes in {}", parsed.len, header.len()));
        }
        let (source, destination) = (addresses.source(), addresses.destination());
        if (source, destination) == (self.client(), self.public()) {
            return Ok(());
        }
        Err(format!("the header says that {source} connected to {destination}"))
    }
}

fn header_added(way: &Way<'_>) -> Result<(), String> {
    way.is_header(&way.establish()?)
}

fn header_waits(way: &Way<'_>) -> Result<(), String> {
    let way = &Way { public: CLIENT_FIRST, ..way.at(way.port) };
    way.accept()?;
    let ack = way.run("backend_out", &way.to_backend(ACK))?;
    if ack.verdict != DROP {
        return Err("the end of the handshake does not wait for the client's first bytes".to_owned());
    }
    let data = Segment { payload: b"ClientHello".to_vec(), ..way.to_backend(ACK | PSH) };
    let ran = way.run("backend_out", &data)?;
    let longer = Segment::read(&ran.packet, way.link).map_err(|fault| format!("the first bytes: {fault}"))?;
    let header =
        longer.payload.strip_suffix(b"ClientHello").ok_or("the client's first bytes are not the last")?;
    way.is_header(header)?;
    let expected = Segment { payload: longer.payload.clone(), sequence: way.there(FIRST), ..data };
    way.is(&ran, NEXT, "backend_out", "the client's first bytes", &expected)?;
    // One that says nothing repeats its answer when the backend asks, and that takes the header.
    let way = &way.at(way.port + 1000);
    way.accept()?;
    way.run("backend_out", &way.to_backend(ACK))?;
    let repeated = way.run("backend_out", &way.to_backend(ACK))?;
    let longer = Segment::read(&repeated.packet, way.link).map_err(|fault| format!("repeated: {fault}"))?;
    way.is_header(&longer.payload)
}

fn shifted(way: &Way<'_>) -> Result<(), String> {
    // An acknowledgement of the header that says more goes on.
    way.establish()?;
    let first = way.there(FIRST.wrapping_add(way.header_len()));
    let closed = Segment { window: 0, ..way.of_backend(ACK, first) };
    let earlier = Segment { acknowledgement: FIRST, ..closed.clone() };
    way.becomes("backend_in", "the acknowledgement of the header, with a closed window", &closed, &earlier)?;
    let way = &way.at(way.port + 2000);
    way.establish()?;
    let first = way.there(FIRST.wrapping_add(way.header_len()));
    let lacks = |first: u32| Segment {
        options: sack(first.wrapping_add(100), first.wrapping_add(200)),
        ..way.of_backend(ACK, first)
    };
    way.becomes(
        "backend_in",
        "the acknowledgement of the header, with a SACK block",
        &lacks(first),
        &lacks(FIRST),
    )?;
    let way = &way.at(way.port + 2000);
    way.acknowledge()?;
    let len = way.header_len();
    let data = Segment { payload: b"EHLO client\r\n".to_vec(), ..way.to_backend(ACK | PSH) };
    let later = Segment { sequence: way.there(FIRST.wrapping_add(len)), ..data.clone() };
    way.becomes("backend_out", "data of the client", &data, &later)?;

    // The client's first byte is missing, and some of what follows is there.
    let first = way.there(FIRST.wrapping_add(len));
    let answer = |first: u32| Segment {
        acknowledgement: first,
        options: [timestamps(5, 6), sack(first.wrapping_add(100), first.wrapping_add(200))].concat(),
        payload: b"220 backend\r\n".to_vec(),
        ..way.of_backend(ACK | PSH, 0)
    };
    way.becomes("backend_in", "data and a SACK block of the backend", &answer(first), &answer(FIRST))?;
    let bare = |first: u32| Segment {
        options: [vec![1, 1], sack_option(first.wrapping_add(100), first.wrapping_add(200))].concat(),
        ..way.of_backend(ACK, first)
    };
    way.becomes("backend_in", "a SACK block without timestamps", &bare(first), &bare(FIRST))
}

fn timestamps(value: u32, echo: u32) -> Vec<u8> {
    [&[1, 1, 8, 10][..], &value.to_be_bytes(), &echo.to_be_bytes()].concat()
}

fn sack(left: u32, right: u32) -> Vec<u8> {
    [vec![1, 1], sack_option(left, right)].concat()
}

fn sack_option(left: u32, right: u32) -> Vec<u8> {
    [&[5, 10][..], &left.to_be_bytes(), &right.to_be_bytes()].concat()
}

fn header_retransmitted(way: &Way<'_>) -> Result<(), String> {
    // The header was sent and lost. The client's data comes, and the backend asks for what is before it.
    let header = way.establish()?;
    let data = way.header_len();
    let first = way.there(FIRST.wrapping_add(data));
    let question = Segment {
        options: [timestamps(0x0A0B_0C0D, 0x0102_0304), sack(first, first.wrapping_add(13))].concat(),
        ..way.of_backend(ACK, way.there(FIRST))
    };
    let ran = way.run("backend_in", &question)?;
    let answer = Segment {
        // It goes back where it came from.
        ethernet: question.ethernet.map(|[destination, source]| [source, destination]),
        options: timestamps(0x0102_0304, 0x0A0B_0C0D),
        payload: header,
        sequence: way.there(FIRST),
        ..way.to_backend(ACK | PSH)
    };
    way.is(&ran, REDIRECT, "backend_in", "a question for the header", &answer)?;
    // On its way out it is known by its mark, and has its numbers already.
    let left = way.run_with("backend_out", &answer, LOOPBACK, ran.mark)?;
    way.is(&left, NEXT, "backend_out", "the answer", &answer)?;
    if left.mark != 0 {
        return Err(format!("the answer leaves with the mark {:#x}", left.mark));
    }
    // The mark alone opens no way: not on a packet of another device.
    let elsewhere = way.at(way.port + 1000);
    let ran = way.run_with("backend_out", &elsewhere.to_backend(ACK), ELSEWHERE, ran.mark)?;
    if ran.verdict == DROP { Ok(()) } else { Err("a mark opens the way for what has no flow".to_owned()) }
}

fn fail_closed(way: &Way<'_>) -> Result<(), String> {
    // Nobody has seen its SYN.
    for (what, segment) in [
        ("a SYN that client_in has not seen", way.to_backend(SYN)),
        ("the end of a handshake without a flow", way.to_backend(ACK)),
        ("data without a flow", Segment { payload: b"QUIT\r\n".to_vec(), ..way.to_backend(ACK | PSH) }),
    ] {
        let ran = way.run("backend_out", &segment)?;
        if ran.verdict != DROP {
            return Err(format!("backend_out gave verdict {} for {what}", ran.verdict.cast_signed()));
        }
        let ran = way.run_with("backend_out", &segment, 0, 0)?;
        way.is(&ran, NEXT, "backend_out", &format!("{what}, from this host itself"), &segment)?;
    }
    // A connection of this host itself may have the ports of one that was forwarded: nothing is translated, and with its SYN
    // the other is over.
    let way = &way.at(way.port + 2000);
    way.acknowledge()?;
    let data = Segment { payload: b"QUIT\r\n".to_vec(), ..way.to_backend(ACK | PSH) };
    let ran = way.run_with("backend_out", &data, 0, 0)?;
    way.is(&ran, NEXT, "backend_out", "data of this host itself on a forwarded connection's ports", &data)?;
    let syn = Segment { acknowledgement: 0, ..way.to_backend(SYN) };
    let ran = way.run_with("backend_out", &syn, 0, 0)?;
    way.is(&ran, NEXT, "backend_out", "a SYN of this host itself on a forwarded connection's ports", &syn)?;
    let ran = way.run("backend_out", &data)?;
    if ran.verdict == DROP {
        Ok(())
    } else {
        Err("a forwarded connection has the ports of this host's".to_owned())
    }
}

fn swept(way: &Way<'_>) -> Result<(), String> {
    let flow = || {
        let mut flows = way.bench.maps.flows().into_iter();
        flows.find(|(key, _)| key.source.port == way.port)
    };
    let sweep = |ended: &[ClosedFlow]| {
        let swept = sweep(&way.bench.programs, ended);
        swept.map_err(|error| format!("sweep: BPF_PROG_TEST_RUN: {}", crate::engine::bpf::chain(&error)))
    };
    way.acknowledge()?;
    let (key, flow_now) = flow().ok_or("there is no flow to sweep")?;
    let ended = ClosedFlow::new(key, &flow_now);
    // One that had the same ports, the same one seen before its last packet, and as many that are not there as can be listed.
    let mut others = vec![ClosedFlow { key: Key::default(), ..ended }; ClosedFlow::MOST - 2];
    others.push(ClosedFlow { created_ns: ended.created_ns - 1, ..ended });
    others.push(ClosedFlow { last_ns: ended.last_ns - 1, ..ended });
    if sweep(&others)? != 0 || flow().is_none() {
        return Err("sweep has taken out a connection that goes on".to_owned());
    }
    others.pop();
    others.push(ended);
    if sweep(&others)? != 1 || flow().is_some() {
        return Err("sweep has not taken out a connection that has ended".to_owned());
    }
    Ok(())
}
