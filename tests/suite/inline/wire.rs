//! Two links whose every packet passes through the test, which may drop, duplicate, delay or add
//! packets.
//!
//! Each link is a pair of tap (or tun) devices. The kernel devices have no offloads, so the test
//! sees packets as on a cable: single segments with final checksums. The test verifies all
//! checksums.

use std::collections::{BinaryHeap, HashSet, VecDeque};
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use etherparse::{LaxSlicedPacket, NetSlice, SlicedPacket, TcpSlice, TransportSlice};
use injector_testbed::netns::Netns;

use crate::tap::device;

/// What a device's packets begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layer {
    /// An Ethernet header (tap).
    Ethernet,
    /// The IP header (tun).
    Ip,
}

/// One of the two links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Between client and edge: sequence numbers as the client has them.
    Client,
    /// Between edge and backend: sequence numbers as the backend has them.
    Backend,
}

/// The direction of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    ToBackend,
    ToClient,
}

/// What the test does with a packet.
#[derive(Debug)]
pub(crate) enum Fate {
    Pass,
    Drop,
    Twice,
    Late(Duration),
    /// It is dropped, and its sender gets this frame.
    Answer(Vec<u8>),
    /// It is sent between these whole frames.
    Between(Vec<Vec<u8>>, Vec<Vec<u8>>),
}

/// A TCP segment on one of the links.
pub(crate) struct Seen<'a> {
    pub(crate) side: Side,
    pub(crate) direction: Direction,
    pub(crate) frame: &'a [u8],
    /// The offset of the IP header.
    pub(crate) ip_at: usize,
    pub(crate) ip: &'a NetSlice<'a>,
    pub(crate) tcp: &'a TcpSlice<'a>,
}

impl Seen<'_> {
    /// Whether it carries the PROXY header to the backend.
    pub(crate) fn is_header(&self) -> bool {
        self.at(Side::Backend, Direction::ToBackend)
            && self.tcp.payload().starts_with(b"\r\n\r\n\0\r\nQUIT\n")
    }

    pub(crate) fn at(&self, side: Side, direction: Direction) -> bool {
        self.side == side && self.direction == direction
    }

    /// A pure acknowledgement.
    pub(crate) fn is_bare_ack(&self) -> bool {
        self.tcp.ack()
            && !self.tcp.syn()
            && !self.tcp.fin()
            && !self.tcp.rst()
            && self.tcp.payload().is_empty()
    }

    pub(crate) fn is_data(&self) -> bool {
        !self.tcp.payload().is_empty()
    }

    pub(crate) fn is_syn(&self) -> bool {
        self.tcp.syn() && !self.tcp.ack()
    }

    pub(crate) fn is_syn_ack(&self) -> bool {
        self.tcp.syn() && self.tcp.ack()
    }

    /// The sender.
    pub(crate) fn source(&self) -> SocketAddr {
        let ip: IpAddr = match self.ip {
            NetSlice::Ipv4(ip) => ip.header().source_addr().into(),
            NetSlice::Ipv6(ip) => ip.header().source_addr().into(),
            _ => Ipv4Addr::UNSPECIFIED.into(),
        };
        SocketAddr::new(ip, self.tcp.source_port())
    }

    /// The port that identifies the connection.
    fn client_port(&self) -> u16 {
        match self.direction {
            Direction::ToBackend => self.tcp.source_port(),
            Direction::ToClient => self.tcp.destination_port(),
        }
    }
}

/// Whether the checksums of IP and TCP are correct. Zero has two forms (RFC 1624), and the kernel
/// sends either.
pub(crate) fn sums_are_right(ip: &NetSlice<'_>, tcp: &TcpSlice<'_>) -> bool {
    let same =
        |one: u16, other: u16| one == other || (matches!(one, 0 | 0xFFFF) && matches!(other, 0 | 0xFFFF));
    match ip {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            let sum = tcp.calc_checksum_ipv4(header.source(), header.destination());
            same(header.to_header().calc_header_checksum(), header.header_checksum())
                && sum.is_ok_and(|sum| same(sum, tcp.checksum()))
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            let sum = tcp.calc_checksum_ipv6(header.source(), header.destination());
            sum.is_ok_and(|sum| same(sum, tcp.checksum()))
        }
        _ => true,
    }
}

