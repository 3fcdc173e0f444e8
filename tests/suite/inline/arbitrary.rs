//! Arbitrary segments against the real programs: the properties that `injector-common/tests/inline`
//! checks of the decisions, over raw frames of many clients at once. The backend uses the kernel's
//! TCP.
//!
//! `INJECTOR_SEED` selects another run than the default.

use std::collections::HashMap;
use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use fastrand::Rng;
use injector_common::inline::{ACK, FIN, PSH, RST, SYN, URG};
use injector_common::proxy::{self, Announced};
use injector_testbed::netns::Family;
use socket2::SockRef;

use crate::frame::{Extra, Frame, forged_header};
use crate::source_limits::counts_are_exact;
use crate::wire::{Direction, Fate, Side};
use crate::wire_testbed::{self, Forwarding, WireTestbed};

/// Simultaneous connections.
const BATCH: usize = 64;
/// What each client sends at the end, as an honest one would.
const HONEST: u32 = 64;

/// Runs a number of connections; each has the header of its own client or has read nothing.
pub(crate) fn segments(testbed: &WireTestbed, family: Family, connections: usize) -> anyhow::Result<()> {
    let seed =
        std::env::var("INJECTOR_SEED").ok().map_or(Ok(2525), |seed| seed.parse()).context("INJECTOR_SEED")?;
    run(testbed, family, connections, &mut Rng::with_seed(seed))
        .with_context(|| format!("INJECTOR_SEED={seed}"))
}

fn run(testbed: &WireTestbed, family: Family, connections: usize, rng: &mut Rng) -> anyhow::Result<()> {
    // So that those that pass the public address reach the program as packets to be forwarded.
    let _forwarding = Forwarding::new(testbed.edge())?;
    let listener = testbed.backend(family)?;
    listener.set_nonblocking(true)?;
    let template = Frame::of_a_client(testbed, family)?;
    let answers = Arc::new(Mutex::new(HashMap::new()));
    let answered_ports = Arc::clone(&answers);
    let _watching = testbed.wire.faults(move |seen| {
        if seen.at(Side::Client, Direction::ToClient) && seen.is_syn_ack() {
            let mut answered_ports = answered_ports.lock().unwrap_or_else(PoisonError::into_inner);
            answered_ports.insert(
                seen.tcp.destination_port(),
                (seen.tcp.sequence_number(), seen.tcp.acknowledgment_number()),
            );
        }
        Fate::Pass
    });
    let before = testbed.counted("invalid_segment").unwrap_or(0);
    let mut totals = Totals::default();
    let mut number = 0_u16;
    let mut earlier: Vec<Client> = Vec::new();
    while usize::from(number) < connections {
        let mut batch: Vec<Client> = Vec::new();
        for _ in 0..BATCH {
            number += 1;
            let client = Client::new(family, number, rng);
            testbed.wire.watch(client.port);
            for frame in client.opening(&template, rng) {
                testbed.wire.inject(Side::Client, Direction::ToBackend, &frame)?;
            }
            batch.push(client);
        }
        let complete = |answered_ports: &HashMap<u16, _>| {
            batch.iter().filter(|one| answered_ports.contains_key(&one.port)).count()
        };
        for _ in 0..15 {
            std::thread::sleep(Duration::from_millis(5));
            if complete(&answers.lock().unwrap_or_else(PoisonError::into_inner)) == BATCH {
                break;
            }
        }
        for client in &mut batch {
            let answer = answers.lock().unwrap_or_else(PoisonError::into_inner).remove(&client.port);
            client.accepted =
                answer.filter(|(_, ack)| *ack == client.first).map(|(sequence, _)| sequence.wrapping_add(1));
        }
        let mut frames: Vec<(u32, Vec<u8>)> = Vec::new();
        for client in &mut batch {
            // In order per client, interleaved with those of other clients.
            let mut at = 0;
            for frame in client.anything(&template, rng) {
                at += rng.u32(1..1000);
                frames.push((at, frame));
            }
        }
        frames.sort_by_key(|(at, _)| *at);
        totals.frames += frames.len();
        for (_, frame) in frames {
            testbed.wire.inject(Side::Client, Direction::ToBackend, &frame)?;
        }
        // Sent once more, because the backend may have requested the header meanwhile.
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(20));
            for client in batch.iter().filter(|client| client.honest) {
                for frame in client.honest_end(&template) {
                    testbed.wire.inject(Side::Client, Direction::ToBackend, &frame)?;
                }
            }
        }
        std::thread::sleep(Duration::from_millis(20));
        totals.honest += batch.iter().filter(|client| client.honest).count();
        earlier.extend(batch);
        totals.count(&earlier, &listener, testbed, family)?;
    }
    // Those that the socket got take longer.
    std::thread::sleep(Duration::from_millis(300));
    totals.count(&earlier, &listener, testbed, family)?;
    counts_are_exact(testbed.pin())?;
    let below = testbed.counted("invalid_segment").unwrap_or(0) - before;
    eprintln!("    {totals:?}, {below} segments dropped as invalid");
    // At least some connections must have worked.
    ensure!(
        totals.named > connections / 4 && totals.served > connections / 8,
        "too few get through: {totals:?}"
    );
    // Those whose port a planted SYN has taken, and those that the socket got.
    ensure!(totals.renamed < connections / 2, "too many have other ports: {totals:?}");
    ensure!(totals.served == totals.honest, "honest clients are not served: {totals:?}");
    ensure!(below > connections as u64 / 4, "too few tried: {below}");
    Ok(())
}

