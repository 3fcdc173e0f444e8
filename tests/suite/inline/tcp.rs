//! What TCP is made of goes through: its options, windows, ends and errors, losses in mid-stream and numbers that wrap around.

use std::collections::HashSet;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use etherparse::{
    Icmpv4Type, Icmpv6Type, NetSlice, PacketBuilder, TcpOptionElement, icmpv4::DestUnreachableHeader,
};
use injector_testbed::daemon::Session;
use injector_testbed::netns::Family;
use socket2::{SockRef, Socket, TcpKeepalive};

use crate::losses::Order;
use crate::testbed::{LIMIT, World, accept, expect, own_header};
use crate::wire::{Fate, Layer, Seen, Side, Way};
use crate::wire_testbed::{First, Lab, Setting, through};
use crate::{LabRun, wire_testbed};

pub(crate) const TRIALS: &[(&str, LabRun)] = &[
    ("without timestamps", |lab, family| with(lab, family, &[("net/ipv4/tcp_timestamps", "0")])),
    ("without SACK", |lab, family| with(lab, family, &[("net/ipv4/tcp_sack", "0")])),
    ("without window scaling", |lab, family| with(lab, family, &[("net/ipv4/tcp_window_scaling", "0")])),
    ("without any option", |lab, family| {
        let off = [
            ("net/ipv4/tcp_timestamps", "0"),
            ("net/ipv4/tcp_sack", "0"),
            ("net/ipv4/tcp_window_scaling", "0"),
        ];
        with(lab, family, &off)
    }),
    ("with ECN", |lab, family| with(lab, family, &[("net/ipv4/tcp_ecn", "1")])),
    ("with SYN cookies", syn_cookies),
    ("losses in mid-stream, SACK blocks fit", sack),
    ("windows closed for a while", zero_window),
    ("half-close, the client first", |lab, family| half_close(lab, family, Way::ToBackend)),
    ("half-close, the backend first", |lab, family| half_close(lab, family, Way::ToClient)),
    ("both ends close at once", simultaneous_close),
    ("reset by the client", |lab, family| reset(lab, family, Way::ToBackend)),
    ("reset by the backend", |lab, family| reset(lab, family, Way::ToClient)),
    ("reset by the client before the header has come", early_reset),
    ("refused by the backend", refused),
    ("same ports again after a reset", |lab, family| same_ports(lab, family, true)),
    ("same ports again, TIME_WAIT at the backend", |lab, family| same_ports(lab, family, false)),
    ("keep-alive probes", keepalive),
    ("path MTU found behind the edge", path_mtu),
    ("numbers that wrap around", wrap),
    ("numbers that wrap around, header lost", wrap_with_loss),
];

const BYTES: usize = 1 << 20;