/// Decides on every packet of the connections that start while it is active.
type Faults = Box<dyn FnMut(&Seen<'_>) -> Fate + Send>;

/// One packet, for the report of a failed trial.
#[derive(Clone)]
struct Line {
    at: Instant,
    side: Side,
    direction: Direction,
    ports: (u16, u16),
    flags: String,
    sequence: u32,
    acknowledgement: u32,
    payload: usize,
    fate: String,
}

/// Packets that are recorded,
const TRACE: usize = 4096;
/// and printed when a trial fails.
const SHOWN: usize = 120;

#[derive(Default)]
struct State {
    faults: Option<Faults>,
    /// Ports of clients that have started since.
    born: HashSet<u16>,
    trace: VecDeque<Line>,
    wrong_sums: Vec<String>,
    segments: u64,
    /// What ICMP errors to the client and to the backend quote, and the link.
    quoted: Vec<(Side, Quote)>,
}

struct Shared {
    /// Client, edge outside, edge inside, backend.
    ends: [File; 4],
    layer: Layer,
    state: Mutex<State>,
    stop: AtomicBool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The two links; the devices are removed on drop.
pub(crate) struct Wire {
    shared: Arc<Shared>,
    carrier: Option<JoinHandle<()>>,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wire")
    }
}

impl Wire {
    /// Creates the devices: the client's, the edge's on the client side, the edge's on the backend
    /// side, the backend's.
    pub(crate) fn new(ends: [(&Netns, &str); 4], layer: Layer) -> anyhow::Result<Self> {
        let [a, b, c, d] = ends.map(|(netns, name)| {
            let file = netns.run(|| device(name, layer))?.with_context(|| format!("device {name}"))?;
            // A queue for everything that a trial sends at once: packets are lost only on purpose.
            netns.ip(&["link", "set", name, "txqueuelen", "10000", "up"])?;
            anyhow::Ok(file)
        });
        let shared =
            Shared { ends: [a?, b?, c?, d?], layer, state: Mutex::default(), stop: AtomicBool::new(false) };
        let shared = Arc::new(shared);
        let carrier = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || carry(&shared)
        });
        Ok(Self { shared, carrier: Some(carrier) })
    }

    /// Activates the faults until the guard is dropped.
    pub(crate) fn faults(&self, faults: impl FnMut(&Seen<'_>) -> Fate + Send + 'static) -> FaultGuard<'_> {
        self.reset(Some(Box::new(faults)));
        FaultGuard(self)
    }

    /// Applies the faults to a client with this port as well, although NAT may give it another.
    pub(crate) fn watch(&self, port: u16) {
        self.shared.state().born.insert(port);
    }

    /// Sends a frame on a link.
    pub(crate) fn inject(&self, side: Side, direction: Direction, frame: &[u8]) -> io::Result<()> {
        (&self.shared.ends[end(side, direction)]).write(frame).map(drop)
    }

    /// Fails if any checksum was wrong since the last call.
    pub(crate) fn sums(&self) -> anyhow::Result<u64> {
        let mut state = self.shared.state();
        let wrong = std::mem::take(&mut state.wrong_sums);
        ensure!(wrong.is_empty(), "wrong checksums: {}", wrong.join("; "));
        Ok(std::mem::take(&mut state.segments))
    }

    /// The sequence numbers of the segments that ICMP errors to the host of this link have quoted
    /// since the faults began. Those of other connections, that earlier trials left, do not count.
    pub(crate) fn quoted(&self, link: Side) -> Vec<u32> {
        let state = self.shared.state();
        let is_watched = |quote: &Quote| quote.ports.iter().all(|port| state.born.contains(port));
        let quoted = state.quoted.iter().filter(|(side, quote)| *side == link && is_watched(quote));
        quoted.map(|(_, quote)| quote.sequence).collect()
    }

    /// The last packets, and their fates.
    pub(crate) fn trace(&self) -> String {
        let state = self.shared.state();
        lines(state.trace.iter().skip(state.trace.len().saturating_sub(SHOWN)))
    }

    /// The last packets of one client, by its port.
    pub(crate) fn trace_of(&self, port: u16) -> String {
        lines(self.shared.state().trace.iter().filter(|line| line.ports.0 == port || line.ports.1 == port))
    }

    fn reset(&self, faults: Option<Faults>) {
        let mut state = self.shared.state();
        state.faults = faults;
        state.born.clear();
        state.trace.clear();
        state.quoted.clear();
    }
}

