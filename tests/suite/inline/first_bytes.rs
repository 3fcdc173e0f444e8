//! If the client speaks first, the header waits for its first bytes and precedes them: in the same
//! packet, or in one before.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use injector_testbed::daemon::BPF_EVENTS;
use injector_testbed::netns::Family;
use socket2::SockRef;

use crate::losses;
use crate::tcp::{self, WRAPPING_ISNS, forget_path_mtu, narrow_link};
use crate::testbed::{Testbed, accept, expect, own_header};
use crate::wire::{Direction, Fate, Side};
use crate::wire_testbed::{self, FirstSpeaker, SysctlGuard, WireTestbed, through};
use crate::{Run, WireRun};

pub(crate) const TRIALS: &[(&str, WireRun)] = &[
    ("one packet with the header", one_packet),
    ("a silent client", silent),
    ("a full packet, header sent ahead", full_packet),
    ("urgent data", urgent),
    ("lost once, with the header", |testbed, family| lost(testbed, family, 1)),
    ("lost twice, with the header", |testbed, family| lost(testbed, family, 2)),
    ("lost, with the header that was sent ahead", ahead_lost),
    ("lost, SYN cookies", |testbed, family| {
        let _always = SysctlGuard::new(testbed.backend_side(), "net/ipv4/tcp_syncookies", "2")?;
        lost(testbed, family, 1)
    }),
    ("the second packet first", second_first),
    ("SYN-ACK lost behind the edge", |testbed, family| {
        losses::lost(testbed, family, FirstSpeaker::ClientByProtocol, 1, 1500, |seen| {
            seen.is_syn_ack() && seen.side == Side::Client
        })
    }),
    ("their acknowledgement lost", |testbed, family| {
        losses::lost(testbed, family, FirstSpeaker::ClientByProtocol, 1, 1500, |seen| {
            seen.at(Side::Backend, Direction::ToClient) && !seen.is_syn_ack()
        })
    }),
    ("with the client's FIN", with_fin),
    ("a FIN instead", fin_alone),
    ("a reset instead", reset_alone),
    ("too long for the path with the header", path_mtu),
    ("sequence numbers wrap around", |testbed, family| {
        WRAPPING_ISNS.into_iter().try_for_each(|number| {
            tcp::transfer_from_isn(testbed, family, FirstSpeaker::ClientByProtocol, number)
        })
    }),
];

/// On veth, which forwards unfinished checksums and large segments.
pub(crate) const ON_DEVICES: &[(&str, Run)] = &[
    ("first bytes/few", |testbed, family| on_devices(testbed, family, 300)),
    ("first bytes/many at once", |testbed, family| on_devices(testbed, family, 1 << 20)),
];

const BYTES: usize = 256 << 10;

/// How often `backend_out` has added a header in each way, since the last check.
struct HeaderCounts<'a> {
    testbed: &'a WireTestbed,
    before: [u64; 4],
}

impl<'a> HeaderCounts<'a> {
    const EVENTS: [&'static str; 4] = ["deferred", "prepended", "sent_ahead", "appended"];

    fn counted(testbed: &WireTestbed) -> anyhow::Result<[u64; 4]> {
        let mut counts = [0; 4];
        for (count, event) in counts.iter_mut().zip(Self::EVENTS) {
            *count = testbed.counted(event)?;
        }
        Ok(counts)
    }

    fn begin(testbed: &'a WireTestbed) -> anyhow::Result<Self> {
        Ok(Self { testbed, before: Self::counted(testbed)? })
    }

    /// Checks that exactly these were added.
    fn check(&self, expected: [u64; 4]) -> anyhow::Result<()> {
        let now = Self::counted(self.testbed)?;
        let grown: Vec<_> = now.iter().zip(self.before).map(|(now, before)| now - before).collect();
        ensure!(grown == expected, "{:?} have grown by {grown:?}, not {expected:?}", Self::EVENTS);
        Ok(())
    }
}

/// The backend gets header and first bytes in one packet, and no packet before; it sends no
/// acknowledgement for the header alone.
fn one_packet(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let counts = HeaderCounts::begin(testbed)?;
    let packets = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&packets);
    let _faulty = testbed.wire.faults(move |packet| {
        if packet.side == Side::Backend && !packet.is_syn() && !packet.is_syn_ack() {
            let what = (packet.direction, packet.tcp.payload().to_vec());
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(what);
        }
        Fate::Pass
    });
    let connection = testbed.connection(family, FirstSpeaker::ClientByProtocol)?;
    connection.finish(BYTES)?;
    counts.check([1, 1, 0, 0])?;
    let packets = packets.lock().unwrap_or_else(PoisonError::into_inner);
    let (direction, payload) = packets.first().context("no packets")?;
    ensure!(*direction == Direction::ToBackend, "the backend spoke first");
    ensure!(payload.starts_with(b"\r\n\r\n\0\r\nQUIT\n"), "no header first, but {payload:02x?}");
    ensure!(
        payload.ends_with(b"the first words"),
        "the first bytes are not behind the header: {payload:02x?}"
    );
    Ok(())
}

