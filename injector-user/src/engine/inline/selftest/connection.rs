//! One TCP connection over the real programs, each run once by `BPF_PROG_TEST_RUN`.

use std::{
    cell::Cell,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use injector_common::{
    inline::{ACK, PSH, SYN},
    proxy,
};

use super::segment::{Link, Segment};
use crate::{
    config::Receiver,
    engine::inline::{
        maps::{Maps, Services},
        programs::{LoadError, load_programs, template},
    },
};

/// The programs with maps of their own.
pub(super) struct Bench {
    pub(super) programs: Ebpf,
    pub(super) maps: Maps,
}

/// The verdicts of a tc program (include/uapi/linux/pkt_cls.h); `TC_ACT_UNSPEC` is -1.
pub(super) const NEXT: u32 = u32::MAX;
pub(super) const DROP: u32 = 2;
pub(super) const REDIRECT: u32 = 7;

/// The loopback device, over which a test run goes.
pub(super) const LOOPBACK: u32 = 1;
/// Some other device that a packet came by: it was forwarded.
pub(super) const ELSEWHERE: u32 = 2;

impl Bench {
    pub(super) fn load() -> Result<Self, LoadError> {
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
    pub(super) fn run(&self, program: &str, packet: &[u8], from: u32, mark: u32) -> Result<Ran, String> {
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
pub(super) struct Ran {
    pub(super) verdict: u32,
    pub(super) packet: Vec<u8>,
    pub(super) mark: u32,
}

/// The hosts of a test, by the last part of their address.
pub(super) const CLIENT: u16 = 7;
pub(super) const PUBLIC: u16 = 10;
pub(super) const EDGE: u16 = 1;
pub(super) const BACKEND: u16 = 2;

/// The ports of two listeners, by who speaks first there.
pub(super) const SERVER_FIRST: u16 = 25;
pub(super) const CLIENT_FIRST: u16 = 993;

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
pub(super) struct Way<'a> {
    pub(super) bench: &'a Bench,
    pub(super) ipv6: bool,
    pub(super) link: Link,
    /// The client's, and the edge's.
    pub(super) port: u16,
    /// The listener's.
    pub(super) public: u16,
    /// What the programs add to the client's numbers: [`Flow::offset`], read off the SYN.
    pub(super) offset: Cell<u32>,
}

/// The numbers of the client's first byte and of the backend's: adding the header to the one wraps round.
pub(super) const FIRST: u32 = u32::MAX - 9;
pub(super) const FIRST_OF_BACKEND: u32 = 7000;
pub(super) const WINDOW: u16 = 60_000;

impl<'a> Way<'a> {
    pub(super) fn new(bench: &'a Bench, ipv6: bool, link: Link, port: u16) -> Self {
        Self { bench, ipv6, link, port, public: SERVER_FIRST, offset: Cell::new(0) }
    }

    /// The same with another port of the client.
    pub(super) fn at(&self, port: u16) -> Self {
        Self { port, offset: Cell::new(0), ..*self }
    }

    /// One of the client's numbers as the backend counts.
    pub(super) fn there(&self, number: u32) -> u32 {
        number.wrapping_add(self.offset.get())
    }

    pub(super) fn segment(&self, [source, destination]: [SocketAddr; 2], flags: u8) -> Segment {
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
    pub(super) fn of_client(&self, flags: u8) -> Segment {
        self.segment([self.client(), self.public()], flags)
    }

    /// The same behind NAT.
    pub(super) fn to_backend(&self, flags: u8) -> Segment {
        let ends = [place(self.ipv6, EDGE, self.port), place(self.ipv6, BACKEND, 2525)];
        let acknowledgement = FIRST_OF_BACKEND;
        Segment { acknowledgement, ..self.segment(ends, flags) }
    }

    /// What the backend answers.
    pub(super) fn of_backend(&self, flags: u8, acknowledgement: u32) -> Segment {
        let ends = [place(self.ipv6, BACKEND, 2525), place(self.ipv6, EDGE, self.port)];
        Segment { sequence: FIRST_OF_BACKEND, acknowledgement, ..self.segment(ends, flags) }
    }

    pub(super) fn client(&self) -> SocketAddr {
        place(self.ipv6, CLIENT, self.port)
    }

    pub(super) fn public(&self) -> SocketAddr {
        place(self.ipv6, PUBLIC, self.public)
    }

    pub(super) fn header_len(&self) -> u32 {
        if self.ipv6 { 52 } else { 28 }
    }

    /// Runs a program of this way's kind of device over a packet that came from elsewhere.
    pub(super) fn run(&self, program: &str, segment: &Segment) -> Result<Ran, String> {
        self.run_with(program, segment, ELSEWHERE, 0)
    }

    pub(super) fn run_with(
        &self,
        program: &str,
        segment: &Segment,
        from: u32,
        mark: u32,
    ) -> Result<Ran, String> {
        let variant = match self.link {
            Link::Ethernet => program.to_owned(),
            Link::Raw => format!("{program}_raw"),
        };
        let ran = self.bench.run(&variant, &segment.packet()?, from, mark);
        ran.map_err(|fault| format!("{variant}: {fault}"))
    }

    /// The program lets the segment go on, in this form.
    pub(super) fn becomes(
        &self,
        program: &str,
        what: &str,
        sent: &Segment,
        expected: &Segment,
    ) -> Result<(), String> {
        let ran = self.run(program, sent)?;
        self.is(&ran, NEXT, program, what, expected)
    }

    pub(super) fn is(
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
    pub(super) fn open(&self) -> Result<(), String> {
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
    pub(super) fn accept(&self) -> Result<(), String> {
        self.open()?;
        let answer = self.of_backend(SYN | ACK, self.there(FIRST));
        let answer = Segment { sequence: FIRST_OF_BACKEND.wrapping_sub(1), ..answer };
        let window = u32::from(WINDOW) - self.header_len();
        let window = u16::try_from(window).unwrap_or(0);
        let smaller = Segment { window, acknowledgement: FIRST, ..answer.clone() };
        self.becomes("backend_in", "a SYN-ACK", &answer, &smaller)
    }

    /// To the end of the handshake; returns the header that was put into it.
    pub(super) fn establish(&self) -> Result<Vec<u8>, String> {
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
    pub(super) fn acknowledge(&self) -> Result<(), String> {
        self.establish()?;
        let ack = self.of_backend(ACK, self.there(FIRST.wrapping_add(self.header_len())));
        let ran = self.run("backend_in", &ack)?;
        if ran.verdict == DROP { Ok(()) } else { Err("the client hears of the header".to_owned()) }
    }

    /// These bytes are the header of this way's client, and no more.
    pub(super) fn is_header(&self, header: &[u8]) -> Result<(), String> {
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