#[derive(Debug, Default)]
struct Totals {
    frames: usize,
    accepted: usize,
    /// With another port than the client's own.
    renamed: usize,
    /// With a header.
    named: usize,
    /// Clients that did nothing to end their connections,
    honest: usize,
    /// and those of them whose bytes the backend has received.
    served: usize,
}

impl Totals {
    /// Checks everything that the backend has received.
    fn count(
        &mut self,
        clients: &[Client],
        listener: &TcpListener,
        testbed: &WireTestbed,
        family: Family,
    ) -> anyhow::Result<()> {
        loop {
            let (mut stream, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            self.accepted += 1;
            let read = read_all(&mut stream)?;
            // The client's ports are free again.
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            // A client whose port is in use gets another one; then the header identifies the client to
            // compare with.
            let is_named =
                |client: &&Client| client.after_header(&read, family).is_ok_and(|rest| rest.is_some());
            // The port may also be a renamed one's, of an earlier client.
            let of_port = clients.iter().find(|client| client.port == peer.port());
            self.renamed += usize::from(of_port.is_none());
            let Some(client) = clients.iter().find(is_named).or(of_port) else {
                ensure!(read.is_empty(), "FORGED: {peer} is not a client, and the backend read {read:02x?}");
                continue;
            };
            let what = || {
                let trace = testbed.wire.trace_of(client.port);
                format!("{client:?}\n{trace}\nThe backend read {read:02x?}")
            };
            let Some(rest) = client.after_header(&read, family).with_context(what)? else { continue };
            self.named += 1;
            ensure!(client.is_stream(rest), "other bytes than the client's: {}", what());
            self.served += usize::from(client.honest && rest.len() >= HONEST as usize);
        }
    }
}

fn read_all(stream: &mut TcpStream) -> anyhow::Result<Vec<u8>> {
    stream.set_nonblocking(true)?;
    let (mut read, mut some) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut some) {
            Ok(0) => return Ok(read),
            Ok(len) => read.extend_from_slice(&some[..len]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(read),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(read),
            Err(error) => return Err(error.into()),
        }
    }
}

/// How a connection is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    Plain,
    /// Twice, with another sequence number first.
    Again,
    /// After a SYN from another address with the same sequence number, which expires on its way
    /// (hop limit 1).
    Planted,
    /// The same, and the client's own SYN is fragmented: no program reads it at ingress.
    PlantedFragments,
    /// The same, to the backend's own address.
    PlantedPast,
    /// With flags, data or extension headers that no client sends.
    Odd,
}

#[derive(Debug)]
struct Client {
    family: Family,
    ip: IpAddr,
    port: u16,
    /// The sequence number of its first byte.
    first: u32,
    opening: Opening,
    /// The acknowledgement number for it; `None` if there was no SYN-ACK.
    accepted: Option<u32>,
    /// Whether it does nothing that ends its connection, and must be served.
    honest: bool,
    /// The number of its urgent segments: the receiver takes one byte of each out of the stream.
    urgent: usize,
    header: Vec<u8>,
}

