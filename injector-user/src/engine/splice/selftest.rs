//! Runs the splice engine's real mechanism over temporary sockets on loopback. A kernel's version
//! does not prove that it can splice; only a test does.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};

use super::{Splice, verdict::EnrolledFlow};
use crate::{
    engine::check::Check,
    net::{
        hangup::HangupMonitor,
        options,
        socket::{Endpoint, Interest},
    },
};

/// The longest that one check may take.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest that the check with a slow reader may take.
const SLOW_READER_TIMEOUT: Duration = Duration::from_secs(4);
/// The longest that all checks may take: the daemon serves no client before their end.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(6);

/// Runs all checks. The engine may be used if all passed.
pub async fn run(splice: &Arc<Splice>) -> Vec<Check> {
    let deadline = Instant::now() + TOTAL_TIMEOUT;
    let mut checks = Vec::new();
    checks.push(check("header_alone", CHECK_TIMEOUT, deadline, header_alone(splice)).await);
    checks.push(check("header_before_payload", CHECK_TIMEOUT, deadline, header_before_payload(splice)).await);
    checks.push(check("fail_closed", CHECK_TIMEOUT, deadline, fail_closed(splice)).await);
    checks.push(check("carry", CHECK_TIMEOUT, deadline, forward(splice)).await);
    checks.push(check("slow_reader", SLOW_READER_TIMEOUT, deadline, slow_reader(splice)).await);
    checks.push(check("leaves_nothing", CHECK_TIMEOUT, deadline, leaves_no_entries(splice)).await);
    checks
}

/// Runs one check, at most until its own limit or the common deadline.
async fn check(
    name: &'static str,
    limit: Duration,
    deadline: Instant,
    test: impl Future<Output = io::Result<String>>,
) -> Check {
    let start = Instant::now();
    let limit = limit.min(deadline.saturating_duration_since(start));
    let result = match timeout(limit, test).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err(format!("not finished within {limit:?}")),
    };
    Check { name, result, took: start.elapsed() }
}

/// The shortest header is sent with a doorbell, and the doorbell itself is not sent.
async fn header_alone(splice: &Arc<Splice>) -> io::Result<String> {
    let (backend, mut peer) = pair(splice).await?;
    let header = pattern(28);
    splice.inject(&backend, &header, &[]).map_err(io::Error::other)?;
    let _ = backend.try_write(b"220")?;
    expect(&mut peer, &[&header, b"220"]).await?;
    Ok("28 bytes sent by the doorbell byte, which the program removed".to_owned())
}

/// The longest header that every receiver accepts is sent ahead of the client's payload.
async fn header_before_payload(splice: &Arc<Splice>) -> io::Result<String> {
    let (backend, mut peer) = pair(splice).await?;
    let (header, payload) = (pattern(232), b"\x16\x03\x01 hello");
    let sent = splice.inject(&backend, &header, payload).map_err(io::Error::other)?;
    if sent != payload.len() {
        return Err(io::Error::other(format!(
            "only {sent} of {} payload bytes were sent with the header",
            payload.len()
        )));
    }
    expect(&mut peer, &[&header, payload]).await?;
    Ok("232 bytes sent ahead of the payload".to_owned())
}

/// Without a header nothing is sent.
async fn fail_closed(splice: &Arc<Splice>) -> io::Result<String> {
    let (backend, mut peer) = pair(splice).await?;
    splice.maps.watch_first_message(backend.cookie(), &backend).map_err(io::Error::other)?;
    let sent = backend.try_write(b"payload");
    splice.maps.unwatch_first_message(backend.cookie()).map_err(io::Error::other)?;
    match sent {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {}
        other => return Err(io::Error::other(format!("sending without a header returned {other:?}"))),
    }
    drop(backend);
    let mut seen = Vec::new();
    peer.read_to_end(&mut seen).await?;
    if seen.is_empty() {
        Ok("a socket without a header sends nothing".to_owned())
    } else {
        Err(io::Error::other(format!("the peer read {} bytes that had no header", seen.len())))
    }
}

/// Both directions through the kernel, with bytes that arrived before the enrolment and a proven
/// delivery.
async fn forward(splice: &Arc<Splice>) -> io::Result<String> {
    const EARLY: usize = 3000;
    const LATE: usize = 200_000;
    let monitor = HangupMonitor::start()?;
    let (mut client, mut client_peer) = pair(splice).await?;
    let (mut backend, mut backend_peer) = pair(splice).await?;
    let payload = pattern(EARLY + LATE);
    let (early, late) = payload.split_at(EARLY);

    client_peer.write_all(early).await?;
    backend_peer.write_all(early).await?;
    let to_backend = EnrolledFlow::enrol(splice, &client, &backend, 0).map_err(io::Error::other)?;
    let to_client = EnrolledFlow::enrol(splice, &backend, &client, 0).map_err(io::Error::other)?;
    for endpoint in [&mut client, &mut backend] {
        endpoint.set_interest(Interest { read: false, write: false }, &monitor)?;
    }
    tokio::try_join!(
        exchange(&mut client_peer, late, &payload),
        exchange(&mut backend_peer, late, &payload),
        finish(&to_backend, &client, &backend),
        finish(&to_client, &backend, &client),
    )?;
    Ok(format!("{} bytes each way, in order and to the end", payload.len()))
}