/// With these settings at both ends: the header lost once, and packets in mid-stream.
fn with(lab: &Lab, family: Family, settings: &[(&'static str, &str)]) -> anyhow::Result<()> {
    let mut kept = Vec::new();
    for (key, value) in settings {
        for netns in [lab.client_side(), lab.backend_side()] {
            kept.push(Setting::new(netns, key, value)?);
        }
    }
    for first in [First::Client, First::Server] {
        let (mut order, mut headers) = (Order(5), 0);
        let _faulty = lab.wire.faults(move |seen| {
            headers += u32::from(seen.is_header());
            let header = seen.is_header() && headers == 1 && first == First::Client;
            let data =
                seen.is_data() && !seen.is_header() && seen.side == Side::Backend && order.below(100) == 0;
            if header || data { Fate::Drop } else { Fate::Pass }
        });
        lab.connection(family, first)?.finish(BYTES)?;
    }
    Ok(())
}

/// The backend remembers nothing of the SYN: the header's segment must carry the very numbers that prove it.
fn syn_cookies(lab: &Lab, family: Family) -> anyhow::Result<()> {
    let _always = Setting::new(lab.backend_side(), "net/ipv4/tcp_syncookies", "2")?;
    First::ALL.into_iter().try_for_each(|first| lab.connection(family, first)?.finish(BYTES))
}

/// Every block that the client is told of is of what it has sent and not of what it was told has come.
fn sack(lab: &Lab, family: Family) -> anyhow::Result<()> {
    let seen_blocks = Arc::new(AtomicU32::new(0));
    let wrong = Arc::new(Mutex::new(Vec::new()));
    let mut order = Order(3);
    let mut sent = None;
    let (blocks, complaints) = (Arc::clone(&seen_blocks), Arc::clone(&wrong));
    let _faulty = lab.wire.faults(move |seen| {
        let tcp = seen.tcp;
        if seen.at(Side::Client, Way::ToBackend) {
            let len = u32::try_from(tcp.payload().len()).unwrap_or(0) + u32::from(tcp.fin());
            let end = tcp.sequence_number().wrapping_add(len);
            let furthest = sent.get_or_insert(end);
            if end.wrapping_sub(*furthest) < 1 << 31 {
                *furthest = end;
            }
        }
        if let (true, Some(sent)) = (seen.at(Side::Client, Way::ToClient), sent) {
            for (start, end) in sack_blocks(seen) {
                blocks.fetch_add(1, Ordering::Relaxed);
                let fits = end.wrapping_sub(start) < 1 << 20
                    && sent.wrapping_sub(end) < 1 << 31
                    && start.wrapping_sub(tcp.acknowledgment_number().wrapping_sub(1 << 20)) < 1 << 22;
                if !fits {
                    let at = (start, end, tcp.acknowledgment_number(), sent);
                    complaints.lock().unwrap_or_else(PoisonError::into_inner).push(at);
                }
            }
        }
        let far = seen.is_data() && !seen.is_header() && seen.side == Side::Backend;
        if far && order.below(50) == 0 { Fate::Drop } else { Fate::Pass }
    });
    let connection = lab.connection(family, First::Server)?;
    connection.finish(2 * BYTES)?;
    let sack = seen_blocks.load(Ordering::Relaxed);
    let wrong = wrong.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(wrong.is_empty(), "blocks (start, end), acknowledged and sent: {wrong:?}");
    ensure!(sack > 0, "no SACK block was seen");
    Ok(())
}

fn sack_blocks(seen: &Seen<'_>) -> Vec<(u32, u32)> {
    let element = |element| match element {
        Ok(TcpOptionElement::SelectiveAcknowledgement(first, rest)) => {
            std::iter::once(first).chain(rest.into_iter().flatten()).collect()
        }
        _ => Vec::new(),
    };
    seen.tcp.options_iterator().flat_map(element).collect()
}

/// Neither end reads until both windows have been closed for a second; then everything is there.
fn zero_window(lab: &Lab, family: Family) -> anyhow::Result<()> {
    const MUCH: usize = 12 << 20;
    let connection = lab.connection(family, First::Server)?;
    let (client, server) = (&connection.client, &connection.server);
    for socket in [client, server] {
        SockRef::from(socket).set_recv_buffer_size(64 << 10)?;
        SockRef::from(socket).set_send_buffer_size(64 << 10)?;
    }

    let send = |mut from: &TcpStream| {
        let bytes: Vec<u8> = (0_u8..251).cycle().take(MUCH).collect();
        from.write_all(&bytes).and_then(|()| from.shutdown(Shutdown::Write))
    };
    let receive = |mut to: &TcpStream| {
        std::thread::sleep(Duration::from_millis(1000));
        let mut seen = Vec::new();
        to.read_to_end(&mut seen)?;
        io::Result::Ok(seen)
    };
    std::thread::scope(|scope| {
        let sending = [scope.spawn(|| send(client)), scope.spawn(|| send(server))];
        let receiving = [scope.spawn(|| receive(client)), scope.spawn(|| receive(server))];
        for sending in sending {
            sending.join().map_err(|_| anyhow!("panicked"))?.context("sending")?;
        }
        let expected: Vec<u8> = (0_u8..251).cycle().take(MUCH).collect();
        for receiving in receiving {
            let seen = receiving.join().map_err(|_| anyhow!("panicked"))?.context("receiving")?;
            ensure!(seen == expected, "{} bytes of {MUCH}, or not the same", seen.len());
        }

        Ok(())
    })
}

/// One way ends, the other goes on.
fn half_close(lab: &Lab, family: Family, way: Way) -> anyhow::Result<()> {
    let connection = lab.connection(family, First::Server)?;
    let (first, last) = match way {
        Way::ToBackend => (&connection.client, &connection.server),
        Way::ToClient => (&connection.server, &connection.client),
    };
    through(first, last, 1000, 0)?;
    std::thread::sleep(Duration::from_millis(50));
    through(last, first, BYTES, 0)?;
    let session = lab.session(connection.client.local_addr()?, wire_testbed::public(family))?;
    let end = if way == Way::ToBackend { "client_closed" } else { "backend_closed" };
    ensure!(session.field("reason").as_deref() == Some(end), "{session:?}");
    Ok(())
}

/// The FINs cross.
fn simultaneous_close(lab: &Lab, family: Family) -> anyhow::Result<()> {
    let _faulty = lab.wire.faults(|seen| {
        if seen.tcp.fin() && seen.side == Side::Backend {
            Fate::Late(Duration::from_millis(30))
        } else {
            Fate::Pass
        }
    });
    let mut connection = lab.connection(family, First::Server)?;
    connection.client.shutdown(Shutdown::Write)?;
    connection.server.shutdown(Shutdown::Write)?;
    for stream in [&mut connection.client, &mut connection.server] {
        ensure!(stream.read(&mut [0; 8]).context("waiting for the FIN")? == 0, "bytes in place of an end");
    }
    lab.session(connection.client.local_addr()?, wire_testbed::public(family))?;
    Ok(())
}

/// The other end sees it at once.
fn reset(lab: &Lab, family: Family, way: Way) -> anyhow::Result<()> {
    let connection = lab.connection(family, First::Server)?;
    let address = connection.client.local_addr()?;
    let (goes, mut stays) = match way {
        Way::ToBackend => (connection.client, connection.server),
        Way::ToClient => (connection.server, connection.client),
    };
    stays.write_all(b"not read")?;
    std::thread::sleep(Duration::from_millis(10));
    let start = Instant::now();
    SockRef::from(&goes).set_linger(Some(Duration::ZERO))?;
    drop(goes);
    let outcome = stays.read(&mut [0; 8]);
    ensure!(outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{outcome:?}");
    ensure!(start.elapsed() < Duration::from_millis(100), "after {:?}", start.elapsed());
    let session = lab.session(address, wire_testbed::public(family))?;
    let end = if way == Way::ToBackend { "client_reset" } else { "backend_reset" };
    ensure!(session.field("reason").as_deref() == Some(end), "{session:?}");
    Ok(())
}

/// The header was lost, then the client resets: the backend has a connection, and learns that it is none.
fn early_reset(lab: &Lab, family: Family) -> anyhow::Result<()> {
    let mut dropped = 0;
    let _faulty = lab.wire.faults(move |seen| {
        dropped += u32::from(seen.is_header());
        if seen.is_header() && dropped < 4 { Fate::Drop } else { Fate::Pass }
    });
    let listener = lab.backend(family)?;
    let mut client = lab.client(family)?;
    // The first data gives the backend its connection, without the header.
    client.write_all(b"EHLO")?;
    let mut server = accept(&listener)?;
    SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
    drop(client);
    let start = Instant::now();
    // Perhaps it gets the header first, but never data without it, and no clean end.
    let mut seen = Vec::new();
    let outcome = server.read_to_end(&mut seen);
    ensure!(
        outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
        "{outcome:?}, {seen:02x?}"
    );
    ensure!(!seen.starts_with(b"EHLO"), "data without a header");
    ensure!(start.elapsed() < Duration::from_millis(1500), "after {:?}", start.elapsed());
    Ok(())
}

/// The client is refused at once, and that is counted. It is no line of the log: nobody has shown that the SYN came from where it
/// says.
fn refused(lab: &Lab, family: Family) -> anyhow::Result<()> {
    let closed = || -> anyhow::Result<f64> {
        let labels = [("listener", "lab"), ("reason", "backend_refused")];
        Ok(lab.injector.metrics()?.sum("injector_connections_closed_total", &labels))
    };
    let before = (closed()?, lab.counted("refused")?);
    let start = Instant::now();
    let Err(error) = lab.client(family) else { bail!("connected to nobody") };
    ensure!(is(&error, ErrorKind::ConnectionRefused), "{error:#}");
    ensure!(start.elapsed() < Duration::from_millis(300), "after {:?}", start.elapsed());
    let deadline = Instant::now() + LIMIT;
    while closed()? < before.0 + 1.0 {
        ensure!(Instant::now() < deadline, "not counted for the listener");
        std::thread::sleep(Duration::from_millis(10));
    }
    ensure!(lab.counted("refused")? == before.1 + 1, "not counted by the program");
    let refused = |session: &Session| session.field("reason").as_deref() == Some("backend_refused");
    let line = lab.injector.sessions()?.into_iter().find(refused);
    ensure!(line.is_none(), "a line for a SYN: {line:?}");
    Ok(())
}

/// The same addresses and ports at once again, several times.
fn same_ports(lab: &Lab, family: Family, by_reset: bool) -> anyhow::Result<()> {
    let listener = lab.backend(family)?;
    let mut port = 0;
    for turn in 0..5 {
        let mut client = again_from(lab, family, port).with_context(|| format!("turn {turn}"))?;
        port = client.local_addr()?.port();
        let mut server = accept(&listener).with_context(|| format!("turn {turn}"))?;
        own_header(&mut server, &client).with_context(|| format!("turn {turn}"))?;
        server.write_all(b"220 hello")?;
        expect(&mut client, b"220 hello")?;
        if by_reset {
            client.write_all(b"QUIT")?;
            expect(&mut server, b"QUIT")?;
            SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
            drop(client);
            let outcome = server.read(&mut [0; 8]);
            ensure!(outcome.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "no reset");
        } else {
            // The backend's FIN comes first, and so it is there that TIME_WAIT is found by the next turn.
            server.shutdown(Shutdown::Write)?;
            ensure!(client.read(&mut [0; 8])? == 0, "bytes in place of an end");
            through(&client, &server, 10_000, turn)?;
        }
    }
    Ok(())
}

/// Connects from this port, as soon as the client's kernel has seen the end of the connection before.
fn again_from(lab: &Lab, family: Family, port: u16) -> anyhow::Result<TcpStream> {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        let outcome = lab.client_by(family, |socket| {
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::new(wire_testbed::client_ip(family), port).into())
        });
        match outcome {
            Err(error) if Instant::now() < deadline && is(&error, ErrorKind::AddrNotAvailable) => {
                std::thread::sleep(Duration::from_millis(2));
            }
            outcome => return outcome,
        }
    }
}

fn is(error: &anyhow::Error, kind: ErrorKind) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == kind)
}