impl Client {
    fn new(family: Family, number: u16, rng: &mut Rng) -> Self {
        let opening = match rng.u8(0..20) {
            0..10 => Opening::Plain,
            10..12 => Opening::Again,
            12..14 => Opening::Planted,
            14..17 => Opening::PlantedFragments,
            17..19 => Opening::PlantedPast,
            _ => Opening::Odd,
        };
        let port = 10_000 + number;
        let victim = if rng.bool() { loopback(family) } else { stranger(family, 9000 + number) };
        let header = forged_header(SocketAddr::new(victim, 4444), wire_testbed::public(family));
        // Colliding numbers, and numbers that wrap around, too.
        let first = if rng.u8(0..4) == 0 { rng.u32(0..200).wrapping_sub(100) } else { rng.u32(..) };
        let ip = stranger(family, 1000 + number);
        Self { family, ip, port, first, opening, accepted: None, honest: false, urgent: 0, header }
    }

    /// Its byte at this position: of a header that names another address, before the first byte,
    /// and its own from there on.
    fn byte(&self, at: i64) -> u8 {
        let len = self.header.len() as i64;
        match usize::try_from(at) {
            Err(_) => self.header[usize::try_from(at.rem_euclid(len)).unwrap_or(0)],
            Ok(at) => u8::try_from(at.wrapping_mul(7).wrapping_add(self.port.into()) % 251).unwrap_or(0),
        }
    }

    fn bytes(&self, at: i64, len: u32) -> Vec<u8> {
        (at..at + i64::from(len)).map(|at| self.byte(at)).collect()
    }

    /// Whether its stream begins like this, except for urgent bytes.
    fn is_stream(&self, bytes: &[u8]) -> bool {
        let (mut at, mut left) = (0, self.urgent);
        for byte in bytes {
            while self.byte(at) != *byte {
                let Some(less) = left.checked_sub(1) else { return false };
                (at, left) = (at + 1, less);
            }
            at += 1;
        }
        true
    }

    fn frame(&self, template: &Frame) -> Frame {
        let mut frame = template.clone();
        (frame.source, frame.destination) =
            (SocketAddr::new(self.ip, self.port), wire_testbed::public(self.family));
        frame.sequence = self.first;
        frame
    }

    fn opening(&self, template: &Frame, rng: &mut Rng) -> Vec<Vec<u8>> {
        let number = self.first.wrapping_sub(1);
        let syn =
            Frame { flags: SYN, sequence: number, options: vec![2, 4, 5, 0xA0], ..self.frame(template) };
        let planted = Frame {
            source: SocketAddr::new(stranger(self.family, 5000 + self.port % 4000), self.port ^ 1),
            hops: 1,
            ..syn.clone()
        };
        match self.opening {
            Opening::Plain => vec![syn.whole()],
            Opening::Again => {
                vec![Frame { sequence: rng.u32(..), ..syn.clone() }.whole(), syn.whole(), syn.whole()]
            }
            Opening::Planted => vec![planted.whole(), syn.whole()],
            Opening::PlantedFragments => [vec![planted.whole()], syn.fragments(rng)].concat(),
            Opening::PlantedPast => {
                vec![
                    planted.whole(),
                    Frame { destination: wire_testbed::backend(self.family), ..syn }.whole(),
                ]
            }
            Opening::Odd => {
                let mut odd = syn;
                match rng.u8(0..5) {
                    0 => odd.flags |= FIN,
                    1 => odd.flags |= URG,
                    2 => odd.payload = self.bytes(-1, 40),
                    3 => odd.extra = Extra::Extension,
                    _ => odd.flags |= RST,
                }
                vec![planted.whole(), odd.whole()]
            }
        }
    }