fn lines<'a>(lines: impl Iterator<Item = &'a Line>) -> String {
    let mut first = None;
    let line = |line: &Line| {
        let ms = line.at.duration_since(*first.get_or_insert(line.at)).as_secs_f64() * 1e3;
        let Line { side, direction, ports, flags, sequence, acknowledgement, payload, fate, .. } = line;
        format!(
            "{ms:9.2} {side:?} {direction:?} {ports:?} {flags} seq {sequence} ack {acknowledgement} len {payload} {fate}"
        )
    };
    lines.map(line).collect::<Vec<_>>().join("\n")
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(carrier) = self.carrier.take() {
            let _ = carrier.join();
        }
    }
}

/// The faults are active while this exists.
#[derive(Debug)]
pub(crate) struct FaultGuard<'a>(&'a Wire);

impl Drop for FaultGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.0.shared.state();
        state.faults = None;
    }
}

/// The device that packets of this link and direction are written to.
const fn end(side: Side, direction: Direction) -> usize {
    match (side, direction) {
        (Side::Client, Direction::ToClient) => 0,
        (Side::Client, Direction::ToBackend) => 1,
        (Side::Backend, Direction::ToClient) => 2,
        (Side::Backend, Direction::ToBackend) => 3,
    }
}

/// A delayed packet; the earliest compares greatest.
#[derive(PartialEq, Eq)]
struct Waiting {
    due: Instant,
    number: u64,
    to: usize,
    frame: Vec<u8>,
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.due, other.number).cmp(&(self.due, self.number))
    }
}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// Forwards packets until the wire is dropped.
fn carry(shared: &Shared) {
    const ROUTES: [(usize, Side, Direction); 4] = [
        (0, Side::Client, Direction::ToBackend),
        (1, Side::Client, Direction::ToClient),
        (2, Side::Backend, Direction::ToBackend),
        (3, Side::Backend, Direction::ToClient),
    ];
    let fds = shared.ends.each_ref().map(|file| file.as_raw_fd());
    let mut waiting = BinaryHeap::new();
    let mut frame = vec![0; 1 << 16];
    while !shared.stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        while waiting.peek().is_some_and(|packet: &Waiting| packet.due <= now) {
            if let Some(packet) = waiting.pop() {
                write(shared, packet.to, &packet.frame);
            }
        }
        let pause = waiting.peek().map_or(Duration::from_millis(20), |packet| packet.due - now);
        wait(fds, pause);
        for (from, side, direction) in ROUTES {
            // A few from each in turn, so that none starves the others.
            for _ in 0..32 {
                let Ok(len) = (&shared.ends[from]).read(&mut frame) else { break };
                forward(shared, side, direction, &frame[..len], &mut waiting);
            }
        }
    }
}

fn forward(
    shared: &Shared,
    side: Side,
    direction: Direction,
    frame: &[u8],
    waiting: &mut BinaryHeap<Waiting>,
) {
    let to = end(side, direction);
    match judge(shared, side, direction, frame) {
        Fate::Pass => write(shared, to, frame),
        Fate::Drop => {}
        Fate::Twice => {
            write(shared, to, frame);
            write(shared, to, frame);
        }
        Fate::Late(delay) => {
            let number = waiting.len() as u64;
            waiting.push(Waiting { due: Instant::now() + delay, number, to, frame: frame.to_vec() });
        }
        Fate::Answer(answer) => {
            let back = match direction {
                Direction::ToBackend => Direction::ToClient,
                Direction::ToClient => Direction::ToBackend,
            };
            write(shared, end(side, back), &answer);
        }
        Fate::Between(before, after) => {
            before.iter().for_each(|frame| write(shared, to, frame));
            write(shared, to, frame);
            after.iter().for_each(|frame| write(shared, to, frame));
        }
    }
}