/// Probes have a number before the next byte; they are answered, and the connection lives.
fn keepalive(lab: &Lab, family: Family) -> anyhow::Result<()> {
    let probes = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&probes);
    let mut last = None;
    let _faulty = lab.wire.faults(move |seen| {
        if seen.at(Side::Backend, Way::ToBackend) && seen.is_bare_ack() {
            let number = seen.tcp.sequence_number();
            if last.is_some_and(|last: u32| last.wrapping_sub(number) == 1) {
                count.fetch_add(1, Ordering::Relaxed);
            } else {
                last = Some(number);
            }
        }
        Fate::Pass
    });
    let often = TcpKeepalive::new()
        .with_time(Duration::from_secs(1))
        .with_interval(Duration::from_secs(1))
        .with_retries(1);
    let connection = lab.connection(family, First::Server)?;
    SockRef::from(&connection.client).set_tcp_keepalive(&often)?;
    SockRef::from(&connection.server).set_tcp_keepalive(&often)?;
    // A probe without an answer would end it a second later.
    std::thread::sleep(Duration::from_millis(2600));
    connection.finish(10_000)?;
    ensure!(probes.load(Ordering::Relaxed) >= 1, "no probe was seen");
    Ok(())
}

/// Behind the edge there is a narrower link, whose router says so: the client must be told in its own numbers, believe it, and
/// send less at once. (Linux takes any number of what is under way; others need not.)
fn path_mtu(lab: &Lab, family: Family) -> anyhow::Result<()> {
    const MTU: u16 = 1300;
    let answers = Arc::new(AtomicU32::new(0));
    let (count, layer) = (Arc::clone(&answers), lab.layer);
    let sent = Arc::new(Mutex::new(HashSet::new()));
    let sending = Arc::clone(&sent);
    let _faulty = lab.wire.faults(move |seen| {
        if seen.at(Side::Client, Way::ToBackend) && seen.is_data() {
            sending.lock().unwrap_or_else(PoisonError::into_inner).insert(seen.tcp.sequence_number());
        }
        narrow_link(seen, layer, MTU, &count)
    });
    let connection = lab.connection(family, First::Server)?;
    let start = Instant::now();
    through(&connection.client, &connection.server, BYTES, 0)?;
    let took = start.elapsed();
    let answers = answers.load(Ordering::Relaxed);
    eprintln!("    1 MiB in {took:.0?}, {answers} packets were too big");
    ensure!(answers > 0, "nothing was too big");
    ensure!(took < Duration::from_secs(2), "it took {took:?}");
    let told = lab.wire.quoted();
    let sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(!told.is_empty(), "the client was told nothing");
    ensure!(told.iter().all(|number| sent.contains(number)), "of {told:?} the client has sent {sent:?}");
    forget_path_mtu(lab)
}