    /// A few arbitrary segments.
    fn anything(&mut self, template: &Frame, rng: &mut Rng) -> Vec<Vec<u8>> {
        let Some(accepted) = self.accepted else { return Vec::new() };
        self.honest = true;
        // One in three sends only segments that end nothing.
        let calm = rng.u8(0..3) == 0;
        let header = self.header.len() as i64;
        let mut frames = Vec::new();
        for _ in 0..rng.usize(2..9) {
            let at = match rng.u8(0..16) {
                0..4 => 0,
                4..8 => -header,
                8 => -1,
                9 => -header - 1,
                10 => 1,
                11 => i64::from(1_u32 << 31),
                12 => rng.i64(0..i64::from(u32::MAX)),
                13 => -rng.i64(1..80),
                _ => rng.i64(0..40),
            };
            let len = match rng.u8(0..8) {
                0..2 => 0,
                2..4 => u32::try_from(header).unwrap_or(0),
                _ => rng.u32(1..70),
            };
            // What follows its first bytes is consistent with its own stream.
            let len = if (0..200).contains(&at) { len.min(HONEST) } else { len };
            let flags = match rng.u8(0..if calm { 14 } else { 24 }) {
                0..10 => ACK | PSH,
                10..14 => ACK,
                14..17 => ACK | URG,
                17 => ACK | FIN | URG,
                18 => ACK | FIN,
                19 => PSH,
                20 => RST,
                21 => SYN | ACK,
                22 => SYN,
                _ => rng.u8(..),
            };
            let acknowledgement = match rng.u8(if calm { 2 } else { 0 }..10) {
                0 => rng.u32(..),
                1 => accepted.wrapping_sub(1),
                _ => accepted,
            };
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "numbers modulo 2^32"
            )]
            let sequence = self.first.wrapping_add(at as u32);
            // An end, a reset, or a SYN that reopens: nothing is guaranteed after it. Nor is it if
            // one of its own bytes is marked as urgent, which the receiver takes out of the stream.
            let urgent = flags & URG != 0 && (0..i64::from(u32::MAX)).contains(&at);
            self.urgent += usize::from(flags & URG != 0);
            self.honest &= flags & (RST | FIN | SYN) == 0 && !urgent && acknowledgement == accepted;
            let frame = Frame {
                sequence,
                flags,
                acknowledgement,
                urgent: if flags & URG == 0 { 0 } else { rng.u16(0..60) },
                options: vec![1; rng.usize(0..3) * 4],
                payload: self.bytes(at, len),
                padding: if rng.bool() { rng.usize(0..30) } else { 0 },
                ..self.frame(template)
            };
            match rng.u8(0..12) {
                0 => frames.extend(frame.fragments(rng)),
                1 => frames.push(Frame { extra: Extra::Extension, ..frame }.whole()),
                2 => frames.extend([frame.whole(), frame.whole()]),
                _ => frames.push(frame.whole()),
            }
        }
        frames
    }

    /// What an honest client does: it completes the handshake, and sends its first bytes.
    fn honest_end(&self, template: &Frame) -> Vec<Vec<u8>> {
        let Some(acknowledgement) = self.accepted else { return Vec::new() };
        let answer = Frame { flags: ACK, acknowledgement, ..self.frame(template) };
        let data = Frame { flags: ACK | PSH, payload: self.bytes(0, HONEST), ..answer.clone() };
        vec![answer.whole(), data.whole()]
    }

    /// What follows the header, which must be this client's own; `None` if nothing was read.
    fn after_header<'a>(&self, read: &'a [u8], family: Family) -> anyhow::Result<Option<&'a [u8]>> {
        if read.is_empty() {
            return Ok(None);
        }
        let parsed = proxy::parse(read).map_err(|error| anyhow::anyhow!("no header: {error}"))?;
        let Announced::Proxy(addresses) = parsed.command else { bail!("FORGED: a header without addresses") };
        let own = (SocketAddr::new(self.ip, self.port), wire_testbed::public(family));
        let named = (addresses.source(), addresses.destination());
        ensure!(named == own, "FORGED: the header names {named:?}, and this is {own:?}");
        Ok(read.get(parsed.len..))
    }
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    }
}

/// A host that is not a client.
fn stranger(family: Family, host: u16) -> IpAddr {
    let [high, low] = host.to_be_bytes();
    match family {
        Family::V4 => Ipv4Addr::new(203, 0, high, low).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0xee, 0, 0, 0, 0, host).into(),
    }
}