/// The backend retransmits its SYN-ACK after a second: then the header is sent, and the backend
/// knows its client.
fn silent(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let counts = HeaderCounts::begin(testbed)?;
    let listener = testbed.backend(family)?;
    let start = Instant::now();
    let mut client = testbed.tls_client(family)?;
    let mut server = accept(&listener)?;
    own_header(&mut server, &client)?;
    let took = start.elapsed();
    eprintln!("    the header came after {took:.2?}");
    ensure!((900..1900).contains(&took.as_millis()), "the header came after {took:?}");
    client.write_all(b"at last")?;
    expect(&mut server, b"at last")?;
    counts.check([1, 0, 0, 1])?;
    through(&client, &server, BYTES, 0)?;
    through(&server, &client, BYTES, 0)
}

/// Bytes that fill a packet, as a ClientHello with post-quantum keys does: no packet has space for
/// the header as well. The backend does not have to request it.
fn full_packet(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let counts = HeaderCounts::begin(testbed)?;
    let answered = testbed.counted("header_retransmitted")?;
    let listener = testbed.backend(family)?;
    let client = testbed.tls_client(family)?;
    let start = Instant::now();
    std::thread::scope(|scope| {
        let up = scope.spawn(|| {
            let mut server = accept(&listener)?;
            own_header(&mut server, &client)?;
            anyhow::Ok((server, start.elapsed()))
        });
        let sent: Vec<u8> = (0_u8..251).cycle().take(BYTES).collect();
        (&client).write_all(&sent)?;
        let (mut server, took) = up.join().map_err(|_| anyhow!("panicked"))??;
        ensure!(took < Duration::from_millis(150), "the header came after {took:?}");
        client.shutdown(Shutdown::Write)?;
        let mut seen = Vec::new();
        server.read_to_end(&mut seen)?;
        ensure!(seen == sent, "{} bytes have come of {BYTES}, or not the same", seen.len());
        through(&server, &client, BYTES, 0)
    })?;
    counts.check([1, 0, 1, 0])?;
    ensure!(testbed.counted("header_retransmitted")? == answered, "the backend had to ask for the header");
    Ok(())
}

/// The urgent pointer is relative to the start of its segment, which the header must not shift.
fn urgent(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let counts = HeaderCounts::begin(testbed)?;
    let listener = testbed.backend(family)?;
    SockRef::from(&listener).set_out_of_band_inline(true)?;
    let pointers = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&pointers);
    let _faulty = testbed.wire.faults(move |packet| {
        if packet.at(Side::Backend, Direction::ToBackend) && packet.is_data() {
            let what = (packet.is_header(), packet.tcp.urg().then(|| packet.tcp.urgent_pointer()));
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(what);
        }
        Fate::Pass
    });
    let client = testbed.tls_client(family)?;
    SockRef::from(&client).send_out_of_band(b"abc")?;
    let mut server = accept(&listener)?;
    own_header(&mut server, &client)?;
    expect(&mut server, b"abc")?;
    counts.check([1, 0, 1, 0])?;
    let pointers = pointers.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(*pointers == [(true, None), (false, Some(3))], "header or not, and urgent pointer: {pointers:?}");
    Ok(())
}

/// Wherever the packet is lost, the client's retransmission timer sends both: the bytes in a packet
/// of their own, because the longer one may have been too long.
fn lost(testbed: &WireTestbed, family: Family, times: u32) -> anyhow::Result<()> {
    let counts = HeaderCounts::begin(testbed)?;
    let mut headers = 0;
    let _faulty = testbed.wire.faults(move |seen| {
        if !seen.at(Side::Backend, Direction::ToBackend) || !seen.is_data() {
            return Fate::Pass;
        }
        headers += u32::from(seen.is_header());
        // What follows the header is lost with it.
        if headers <= times { Fate::Drop } else { Fate::Pass }
    });
    let connection = testbed.connection(family, FirstSpeaker::ClientByProtocol)?;
    connection.finish(BYTES)?;
    let took = connection.took;
    eprintln!("    first byte after {:.1} ms", took.as_secs_f64() * 1e3);
    ensure!(took < Duration::from_millis(1000 * u64::from(times)), "the first byte came after {took:?}");
    counts.check([1, 1, u64::from(times), 0])
}

/// The bytes are retransmitted, and arrive without the header that was sent ahead: the backend has
/// to request it.
fn ahead_lost(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let answered = testbed.counted("header_retransmitted")?;
    let mut headers = 0;
    let _faulty = testbed.wire.faults(move |seen| {
        headers += u32::from(seen.is_header());
        if seen.is_header() && headers <= 2 { Fate::Drop } else { Fate::Pass }
    });
    let connection = testbed.connection(family, FirstSpeaker::ClientByProtocol)?;
    connection.finish(BYTES)?;
    ensure!(testbed.counted("header_retransmitted")? > answered, "the backend did not ask");
    Ok(())
}