/// Megabytes for a reader that stalls at first and then reads in small, odd pieces. With small
/// buffers the target's queue is often full in the middle of a segment: some kernels then repeat or
/// lose a part of it (fixed in Linux 6.1.147, 6.12.35 and 6.16).
async fn slow_reader(splice: &Arc<Splice>) -> io::Result<String> {
    // Sixteen times the size of the buffers.
    const SIZE: usize = 2 << 20;
    const STALL: Duration = Duration::from_millis(50);
    let monitor = HangupMonitor::start()?;
    let (mut source, mut sender) = pair(splice).await?;
    let (mut target, mut reader) = pair_with_small_buffers().await?;
    let spliced = EnrolledFlow::enrol(splice, &source, &target, 0).map_err(io::Error::other)?;
    // Credit for the whole payload, because no session checks the backlog here.
    spliced.grant(&source, &target, SIZE as u64)?;
    for endpoint in [&mut source, &mut target] {
        endpoint.set_interest(Interest { read: false, write: false }, &monitor)?;
    }
    let payload = unrepeated(SIZE);
    let send = async {
        sender.write_all(&payload).await?;
        sender.shutdown().await
    };
    let read = async {
        tokio::time::sleep(STALL).await;
        read_in_pieces(&mut reader, &payload).await
    };
    let ((), pieces, ()) = tokio::try_join!(send, read, finish(&spliced, &source, &target))?;
    Ok(format!("{SIZE} bytes for a reader that stalled, then took {pieces} pieces"))
}

/// Reads a whole stream and compares it piece by piece; returns the number of pieces.
async fn read_in_pieces(reader: &mut TcpStream, whole: &[u8]) -> io::Result<usize> {
    const PIECES: [usize; 6] = [1, 61, 1021, 4093, 8191, 16_381];
    let mut buffer = [0; 16_381];
    let (mut at, mut pieces) = (0, 0);
    for max in PIECES.into_iter().cycle() {
        let count = reader.read(buffer.get_mut(..max).unwrap_or_default()).await?;
        if count == 0 {
            break;
        }
        if whole.get(at..at + count) != buffer.get(..count) {
            return Err(io::Error::other(format!(
                "the received bytes differ from those sent, from about byte {at} on"
            )));
        }
        (at, pieces) = (at + count, pieces + 1);
    }
    if at == whole.len() {
        return Ok(pieces);
    }
    Err(io::Error::other(format!("{at} of {} bytes arrived before the end", whole.len())))
}

/// Sends the rest and a FIN, and expects the whole payload and the FIN of the other side.
async fn exchange(peer: &mut TcpStream, rest: &[u8], whole: &[u8]) -> io::Result<()> {
    let (mut read, mut write) = peer.split();
    let send = async {
        write.write_all(rest).await?;
        write.shutdown().await
    };
    let mut seen = Vec::new();
    tokio::try_join!(send, read.read_to_end(&mut seen))?;
    if seen == whole {
        return Ok(());
    }
    let first = seen.iter().zip(whole).take_while(|(seen, sent)| seen == sent).count();
    let (got, sent) = (seen.len(), whole.len());
    Err(io::Error::other(format!("{got} of {sent} bytes arrived; they differ from byte {first} on")))
}

async fn finish(spliced: &EnrolledFlow, source: &Endpoint, target: &Endpoint) -> io::Result<()> {
    source.finished().await;
    while !spliced.delivered(source, target, 0)? {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    target.finish()
}

async fn leaves_no_entries(splice: &Arc<Splice>) -> io::Result<String> {
    match splice.entries().map_err(io::Error::other)? {
        0 => Ok("no entry is left in any map".to_owned()),
        entries => Err(io::Error::other(format!("{entries} entries are left in the maps"))),
    }
}

async fn pair(splice: &Arc<Splice>) -> io::Result<(Endpoint, TcpStream)> {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    let endpoint = Endpoint::connect(listener.local_addr()?, &|socket| {
        crate::engine::Engine::observe_syn(splice, socket)
    })
    .await?;
    // The handshake is completed here, because no header follows that would complete it.
    endpoint.ack_now()?;
    Ok((endpoint, listener.accept().await?.0))
}

/// A pair with a small send buffer here and a small receive buffer at the peer.
async fn pair_with_small_buffers() -> io::Result<(Endpoint, TcpStream)> {
    // With much smaller buffers, senders on loopback wait for the timers of silly window avoidance.
    const BUFFER: usize = 64 << 10;
    /// As on Ethernet; on loopback one segment would fill a buffer.
    const SEGMENT: u32 = 1448;
    let socket = || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP));
    let listener = socket()?;
    listener.set_recv_buffer_size(BUFFER)?;
    listener.set_nonblocking(true)?;
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    listener.listen(1)?;
    let endpoint = socket()?;
    endpoint.set_send_buffer_size(BUFFER)?;
    endpoint.set_tcp_mss(SEGMENT)?;
    // On loopback this does not wait, because the accept queue has room.
    endpoint.connect(&listener.local_addr()?)?;
    options::configure(&endpoint)?;
    endpoint.set_nonblocking(true)?;
    let endpoint = Endpoint::accepted(endpoint)?;
    Ok((endpoint, TcpListener::from_std(listener.into())?.accept().await?.0))
}

async fn expect(peer: &mut TcpStream, parts: &[&[u8]]) -> io::Result<()> {
    let whole = parts.concat();
    let mut seen = vec![0; whole.len()];
    peer.read_exact(&mut seen).await?;
    if seen == whole { Ok(()) } else { Err(io::Error::other("the peer received other bytes than were sent")) }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..251).cycle().take(len).collect()
}

/// Bytes without repetitions, so that a part of any length that is lost, repeated or moved is
/// detected.
fn unrepeated(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for (number, word) in (0_u32..).zip(bytes.chunks_mut(4)) {
        // Multiplication by an odd number maps every number to a different word.
        let all = number.wrapping_mul(0x9E37_79B1).to_le_bytes();
        word.copy_from_slice(all.get(..word.len()).unwrap_or_default());
    }
    bytes
}
