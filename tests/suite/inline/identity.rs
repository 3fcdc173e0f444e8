//! The address in the header is the client's, whatever other hosts send; and what cannot be
//! distinguished from a forgery does not reach the backend.

use std::io::{self, Write as _};
use std::mem::offset_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use etherparse::{IpHeaders, TcpHeader};
use injector_common::inline::{Address, Entry, Key};
use injector_testbed::bpf::DaemonMap;
use injector_testbed::daemon::Session;
use injector_testbed::netns::Family;
use injector_testbed::sockets::AT_ONCE;
use socket2::{Domain, Socket, Type};

use crate::WireRun;
use crate::testbed::{LIMIT, accept, expect, patient};
use crate::wire::{Direction, Fate, Seen, Side};
use crate::wire_testbed::{self, FirstSpeaker, Forwarding, SysctlGuard, WireTestbed};

pub(crate) const TRIALS: &[(&str, WireRun)] = &[
    ("forged SYNs with the client's sequence number and port", same_numbers),
    ("a flood of forged SYNs", flood),
    ("a forged SYN in an established connection", syn_in_established),
    ("forged handshakes do not fill the map of flows", forged_handshakes),
    ("a SYN and a reset leave no line in the log", syn_and_reset),
    ("a SYN past the public address is dropped", past_the_vip),
    ("a segment without a flow is dropped", without_flow),
    ("connections of the edge itself are left alone", own_of_the_edge),
    ("Fast Open goes to the socket", fast_open),
    ("an entry that leads to another connection", wrong_entry),
];

/// Before and after each SYN of a client, forged ones arrive with the same sequence number and
/// ports.
fn same_numbers(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    const OTHERS: u16 = 8;
    let before = testbed.counted("opened")?;
    let _faulty = testbed.wire.faults(|seen| {
        if !seen.at(Side::Client, Direction::ToBackend) || !seen.is_syn() {
            return Fate::Pass;
        }
        let forged = |hosts: std::ops::Range<u16>| hosts.map(|host| from_elsewhere(seen, host)).collect();
        Fate::Between(forged(100..100 + OTHERS), forged(120..120 + OTHERS))
    });
    let listener = testbed.backend(family)?;
    for first in [FirstSpeaker::Server, FirstSpeaker::Client].into_iter().cycle().take(20) {
        // It compares the header with the client's own address.
        testbed.connection_at(&listener, family, first, LIMIT)?.finish(1000)?;
    }
    let remembered = testbed.counted("opened")? - before;
    ensure!(
        remembered >= 20 * (1 + 2 * u64::from(OTHERS)),
        "of the forged SYNs too few arrived: {remembered}"
    );
    Ok(())
}

/// Thousands of SYNs from many addresses, while clients connect. The backend falls back to SYN
/// cookies. Above the limit on unfinished handshakes SYNs go to the socket.
fn flood(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let listener = testbed.backend(family)?;
    let sample = sample_syn(testbed, family)?;
    let done = AtomicBool::new(false);
    let before = testbed.counted("opened")?;
    std::thread::scope(|scope| {
        let flooding = scope.spawn(|| flood_until(testbed, &sample, &done));
        let outcome = (0..30).try_for_each(|_| {
            testbed.connection_at(&listener, family, FirstSpeaker::Server, LIMIT)?.finish(1000)?;
            testbed.connection_at(&listener, family, FirstSpeaker::Client, LIMIT)?.finish(1000)
        });
        done.store(true, Ordering::Relaxed);
        let sent = flooding.join().map_err(|_| anyhow!("panicked"))?;
        outcome?;
        let remembered = testbed.counted("opened")? - before;
        eprintln!("    60 connections beside {remembered} forged SYNs of {sent}");
        ensure!(remembered > 1000, "only {remembered} of {sent} forged SYNs arrived");
        Ok(())
    })
}

