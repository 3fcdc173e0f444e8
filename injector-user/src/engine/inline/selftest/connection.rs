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
pub(super) struct Programs {
    pub(super) programs: Ebpf,
    pub(super) maps: Maps,
}

/// The verdicts of a tc program (include/uapi/linux/pkt_cls.h); `TC_ACT_UNSPEC` is -1.
pub(super) const PASS: u32 = u32::MAX;
pub(super) const DROP: u32 = 2;
pub(super) const REDIRECT: u32 = 7;

/// The loopback device, over which a test run goes.
pub(super) const LOOPBACK: u32 = 1;
/// Some other device: a packet from it was forwarded.
pub(super) const OTHER_DEVICE: u32 = 2;

impl Programs {
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

    /// Runs a program once; `from` is the device on which the packet arrived, 0 if this host sent
    /// it.
    pub(super) fn run(
        &self,
        program: &str,
        packet: &[u8],
        from: u32,
        mark: u32,
    ) -> Result<RunResult, String> {
        let program: &SchedClassifier = self
            .programs
            .program(program)
            .ok_or_else(|| format!("no program {program}"))?
            .try_into()
            .map_err(|error| format!("{program}: {error}"))?;
        // The beginning of struct __sk_buff, include/uapi/linux/bpf.h; the kernel assumes zero for
        // the rest.
        let mut context = [0_u8; 44];
        for (field, value) in [(2, mark), (9, from), (10, LOOPBACK)] {
            let place = context.get_mut(field * 4..field * 4 + 4).ok_or("no such field")?;
            place.copy_from_slice(&value.to_ne_bytes());
        }
        // The kernel returns the whole structure of its own version, which must fit.
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
        Ok(RunResult { verdict: ran.return_value, packet: out, mark })
    }
}

/// The result of running a program on a packet.
pub(super) struct RunResult {
    pub(super) verdict: u32,
    pub(super) packet: Vec<u8>,
    pub(super) mark: u32,
}

/// The hosts of a test, by the last part of their address.
pub(super) const CLIENT: u16 = 7;
pub(super) const PUBLIC: u16 = 10;
pub(super) const EDGE: u16 = 1;
pub(super) const BACKEND: u16 = 2;

/// The ports of two listeners: in the one the server speaks first, in the other the client.
pub(super) const SERVER_FIRST: u16 = 25;
pub(super) const CLIENT_FIRST: u16 = 993;

/// A test run reads the EtherType of a packet at Ethernet's offset, also for a program that expects
/// no Ethernet. Addresses that begin with the EtherType have it there. No packet is sent to them.
fn place(ipv6: bool, host: u16, port: u16) -> SocketAddr {
    let ip = if ipv6 {
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x86DD, 0, 0, 0, 0, host))
    } else {
        let [high, low] = host.to_be_bytes();
        IpAddr::V4(Ipv4Addr::new(0x08, 0x00, high, low))
    };
    SocketAddr::new(ip, port)
}

/// One connection through the host.
pub(super) struct Connection<'a> {
    pub(super) programs: &'a Programs,
    pub(super) ipv6: bool,
    pub(super) link: Link,
    /// The port of the client, and of the edge host towards the backend.
    pub(super) port: u16,
    /// The listener's.
    pub(super) public: u16,
    /// What the programs add to the client's sequence numbers: [`Flow::offset`], read from the SYN.
    pub(super) offset: Cell<u32>,
}

/// The sequence numbers of the client's first byte and of the backend's. Adding the header to the
/// former wraps around.
pub(super) const FIRST: u32 = u32::MAX - 9;
pub(super) const FIRST_OF_BACKEND: u32 = 7000;
pub(super) const WINDOW: u16 = 60_000;

impl<'a> Connection<'a> {
    pub(super) fn new(programs: &'a Programs, ipv6: bool, link: Link, port: u16) -> Self {
        Self { programs, ipv6, link, port, public: SERVER_FIRST, offset: Cell::new(0) }
    }

    /// The same connection from another client port.
    pub(super) fn with_port(&self, port: u16) -> Self {
        Self { port, offset: Cell::new(0), ..*self }
    }