/// A narrower link behind the edge, whose router answers what is too big for it, and counts that.
pub(crate) fn narrow_link(seen: &Seen<'_>, layer: Layer, mtu: u16, answers: &AtomicU32) -> Fate {
    let too_big = seen.frame.len() - seen.ip_at > usize::from(mtu);
    if !seen.at(Side::Backend, Way::ToBackend) || !too_big {
        return Fate::Pass;
    }
    answers.fetch_add(1, Ordering::Relaxed);
    too_big_for(seen, layer, mtu).map_or(Fate::Drop, Fate::Answer)
}

/// The client remembers for ten minutes what it was told; other trials are to begin anew.
pub(crate) fn forget_path_mtu(lab: &Lab) -> anyhow::Result<()> {
    let flush = ["route", "flush", "cache"];
    lab.client_side().ip(&flush)?;
    lab.client_side().ip(&[&["-6"], &flush[..]].concat())
}

/// What a router answers: RFC 792 and 1191, RFC 4443 section 3.2.
fn too_big_for(seen: &Seen<'_>, layer: Layer, mtu: u16) -> Option<Vec<u8>> {
    let packet = &seen.frame[seen.ip_at..];
    let quote = &packet[..packet.len().min(500)];
    let link = match layer {
        Layer::Ethernet => {
            let [to, from] = [seen.frame.first_chunk()?, seen.frame.get(6..)?.first_chunk()?];
            Some(PacketBuilder::ethernet2(*to, *from))
        }
        Layer::Ip => None,
    };
    let mut frame = Vec::new();
    match seen.ip {
        NetSlice::Ipv4(ip) => {
            let to = ip.header().source();
            let router = Ipv4Addr::new(10, 26, 0, 2).octets();
            let kind = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                next_hop_mtu: mtu,
            });
            let step = match link {
                Some(link) => link.ipv4(router, to, 64),
                None => PacketBuilder::ipv4(router, to, 64),
            };
            step.icmpv4(kind).write(&mut frame, quote).ok()?;
        }
        NetSlice::Ipv6(ip) => {
            let (from, to) = (ip.header().destination(), ip.header().source());
            let kind = Icmpv6Type::PacketTooBig { mtu: u32::from(mtu) };
            let step = match link {
                Some(link) => link.ipv6(from, to, 64),
                None => PacketBuilder::ipv6(from, to, 64),
            };
            step.icmpv6(kind).write(&mut frame, quote).ok()?;
        }
        _ => return None,
    }
    Some(frame)
}

