//! Sequence numbers that wrap around.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::Instant;

use anyhow::{Context as _, anyhow, ensure};
use injector_testbed::netns::Family;
use socket2::Socket;

use crate::losses::Random;
use crate::testbed::{Testbed, accept, own_header};
use crate::wire::{Fate, Side};
use crate::wire_testbed::{FirstSpeaker, WireTestbed};

/// Initial sequence numbers with which the header, or the client's first bytes, cross 2^32; or
/// 2^31, where comparisons change sign.
pub(crate) const WRAPPING_ISNS: [u32; 9] = [
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

pub(super) fn wrap(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    for (number, first) in
        WRAPPING_ISNS.into_iter().zip([FirstSpeaker::Server, FirstSpeaker::Client].into_iter().cycle())
    {
        transfer_from_isn(testbed, family, first, number)?;
    }
    Ok(())
}

pub(super) fn wrap_with_loss(testbed: &WireTestbed, family: Family) -> anyhow::Result<()> {
    for number in WRAPPING_ISNS {
        let (mut random, mut headers) = (Random(9), 0);
        let _faulty = testbed.wire.faults(move |seen| {
            headers += u32::from(seen.is_header());
            let header = seen.is_header() && headers == 1;
            let data =
                seen.is_data() && !seen.is_header() && seen.side == Side::Backend && random.below(60) == 0;
            if header || data { Fate::Drop } else { Fate::Pass }
        });
        transfer_from_isn(testbed, family, FirstSpeaker::Client, number)?;
    }
    Ok(())
}

pub(crate) fn transfer_from_isn(
    testbed: &WireTestbed,
    family: Family,
    first: FirstSpeaker,
    number: u32,
) -> anyhow::Result<()> {
    let name = || format!("initial sequence number {number}");
    let connection =
        testbed.connection_by(family, first, |socket| set_isn(socket, number)).with_context(name)?;
    connection.finish(100_000).with_context(name)
}

/// Makes a socket connect with this initial sequence number: a queue that already has a number
/// keeps it (tcp_v4_connect in net/ipv4/tcp_ipv4.c). Only a socket in repair mode can be given one
/// (not in tcp(7); kernel commit ee9952831cfd).
fn set_isn(socket: &Socket, number: u32) -> io::Result<()> {
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

/// More than 2^32 bytes in each direction of one connection, on devices with all offloads; hashed
/// on both sides.
pub(crate) fn five_gibibytes(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    const BYTES: u64 = (5 << 30) + 12_345;
    let backend: TcpListener = testbed.backend(family)?;
    let _injector = testbed.injector("smtp", "")?;
    let client = testbed.client(family)?;
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
                // No two blocks are equal.
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