/// The bytes after the first ones overtake them.
fn second_first(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let late = AtomicBool::new(false);
    let _faulty = testbed.wire.faults(move |seen| {
        let first = seen.at(Side::Client, Direction::ToBackend) && seen.is_data();
        if first && !late.swap(true, Ordering::Relaxed) {
            return Fate::Late(Duration::from_millis(30));
        }
        Fate::Pass
    });
    let listener = testbed.backend(family)?;
    let client = testbed.tls_client(family)?;
    client.set_nodelay(true)?;
    (&client).write_all(b"first")?;
    (&client).write_all(b"second")?;
    let mut server = accept(&listener)?;
    own_header(&mut server, &client)?;
    expect(&mut server, b"firstsecond")?;
    through(&client, &server, BYTES, 0)?;
    through(&server, &client, BYTES, 0)
}

/// First bytes and FIN in one segment reach the backend in one segment.
fn with_fin(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let listener = testbed.backend(family)?;
    let client = testbed.tls_client(family)?;
    SockRef::from(&client).set_tcp_cork(true)?;
    (&client).write_all(b"all")?;
    client.shutdown(Shutdown::Write)?;
    let mut server = accept(&listener)?;
    own_header(&mut server, &client)?;
    let mut seen = Vec::new();
    server.read_to_end(&mut seen)?;
    ensure!(seen == b"all", "{seen:02x?}");
    through(&server, &client, BYTES, 0)?;
    let session = testbed.session(client.local_addr()?, wire_testbed::tls(family))?;
    ensure!(session.field("reason").as_deref() == Some("client_closed"), "{session:?}");
    Ok(())
}

/// The client closes without sending: the backend sees it, after the header.
fn fin_alone(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let listener = testbed.backend(family)?;
    let client = testbed.tls_client(family)?;
    client.shutdown(Shutdown::Write)?;
    let mut server = accept(&listener)?;
    own_header(&mut server, &client)?;
    ensure!(server.read(&mut [0; 8])? == 0, "bytes in place of an end");
    drop(server);
    ensure!((&client).read(&mut [0; 8])? == 0, "bytes in place of an end");
    testbed.session(client.local_addr()?, wire_testbed::tls(family))?;
    Ok(())
}

/// The backend has no connection yet, and never gets one: the half-open connection is reset.
fn reset_alone(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let counts = HeaderCounts::begin(testbed)?;
    let listener = testbed.backend(family)?;
    let resets = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&resets);
    let _faulty = testbed.wire.faults(move |seen| {
        count.fetch_add(
            u32::from(seen.at(Side::Backend, Direction::ToBackend) && seen.tcp.rst()),
            Ordering::Relaxed,
        );
        Fate::Pass
    });
    let client = testbed.tls_client(family)?;
    SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
    drop(client);
    std::thread::sleep(Duration::from_millis(1500));
    ensure!(resets.load(Ordering::Relaxed) == 1, "the backend was not reset");
    listener.set_nonblocking(true)?;
    ensure!(listener.accept().is_err(), "the backend has a connection");
    counts.check([1, 0, 0, 0])
}

/// Header and first bytes together are too long for a narrow link behind the edge, the bytes alone
/// are not. The client is notified to send less, which it already does: it must not be notified
/// endlessly. IPv6 has no link so narrow.
fn path_mtu(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    let (mtu, headers) = if family == Family::V4 { (1000, 20 + 32) } else { (1280, 40 + 32) };
    let layer = testbed.layer;
    let answers = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&answers);
    let _faulty = testbed.wire.faults(move |seen| narrow_link(seen, layer, mtu, &count));
    let listener = testbed.backend(family)?;
    let client = testbed.tls_client(family)?;
    let hello: Vec<u8> = (0_u8..251).cycle().take(usize::from(mtu) - headers - 4).collect();
    let start = Instant::now();
    (&client).write_all(&hello)?;
    let mut server = accept(&listener)?;
    own_header(&mut server, &client)?;
    expect(&mut server, &hello)?;
    let (took, answers) = (start.elapsed(), answers.load(Ordering::Relaxed));
    eprintln!("    after {took:.0?}, {answers} packets were too big");
    ensure!(answers == u32::from(family == Family::V4), "{answers} packets were too big");
    ensure!(took < Duration::from_secs(1), "it took {took:?}");
    forget_path_mtu(testbed)
}

/// Whatever the client's first write is, it arrives complete and after the header.
fn on_devices(testbed: &Testbed, family: Family, bytes: usize) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let injector = testbed.injector("imaps", "")?;
    for _ in 0..20 {
        let client: TcpStream = testbed.client(family)?;
        let sent: Vec<u8> = (0_u8..251).cycle().take(bytes).collect();
        std::thread::scope(|scope| {
            let sending = scope.spawn(|| (&client).write_all(&sent));
            let mut server = accept(&backend)?;
            own_header(&mut server, &client)?;
            expect(&mut server, &sent)?;
            sending.join().map_err(|_| anyhow!("panicked"))?.context("sending")?;
            through(&server, &client, 10_000, 0)
        })?;
    }
    let metrics = injector.metrics()?;
    let counted = |event| metrics.sum(BPF_EVENTS, &[("event", event)]);
    let together = counted("prepended") + counted("sent_ahead");
    ensure!(together == 20.0, "{together} of 20 headers went with the first bytes");
    ensure!(counted("append_failed") == 0.0, "headers could not be added");
    Ok(())
}
