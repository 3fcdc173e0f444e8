//! One TCP connection over the real programs, each run once by `BPF_PROG_TEST_RUN`.

use std::{
    cell::Cell,
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Instant,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use injector_common::{
    inline::{ACK, Phase, PortRange, SYN, Settings, Timeouts, Usage},
    proxy,
};

use super::segment::{Link, Segment};
use crate::{
    config::{Network, Receiver},
    engine::inline::{
        counts::set_limit,
        maps::Maps,
        plan::{Destination, InUse, Planner, Service},
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

/// Room for connections: more than the checks open.
const SLOTS: u32 = 1024;

impl Programs {
    pub(super) fn load() -> Result<Self, LoadError> {
        Self::with_room(SLOTS, &[EDGE])
    }

    /// With this number of entries in `CONNECTIONS`, and these hosts' addresses towards the backend.
    pub(super) fn with_room(slots: u32, sources: &[u16]) -> Result<Self, LoadError> {
        let mut loader = EbpfLoader::new();
        loader
            .map_max_entries("FLOWS", 2 * slots)
            .map_max_entries("CONNECTIONS", slots)
            .map_max_entries("FREE_SLOTS", slots)
            .override_global("SELF_TEST", &1_u32, true);
        let (programs, maps) = load_programs(&mut loader)?;
        let ports = PortRange::new(32_768, 60_999).unwrap_or_default();
        maps.set_settings(&Settings { ports, max_pending: slots, slots })?;
        let both = |host: u16, port: u16| [false, true].map(|ipv6| place(ipv6, host, port));
        let mut services = Vec::new();
        for (id, (port, waits)) in (1..).zip([(SERVER_FIRST, false), (CLIENT_FIRST, true)]) {
            let template = |ipv6| template(&Receiver::default(), ipv6, waits).map_err(LoadError::Host);
            maps.set_templates(id, &[template(false)?, template(true)?])?;
            set_limit(&maps, id, u32::MAX);
            services.push(Service {
                id,
                bind: both(PUBLIC, port).to_vec(),
                virtual_addresses: Vec::new(),
                translated_sources: both(TRANSLATED, 0).map(|address| Network::host(address.ip())).to_vec(),
                timeouts: Timeouts { idle: 60, half_closed: 60, client_fin: 60 },
                destinations: [false, true].map(|ipv6| destination(ipv6, sources)).to_vec(),
                proxy_ports: both(BACKEND, PROXY_PORT).to_vec(),
            });
        }
        set_limit(&maps, Usage::ALL, u32::MAX);
        maps.write(&Planner::new(&InUse::default()).plan(&services, Instant::now()))?;
        Ok(Self { programs, maps })
    }

    /// Runs a program once on a packet that has come in.
    pub(super) fn run(&self, program: &str, packet: &[u8]) -> Result<RunResult, String> {
        let program: &SchedClassifier = self
            .programs
            .program(program)
            .ok_or_else(|| format!("no program {program}"))?
            .try_into()
            .map_err(|error| format!("{program}: {error}"))?;
        let mut out = vec![0; 2048];
        let options =
            TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), ..TestRunOptions::default() };
        let ran = program.test_run(options);
        let ran = ran.map_err(|error| format!("BPF_PROG_TEST_RUN: {}", crate::engine::bpf::chain(&error)))?;
        out.truncate(usize::try_from(ran.data_size_out).map_err(|error| error.to_string())?);
        Ok(RunResult { verdict: ran.return_value, packet: out })
    }

    /// Has the listeners lead nowhere.
    pub(super) fn remove_listeners(&self) -> Result<(), String> {
        self.maps.set_listeners(&HashMap::new()).map_err(|error| error.to_string())
    }
}

fn destination(ipv6: bool, sources: &[u16]) -> Destination {
    let address = place(ipv6, BACKEND, PROXY_PORT);
    let sources = sources.iter().map(|host| place(ipv6, *host, 0).ip()).collect();
    Destination { address, weight: 1, sources }
}

/// The result of running a program on a packet.
pub(super) struct RunResult {
    pub(super) verdict: u32,
    pub(super) packet: Vec<u8>,
}

/// The hosts of a test, by the last part of their address.
pub(super) const CLIENT: u16 = 7;
pub(super) const PUBLIC: u16 = 10;
pub(super) const EDGE: u16 = 1;
pub(super) const BACKEND: u16 = 2;
/// Translation has put its address in place of a client's.
pub(super) const TRANSLATED: u16 = 9;

/// The ports of two listeners: in the one the server speaks first, in the other the client.
pub(super) const SERVER_FIRST: u16 = 25;
pub(super) const CLIENT_FIRST: u16 = 993;

/// The backend's port.
pub(super) const PROXY_PORT: u16 = 2525;

/// A test run reads the EtherType of a packet at Ethernet's offset, also for a program that expects
/// no Ethernet. Addresses that begin with the EtherType have it there. No packet is sent to them.
pub(super) fn place(ipv6: bool, host: u16, port: u16) -> SocketAddr {
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
    /// The port of the client. It is not one of the host's sockets, so the program keeps it.
    pub(super) port: u16,
    /// The listener's.
    pub(super) public: u16,
    /// What the program adds to the client's sequence numbers: [`Flow::offset`], read from the SYN.
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

    /// The same behind the header.
    pub(super) fn behind_header(&self, number: u32) -> u32 {
        self.backend_sequence(number).wrapping_add(self.header_len())
    }

    fn segment(&self, [source, destination]: [SocketAddr; 2], flags: u8) -> Segment {
        // The loopback device has the address zero, and takes what is sent to that.
        let ethernet = [[0; 6], [2, 0, 0, 0, 0, 2]];
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

    /// A segment from the client; as if it acknowledged the backend's SYN.
    pub(super) fn client_segment(&self, flags: u8) -> Segment {
        let acknowledgement = if flags & ACK == 0 { 0 } else { FIRST_OF_BACKEND };
        Segment { acknowledgement, ..self.segment([self.client(), self.public()], flags) }
    }

    /// This segment of the client's as it leaves to the backend, with this sequence number.
    pub(super) fn to_backend(&self, segment: &Segment, sequence: u32) -> Segment {
        let (source, destination) = (place(self.ipv6, EDGE, self.port), self.backend());
        Segment { source, destination, sequence, ..segment.clone() }
    }

    /// A segment from the backend.
    pub(super) fn backend_segment(&self, flags: u8, acknowledgement: u32) -> Segment {
        let ends = [self.backend(), place(self.ipv6, EDGE, self.port)];
        Segment { sequence: FIRST_OF_BACKEND, acknowledgement, ..self.segment(ends, flags) }
    }

    /// This segment of the backend's as it leaves to the client, with this acknowledgement.
    pub(super) fn to_client(&self, segment: &Segment, acknowledgement: u32) -> Segment {
        let (source, destination) = (self.public(), self.client());
        Segment { source, destination, acknowledgement, ..segment.clone() }
    }

    pub(super) fn client(&self) -> SocketAddr {
        place(self.ipv6, CLIENT, self.port)
    }

    pub(super) fn public(&self) -> SocketAddr {
        place(self.ipv6, PUBLIC, self.public)
    }

    pub(super) fn backend(&self) -> SocketAddr {
        place(self.ipv6, BACKEND, PROXY_PORT)
    }

    pub(super) fn header_len(&self) -> u32 {
        if self.ipv6 { 52 } else { 28 }
    }

    /// Runs the program for this kind of device.
    pub(super) fn run(&self, segment: &Segment) -> Result<RunResult, String> {
        let program = match self.link {
            Link::Ethernet => "inline",
            Link::Raw => "inline_raw",
        };
        let ran = self.programs.run(program, &segment.packet()?);
        ran.map_err(|fault| format!("{program}: {fault}"))
    }

    /// The segment that a run has sent; an error if it has sent none.
    pub(super) fn sent(&self, ran: &RunResult, what: &str) -> Result<Segment, String> {
        if ran.verdict != REDIRECT {
            return Err(format!("the program gave verdict {} for {what}", ran.verdict.cast_signed()));
        }
        // Without a link-layer header the packet gets one, which the kernel takes away again.
        let read = Segment::read(&ran.packet, Link::Ethernet);
        let mut read = read.map_err(|fault| format!("{what}: {fault}"))?;
        if self.link == Link::Raw {
            read.ethernet = None;
        }
        Ok(read)
    }

    /// Checks that the program sends the segment on, in this form.
    pub(super) fn expect(&self, what: &str, segment: &Segment, expected: &Segment) -> Result<(), String> {
        let seen = self.sent(&self.run(segment)?, what)?;
        if seen == *expected {
            return Ok(());
        }
        Err(format!("the program made {seen:?} of {what}, and should have made {expected:?}"))
    }

    /// Checks that the program gives this verdict.
    pub(super) fn expect_verdict(&self, what: &str, segment: &Segment, verdict: u32) -> Result<(), String> {
        let seen = self.run(segment)?.verdict;
        if seen == verdict {
            return Ok(());
        }
        Err(format!("the program gave verdict {} for {what}", seen.cast_signed()))
    }

    /// Sends the SYN.
    pub(super) fn open(&self) -> Result<(), String> {
        let syn = Segment { sequence: FIRST.wrapping_sub(1), ..self.client_segment(SYN) };
        let seen = self.sent(&self.run(&syn)?, "a SYN")?;
        self.offset.set(seen.sequence.wrapping_sub(syn.sequence));
        let expected = self.to_backend(&syn, seen.sequence);
        if seen != expected {
            return Err(format!("the program made {seen:?} of a SYN, and should have made {expected:?}"));
        }
        // Sent again, it goes to the same backend with the same number.
        self.expect("a SYN that is sent again", &syn, &expected)
    }

    /// Sends segments up to the backend's SYN-ACK, whose window shrinks by the header.
    pub(super) fn accept(&self) -> Result<(), String> {
        self.open()?;
        let answer = self.backend_segment(SYN | ACK, self.backend_sequence(FIRST));
        let answer = Segment { sequence: FIRST_OF_BACKEND.wrapping_sub(1), ..answer };
        let window = u32::from(WINDOW) - self.header_len();
        let window = u16::try_from(window).unwrap_or(0);
        let smaller = Segment { window, ..self.to_client(&answer, FIRST) };
        self.expect("a SYN-ACK", &answer, &smaller)
    }

    /// Sends segments up to the end of the handshake; returns the header that the program added.
    pub(super) fn establish(&self) -> Result<Vec<u8>, String> {
        self.accept()?;
        let ack = self.client_segment(ACK);
        let longer = self.sent(&self.run(&ack)?, "the end of the handshake")?;
        let header = longer.payload.clone();
        let expected = Segment {
            payload: header.clone(),
            flags: longer.flags | ACK,
            ..self.to_backend(&ack, self.backend_sequence(FIRST))
        };
        if longer == expected {
            return Ok(header);
        }
        Err(format!("the handshake ends with {longer:?}, and should with {expected:?}"))
    }

    /// Sends segments up to the backend's acknowledgement of the header, which the client must not
    /// receive.
    pub(super) fn acknowledge(&self) -> Result<(), String> {
        self.establish()?;
        let ack = self.backend_segment(ACK, self.behind_header(FIRST));
        self.expect_verdict("the acknowledgement of the header", &ack, DROP)
    }

    /// How many connections of this client's port are in this phase.
    pub(super) fn count(&self, phase: Phase) -> usize {
        let own = |flow: &injector_common::inline::Flow| {
            flow.client_side.tuple.read().1.port == self.port
                && (flow.client_side.tuple.ipv6 != 0) == self.ipv6
        };
        self.programs.maps.flows_in(phase).filter(|(_, flow)| own(flow)).count()
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