/// Initial numbers for which the header, or what the client says first, lies across 2^32; and across 2^31, where comparisons
/// change sides.
pub(crate) const EDGES: [u32; 9] = [
    u32::MAX,
    u32::MAX - 1,
    u32::MAX - 14,
    u32::MAX - 28,
    u32::MAX - 29,
    u32::MAX - 52,
    u32::MAX - 40_000,
    (1 << 31) - 2,
    (1 << 31) - 20,
];

fn wrap(lab: &Lab, family: Family) -> anyhow::Result<()> {
    for (number, first) in EDGES.into_iter().zip([First::Server, First::Client].into_iter().cycle()) {
        begins_at(lab, family, first, number)?;
    }
    Ok(())
}

fn wrap_with_loss(lab: &Lab, family: Family) -> anyhow::Result<()> {
    for number in EDGES {
        let (mut order, mut headers) = (Order(9), 0);
        let _faulty = lab.wire.faults(move |seen| {
            headers += u32::from(seen.is_header());
            let header = seen.is_header() && headers == 1;
            let data =
                seen.is_data() && !seen.is_header() && seen.side == Side::Backend && order.below(60) == 0;
            if header || data { Fate::Drop } else { Fate::Pass }
        });
        begins_at(lab, family, First::Client, number)?;
    }
    Ok(())
}