    /// A sequence number of the client, as the backend sees it.
    pub(super) fn backend_sequence(&self, number: u32) -> u32 {
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

    /// A segment from the client, before NAT.
    pub(super) fn client_segment(&self, flags: u8) -> Segment {
        self.segment([self.client(), self.public()], flags)
    }

    /// A segment from the client, after NAT.
    pub(super) fn to_backend(&self, flags: u8) -> Segment {
        let ends = [place(self.ipv6, EDGE, self.port), place(self.ipv6, BACKEND, 2525)];
        let acknowledgement = FIRST_OF_BACKEND;
        Segment { acknowledgement, ..self.segment(ends, flags) }
    }

    /// A segment from the backend.
    pub(super) fn backend_segment(&self, flags: u8, acknowledgement: u32) -> Segment {
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

    /// Runs the program for this kind of device over a packet that was forwarded.
    pub(super) fn run(&self, program: &str, segment: &Segment) -> Result<RunResult, String> {
        self.run_with(program, segment, OTHER_DEVICE, 0)
    }

    pub(super) fn run_with(
        &self,
        program: &str,
        segment: &Segment,
        from: u32,
        mark: u32,
    ) -> Result<RunResult, String> {
        let variant = match self.link {
            Link::Ethernet => program.to_owned(),
            Link::Raw => format!("{program}_raw"),
        };
        let ran = self.programs.run(&variant, &segment.packet()?, from, mark);
        ran.map_err(|fault| format!("{variant}: {fault}"))
    }

    /// Checks that the program passes the segment on, in this form.
    pub(super) fn expect_passed(
        &self,
        program: &str,
        what: &str,
        sent: &Segment,
        expected: &Segment,
    ) -> Result<(), String> {
        let ran = self.run(program, sent)?;
        self.expect_segment(&ran, PASS, program, what, expected)
    }

    pub(super) fn expect_segment(
        &self,
        ran: &RunResult,
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

    /// Sends the SYN, up to `backend_out`.
    pub(super) fn open(&self) -> Result<(), String> {
        let mut syn = self.client_segment(SYN);
        syn.sequence = FIRST.wrapping_sub(1);
        let mut forwarded = self.to_backend(SYN);
        (forwarded.sequence, forwarded.acknowledgement) = (syn.sequence, 0);
        let seen = self.run("client_in", &syn)?;
        self.expect_segment(&seen, PASS, "client_in", "a SYN", &syn)?;
        if seen.mark == 0 {
            return Err("client_in does not mark a SYN with a token".to_owned());
        }
        let ran = self.run_with("backend_out", &forwarded, OTHER_DEVICE, seen.mark)?;
        let left = Segment::read(&ran.packet, self.link)?;
        self.offset.set(left.sequence.wrapping_sub(forwarded.sequence));
        forwarded.sequence = left.sequence;
        self.expect_segment(&ran, PASS, "backend_out", "a SYN that client_in has seen", &forwarded)?;
        // The token is valid for one packet.
        let again = self.run_with("backend_out", &forwarded, OTHER_DEVICE, seen.mark)?;
        if again.verdict == DROP {
            Ok(())
        } else {
            Err("backend_out accepts one token for two packets".to_owned())
        }
    }

    /// Sends segments up to the backend's SYN-ACK, whose window shrinks by the header.
    pub(super) fn accept(&self) -> Result<(), String> {
        self.open()?;
        let answer = self.backend_segment(SYN | ACK, self.backend_sequence(FIRST));
        let answer = Segment { sequence: FIRST_OF_BACKEND.wrapping_sub(1), ..answer };
        let window = u32::from(WINDOW) - self.header_len();
        let window = u16::try_from(window).unwrap_or(0);
        let smaller = Segment { window, acknowledgement: FIRST, ..answer.clone() };
        self.expect_passed("backend_in", "a SYN-ACK", &answer, &smaller)
    }

    /// Sends segments up to the end of the handshake; returns the header that the program added.
    pub(super) fn establish(&self) -> Result<Vec<u8>, String> {
        self.accept()?;
        let ack = self.to_backend(ACK);
        let ran = self.run("backend_out", &ack)?;
        let longer = Segment::read(&ran.packet, self.link)
            .map_err(|fault| format!("the end of the handshake: {fault}"))?;
        let header = longer.payload;
        let (sequence, flags) = (self.backend_sequence(FIRST), longer.flags & PSH | ack.flags);
        let expected = Segment { payload: header.clone(), sequence, flags, ..ack };
        self.expect_segment(&ran, PASS, "backend_out", "the end of the handshake", &expected)?;
        Ok(header)
    }

    /// Sends segments up to the backend's acknowledgement of the header, which the client must not
    /// receive.
    pub(super) fn acknowledge(&self) -> Result<(), String> {
        self.establish()?;
        let ack = self.backend_segment(ACK, self.backend_sequence(FIRST.wrapping_add(self.header_len())));
        let ran = self.run("backend_in", &ack)?;
        if ran.verdict == DROP {
            Ok(())
        } else {
            Err("backend_in passes the acknowledgement of the header to the client".to_owned())
        }
    }

    /// Checks that these bytes are exactly the header of this connection's client.
    pub(super) fn expect_header(&self, header: &[u8]) -> Result<(), String> {
        let parsed = proxy::parse(header).map_err(|error| format!("no header in {header:02x?}: {error}"))?;
        let addresses = parsed.command.addresses().ok_or("a header without addresses")?;
        if parsed.len != header.len() || header.len() != self.header_len() as usize {
            return Err(format!("a header of {} bytes in {}", parsed.len, header.len()));
        }
        let (source, destination) = (addresses.source(), addresses.destination());
        if (source, destination) == (self.client(), self.public()) {
            return Ok(());
        }
        Err(format!("the header has the source {source} and the destination {destination}"))
    }
}