fn judge(shared: &Shared, side: Side, direction: Direction, frame: &[u8]) -> Fate {
    let parsed = match shared.layer {
        Layer::Ethernet => SlicedPacket::from_ethernet(frame),
        Layer::Ip => SlicedPacket::from_ip(frame),
    };
    let (ip, tcp) = match &parsed {
        Ok(SlicedPacket { net: Some(ip), transport: Some(TransportSlice::Tcp(tcp)), .. }) => (ip, tcp),
        Ok(SlicedPacket { transport: Some(other), .. })
            if matches!(
                (side, direction),
                (Side::Client, Direction::ToClient) | (Side::Backend, Direction::ToBackend)
            ) =>
        {
            shared.state().quoted.extend(quoted(other).map(|quote| (side, quote)));
            return Fate::Pass;
        }
        _ => return Fate::Pass,
    };
    let ip_at = if shared.layer == Layer::Ethernet { 14 } else { 0 };
    let seen = Seen { side, direction, frame, ip_at, ip, tcp };
    let mut state = shared.state();
    state.segments += 1;
    if seen.is_syn() && direction == Direction::ToBackend {
        state.born.insert(tcp.source_port());
    }
    let concerned = state.born.contains(&seen.client_port());
    let fate = match &mut state.faults {
        Some(faults) if concerned => faults(&seen),
        _ => Fate::Pass,
    };
    let line = describe(&seen, &fate);
    // Only of what the edge sends; the hosts are not under test.
    let by_edge = matches!(
        (side, direction),
        (Side::Client, Direction::ToClient) | (Side::Backend, Direction::ToBackend)
    );
    if by_edge && !sums_are_right(seen.ip, seen.tcp) && state.wrong_sums.len() < 8 {
        state.wrong_sums.push(format!(
            "{side:?} {direction:?} {} seq {} len {}",
            line.flags, line.sequence, line.payload
        ));
    }
    if state.trace.len() == TRACE {
        state.trace.pop_front();
    }
    state.trace.push_back(line);
    fate
}

/// The TCP segment that an ICMP error quotes.
struct Quote {
    ports: [u16; 2],
    sequence: u32,
}

fn quoted(transport: &TransportSlice<'_>) -> Option<Quote> {
    let quote = match transport {
        TransportSlice::Icmpv4(icmp) => icmp.payload(),
        TransportSlice::Icmpv6(icmp) => icmp.payload(),
        _ => return None,
    };
    // The quote may be truncated.
    let packet = LaxSlicedPacket::from_ip(quote).ok()?;
    match packet.transport {
        Some(TransportSlice::Tcp(tcp)) => Some(Quote {
            ports: [tcp.source_port(), tcp.destination_port()],
            sequence: tcp.sequence_number(),
        }),
        _ => None,
    }
}

fn describe(seen: &Seen<'_>, fate: &Fate) -> Line {
    let Seen { tcp, .. } = seen;
    let flags = [(tcp.syn(), 'S'), (tcp.fin(), 'F'), (tcp.rst(), 'R'), (tcp.urg(), 'U'), (tcp.ack(), '.')];
    Line {
        at: Instant::now(),
        side: seen.side,
        direction: seen.direction,
        ports: (tcp.source_port(), tcp.destination_port()),
        flags: flags.into_iter().filter_map(|(set, letter)| set.then_some(letter)).collect(),
        sequence: tcp.sequence_number(),
        acknowledgement: tcp.acknowledgment_number(),
        payload: tcp.payload().len(),
        fate: match fate {
            Fate::Pass => String::new(),
            Fate::Answer(_) => "Answer".to_owned(),
            Fate::Between(before, after) => format!("Between({}, {})", before.len(), after.len()),
            other => format!("{other:?}"),
        },
    }
}

/// A device whose queue is full drops packets, as a network does.
fn write(shared: &Shared, to: usize, frame: &[u8]) {
    let _ = (&shared.ends[to]).write(frame);
}

fn wait(fds: [RawFd; 4], pause: Duration) {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    let pause = libc::timespec { tv_sec: 0, tv_nsec: i64::from(pause.subsec_nanos()) };
    // SAFETY: the array has four entries, and both outlive the call.
    unsafe { libc::ppoll(polled.as_mut_ptr(), 4, &raw const pause, std::ptr::null()) };
}