pub(crate) fn begins_at(lab: &Lab, family: Family, first: First, number: u32) -> anyhow::Result<()> {
    let name = || format!("initial sequence number {number}");
    let connection =
        lab.connection_by(family, first, |socket| begin_at(socket, number)).with_context(name)?;
    connection.finish(100_000).with_context(name)
}

/// Has a socket connect with this initial sequence number: a queue that has a number already keeps it (tcp_v4_connect in
/// net/ipv4/tcp_ipv4.c). Only a socket in repair can be given one (tcp(7) is silent; kernel commit ee9952831cfd).
fn begin_at(socket: &Socket, number: u32) -> io::Result<()> {
    const SEND_QUEUE: u32 = 2;
    const OFF_WITHOUT_PROBE: u32 = u32::MAX;
    let steps = [
        (libc::TCP_REPAIR, 1),
        (libc::TCP_REPAIR_QUEUE, SEND_QUEUE),
        (libc::TCP_QUEUE_SEQ, number),
        (libc::TCP_REPAIR, OFF_WITHOUT_PROBE),
    ];
    for (option, value) in steps {
        let len = libc::socklen_t::try_from(size_of_val(&value)).unwrap_or(4);
        // SAFETY: the value outlives the call, and has the length given.
        let result = unsafe {
            libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, (&raw const value).cast(), len)
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// More than 2^32 bytes each way in one connection, on the devices with all offloads; hashed at both ends.
pub(crate) fn five_gibibytes(world: &World, family: Family) -> anyhow::Result<()> {
    const BYTES: u64 = (5 << 30) + 12_345;
    let backend: TcpListener = world.backend(family)?;
    let _injector = world.injector("smtp", "")?;
    let client = world.client(family)?;
    let mut server = accept(&backend)?;
    own_header(&mut server, &client)?;
    let start = Instant::now();
    std::thread::scope(|scope| {
        let up = scope.spawn(|| hashed(&client, &server, BYTES));
        let down = hashed(&server, &client, BYTES);
        up.join().map_err(|_| anyhow!("panicked"))?.and(down)
    })?;
    let took = start.elapsed().as_secs_f64();
    eprintln!("    {BYTES} bytes each way at once in {took:.1} s");
    Ok(())
}

fn hashed(mut from: &TcpStream, mut to: &TcpStream, bytes: u64) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || {
            let mut hash = blake3::Hasher::new();
            let mut block: Vec<u8> = (0_u8..251).cycle().take(1 << 20).collect();
            let mut left = bytes;
            while left > 0 {
                // No two blocks are the same.
                block[..8].copy_from_slice(&left.to_ne_bytes());
                let part = &block[..usize::try_from(left).unwrap_or(usize::MAX).min(block.len())];
                hash.update(part);
                from.write_all(part).with_context(|| format!("sending, {left} bytes left"))?;
                left -= part.len() as u64;
            }
            from.shutdown(Shutdown::Write)?;
            anyhow::Ok(hash.finalize())
        });
        let mut hash = blake3::Hasher::new();
        let (mut buffer, mut seen) = (vec![0; 1 << 20], 0);
        loop {
            let len = to.read(&mut buffer).with_context(|| format!("receiving, after {seen} bytes"))?;
            if len == 0 {
                break;
            }
            hash.update(&buffer[..len]);
            seen += len as u64;
        }
        let sent = sending.join().map_err(|_| anyhow!("panicked"))??;
        ensure!(seen == bytes && hash.finalize() == sent, "{seen} bytes of {bytes}, or not the same");
        Ok(())
    })
}