fn flood_until(testbed: &WireTestbed, sample: &Sample, done: &AtomicBool) -> u32 {
    const LIMIT: u32 = 3000;
    let mut sent = 0_u32;
    while !done.load(Ordering::Relaxed) && sent < LIMIT {
        for _ in 0..64 {
            sent += 1;
            let frame = sample.with(|ip, tcp| {
                set_source(ip, u16::try_from(sent % 3000).unwrap_or(0) + 300);
                tcp.source_port = u16::try_from(sent % 50_000).unwrap_or(0) + 1024;
                tcp.sequence_number = sent.wrapping_mul(0x9E37_79B9);
            });
            let _ = testbed.wire.inject(Side::Client, Direction::ToBackend, &frame);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    sent
}

/// A SYN with the addresses and ports of an existing connection, and another number.
fn syn_in_established(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let (sender, syn) = mpsc::channel();
    let faulty = testbed.wire.faults(move |seen| {
        if seen.at(Side::Client, Direction::ToBackend) && seen.is_syn() {
            let _ = sender.send(Sample::of(seen));
        }
        Fate::Pass
    });
    let mut connection = testbed.connection(family, FirstSpeaker::Server)?;
    drop(faulty);
    let syn = syn.recv_timeout(LIMIT)?.context("no SYN")?;
    for number in [1, 1 << 20, 1 << 31] {
        let frame = syn.with(|_, tcp| tcp.sequence_number = tcp.sequence_number.wrapping_add(number));
        testbed.wire.inject(Side::Client, Direction::ToBackend, &frame)?;
        connection.client.write_all(b"still here")?;
        expect(&mut connection.server, b"still here")?;
    }
    connection.finish(100_000)
}

/// A host that cannot read the backend's packets cannot finish a handshake: it has no connection, and
/// the backend gets nothing.
fn forged_handshakes(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let _listener = testbed.backend(family)?;
    let sample = sample_syn(testbed, family)?;
    let before = (testbed.counted("opened")?, testbed.counted("appended")?, testbed.counted("established")?);
    let handshake = |host: u16, guess: u32| {
        let syn = sample.with(|ip, tcp| {
            set_source(ip, host);
            tcp.source_port = 7000;
        });
        let ack = sample.with(|ip, tcp| {
            set_source(ip, host);
            tcp.source_port = 7000;
            tcp.syn = false;
            tcp.ack = true;
            tcp.sequence_number = tcp.sequence_number.wrapping_add(1);
            tcp.acknowledgment_number = guess;
        });
        testbed.wire.inject(Side::Client, Direction::ToBackend, &syn)?;
        // Time for the backend's SYN-ACK to arrive.
        std::thread::sleep(Duration::from_millis(3));
        testbed.wire.inject(Side::Client, Direction::ToBackend, &ack)
    };
    for attempt in 0..60_u16 {
        handshake(4000 + attempt, u32::from(attempt).wrapping_mul(0x4000_0001))?;
    }
    std::thread::sleep(Duration::from_millis(20));
    let opened = testbed.counted("opened")? - before.0;
    let appended = testbed.counted("appended")? - before.1;
    let established = testbed.counted("established")? - before.2;
    ensure!(appended == 0 && established == 0, "{established} forged handshakes were taken for true");
    ensure!(opened == 60, "{opened} were opened");
    Ok(())
}

/// An unverified address is not logged: otherwise a program that bans by the log could be made to
/// ban any address.
fn syn_and_reset(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let listener = testbed.backend(family)?;
    let sample = sample_syn(testbed, family)?;
    let before = testbed.counted("opened")?;
    for host in 0..20 {
        for reset in [false, true] {
            let frame = sample.with(|ip, tcp| {
                set_source(ip, 5000 + host);
                tcp.source_port = 7100;
                (tcp.syn, tcp.rst) = (!reset, reset);
                tcp.sequence_number = tcp.sequence_number.wrapping_add(reset.into());
            });
            testbed.wire.inject(Side::Client, Direction::ToBackend, &frame)?;
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    // A later connection has a log line, so theirs would be there as well.
    let connection = testbed.connection_at(&listener, family, FirstSpeaker::Server, LIMIT)?;
    let client = connection.client.local_addr()?;
    connection.finish(1000)?;
    testbed.session(client, wire_testbed::public(family))?;
    ensure!(testbed.counted("opened")? >= before + 20, "too few SYNs arrived");
    let of_port = |session: &Session| session.client().is_some_and(|client| client.port() == 7100);
    let line = testbed.injector.sessions()?.into_iter().find(of_port);
    ensure!(line.is_none(), "a line for a client that was never there: {line:?}");
    Ok(())
}

/// Directly to the backend's own address, through the edge: no program has checked it there.
fn past_the_vip(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let listener = testbed.backend(family)?;
    let _forwarding = Forwarding::new(testbed.edge())?;
    let before = testbed.counted("proxy_port")?;
    let connect = || TcpStream::connect_timeout(&wire_testbed::backend(family), Duration::from_millis(300));
    let outcome = testbed.client_side().run(connect)?;
    ensure!(
        outcome.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut),
        "connected past the public address: {outcome:?}"
    );
    ensure!(testbed.counted("proxy_port")? > before, "not counted");
    listener.set_nonblocking(true)?;
    ensure!(listener.accept().is_err(), "the backend has it");
    Ok(())
}

/// In the middle of a connection that does not exist.
fn without_flow(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let _listener = testbed.backend(family)?;
    let sample = sample_syn(testbed, family)?;
    let _forwarding = Forwarding::new(testbed.edge())?;
    let before = testbed.counted("proxy_port")?;
    let (sender, arrived) = mpsc::channel();
    // Opening it takes a SYN; that one goes to no listener.
    let _faulty = testbed.wire.faults(move |seen| {
        if seen.at(Side::Backend, Direction::ToBackend) && !seen.is_syn() {
            let _ = sender.send(seen.tcp.sequence_number());
        }
        Fate::Pass
    });
    let backend = wire_testbed::backend(family);
    for flags in [(true, false, false), (true, true, false), (true, false, true), (false, false, true)] {
        let frame = sample.with(|ip, tcp| {
            match (ip, backend.ip()) {
                (IpHeaders::Ipv4(ip, _), IpAddr::V4(to)) => ip.destination = to.octets(),
                (IpHeaders::Ipv6(ip, _), IpAddr::V6(to)) => ip.destination = to.octets(),
                _ => {}
            }
            tcp.destination_port = backend.port();
            tcp.syn = false;
            (tcp.ack, tcp.fin, tcp.rst) = flags;
            tcp.acknowledgment_number = 1;
        });
        testbed.wire.inject(Side::Client, Direction::ToBackend, &frame)?;
    }
    std::thread::sleep(Duration::from_millis(30));
    let dropped = testbed.counted("proxy_port")? - before;
    ensure!(dropped == 4, "{dropped} were counted");
    ensure!(arrived.try_recv().is_err(), "one has reached the backend");
    Ok(())
}

/// Health checks, and other connections that start there: no header, no translation.
fn own_of_the_edge(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let listener = testbed.backend(family)?;
    let connect = || TcpStream::connect_timeout(&wire_testbed::backend(family), LIMIT);
    let mut client = testbed.edge().run(connect)?.context("from the edge")?;
    patient(&client)?;
    let mut server = accept(&listener)?;
    client.write_all(b"from the edge")?;
    expect(&mut server, b"from the edge")?;
    wire_testbed::through(&client, &server, 100_000, 0)?;
    wire_testbed::through(&server, &client, 100_000, 0)
}

/// A SYN with data is left to the socket, where another engine reads what follows it.
fn fast_open(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    const KEY: &str = "net/ipv4/tcp_fastopen";
    // The client needs no cookie, and the backend would accept data without one, on every socket.
    let _both = [
        SysctlGuard::new(testbed.client_side(), KEY, "5")?,
        SysctlGuard::new(testbed.backend_side(), KEY, "1538")?,
    ];
    let before = testbed.counted("to_socket_syn")?;
    let listener = testbed.backend(family)?;
    let start = Instant::now();
    let connect = || {
        let socket = Socket::new(Domain::for_address(wire_testbed::public(family)), Type::STREAM, None)?;
        let to = wire_testbed::public(family).into();
        socket.send_to_with_flags(b"early data", &to, libc::MSG_FASTOPEN)?;
        io::Result::Ok(TcpStream::from(socket))
    };
    let client = testbed.client_side().run(connect)?.context("Fast Open")?;
    patient(&client)?;
    let mut server = accept(&listener)?;
    let (named, _) = crate::testbed::header(&mut server)?;
    ensure!(named == client.local_addr()?, "the header names {named}");
    expect(&mut server, b"early data")?;
    let took = start.elapsed();
    wire_testbed::through(&client, &server, 10_000, 0)?;
    wire_testbed::through(&server, &client, 10_000, 0)?;
    let left = testbed.counted("to_socket_syn")? - before;
    ensure!(left == 1, "{left} SYNs with data were left to the socket");
    ensure!(took < AT_ONCE, "it took {took:?}");
    eprintln!("    early data after {took:.0?}");
    Ok(())
}

/// A packet as a template for others.
pub(crate) struct Sample {
    link: Vec<u8>,
    ip: IpHeaders,
    tcp: TcpHeader,
}

impl Sample {
    fn of(seen: &Seen<'_>) -> Option<Self> {
        let (link, packet) = seen.frame.split_at_checked(seen.ip_at)?;
        let (ip, payload) = IpHeaders::from_slice(packet).ok()?;
        let (tcp, _) = TcpHeader::from_slice(payload.payload).ok()?;
        Some(Self { link: link.to_vec(), ip, tcp })
    }

    /// A frame without payload, modified, with correct checksums.
    fn with(&self, change: impl FnOnce(&mut IpHeaders, &mut TcpHeader)) -> Vec<u8> {
        self.try_with(change).unwrap_or_default()
    }

    fn try_with(&self, change: impl FnOnce(&mut IpHeaders, &mut TcpHeader)) -> Option<Vec<u8>> {
        let (mut ip, mut tcp) = (self.ip.clone(), self.tcp.clone());
        change(&mut ip, &mut tcp);
        let sum = match &ip {
            IpHeaders::Ipv4(ip, _) => tcp.calc_checksum_ipv4(ip, &[]),
            IpHeaders::Ipv6(ip, _) => tcp.calc_checksum_ipv6(ip, &[]),
        };
        tcp.checksum = sum.ok()?;
        let mut frame = self.link.clone();
        ip.write(&mut frame).ok()?;
        tcp.write(&mut frame).ok()?;
        Some(frame)
    }
}

/// A SYN like a client's, from an address that is not a client's.
fn sample_syn(testbed: &WireTestbed, family: Family) -> anyhow::Result<Sample> {
    let (sender, syn) = mpsc::channel();
    let _faulty = testbed.wire.faults(move |seen| {
        if seen.at(Side::Client, Direction::ToBackend) && seen.is_syn() {
            let _ = sender.send(Sample::of(seen));
            return Fate::Drop;
        }
        Fate::Pass
    });
    let connect = || TcpStream::connect_timeout(&wire_testbed::public(family), Duration::from_millis(50));
    let _ = testbed.client_side().run(connect)?;
    syn.recv_timeout(LIMIT)?.context("no SYN")
}

fn from_elsewhere(seen: &Seen<'_>, host: u16) -> Vec<u8> {
    Sample::of(seen).map(|syn| syn.with(|ip, _| set_source(ip, host))).unwrap_or_default()
}

/// Another host, which does not respond.
fn set_source(ip: &mut IpHeaders, host: u16) {
    let [high, low] = host.to_be_bytes();
    match ip {
        IpHeaders::Ipv4(ip, _) => ip.source = Ipv4Addr::new(203, 0, high, low).octets(),
        IpHeaders::Ipv6(ip, _) => ip.source = Ipv6Addr::new(0x2001, 0xdb8, 0xee, 0, 0, 0, 0, host).octets(),
    }
}

/// While the entries of two connections are exchanged, no packet of one passes as the other's. Of the
/// client's, the numbers let only some pass.
fn wrong_entry(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    (0..6).try_for_each(|_| exchanged_entries(testbed, family))
}

fn exchanged_entries(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let mut both = [
        testbed.connection(family, FirstSpeaker::Server)?,
        testbed.connection(family, FirstSpeaker::Server)?,
    ];
    let entries = DaemonMap::pinned(&testbed.pin().join("v7/maps/FLOWS"))?;
    let pairs = entries.pairs(size_of::<Entry>())?;
    let established = |value: &[u8]| value[offset_of!(Entry, established)..][..4].to_vec();
    let slot = |client: &TcpStream| {
        let port = client.local_addr()?.port().to_ne_bytes();
        let at = offset_of!(Key, source) + offset_of!(Address, port);
        let entry = pairs.iter().find(|(key, _)| key[at..][..2] == port);
        anyhow::Ok(established(&entry.context("no entry")?.1))
    };
    let [one, other] = [slot(&both[0].client)?, slot(&both[1].client)?];
    let mut exchanged = 0;
    for (key, value) in &pairs {
        let slot = established(value);
        let slot = if slot == one {
            &other
        } else if slot == other {
            &one
        } else {
            continue;
        };
        let mut value = value.clone();
        value[offset_of!(Entry, established)..][..4].copy_from_slice(slot);
        entries.set(key, &value)?;
        exchanged += 1;
    }
    ensure!(exchanged == 4, "{exchanged} entries");
    let (sender, passed) = mpsc::channel();
    let watching = testbed.wire.faults(move |seen| {
        if seen.at(Side::Backend, Direction::ToBackend) || seen.at(Side::Client, Direction::ToClient) {
            let _ = sender.send(seen.source());
        }
        Fate::Pass
    });
    for connection in &mut both {
        testbed.wire.watch(connection.client.local_addr()?.port());
        testbed.wire.watch(connection.server.peer_addr()?.port());
        connection.client.write_all(b"client")?;
        connection.server.write_all(b"server")?;
    }
    let passed = passed.recv_timeout(Duration::from_millis(30));
    ensure!(passed.is_err(), "a packet of {passed:?} has passed");
    drop(watching);
    pairs.iter().try_for_each(|(key, value)| entries.set(key, value))?;
    for connection in &mut both {
        expect(&mut connection.server, b"client")?;
        expect(&mut connection.client, b"server")?;
        connection.finish(1000)?;
    }
    Ok(())
}
