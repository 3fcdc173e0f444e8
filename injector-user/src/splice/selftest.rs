//! Drives the splice engine's real mechanism over throw-away sockets on loopback. Kernel versions promise nothing:
//! what works is what was seen to work.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};

use super::{Splice, verdict::Spliced};
use crate::{
    endpoint::{Endpoint, Needs},
    selftest::Check,
    watch::Watch,
};

/// The most one check may take.
const PATIENCE: Duration = Duration::from_millis(400);

/// Runs all checks. The engine may be used if all passed.
pub async fn run(splice: &Arc<Splice>) -> Vec<Check> {
    let mut checks = Vec::new();
    checks.push(check("header_alone", header_alone(splice)).await);
    checks.push(check("header_before_payload", header_before_payload(splice)).await);
    checks.push(check("fail_closed", fail_closed(splice)).await);
    checks.push(check("carry", carry(splice)).await);
    checks.push(check("leaves_nothing", leaves_nothing(splice)).await);
    checks
}

async fn check(name: &'static str, test: impl Future<Output = io::Result<String>>) -> Check {
    let start = Instant::now();
    let result = match timeout(PATIENCE, test).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err(format!("nothing happened within {PATIENCE:?}")),
    };
    Check { name, result, took: start.elapsed() }
}

/// The shortest header leaves by the doorbell, and the doorbell does not.
async fn header_alone(splice: &Arc<Splice>) -> io::Result<String> {
    let (backend, mut peer) = pair(&Watch::start()?).await?;
    let header = pattern(28);
    splice.inject(&backend, &header, &[]).map_err(io::Error::other)?;
    let _ = backend.try_write(b"220")?;
    expect(&mut peer, &[&header, b"220"]).await?;
    Ok("28 bytes sent by a doorbell that was taken out again".to_owned())
}

/// The longest header that is safe everywhere goes in front of what the client says.
async fn header_before_payload(splice: &Arc<Splice>) -> io::Result<String> {
    let (backend, mut peer) = pair(&Watch::start()?).await?;
    let (header, payload) = (pattern(232), b"\x16\x03\x01 hello");
    let sent = splice.inject(&backend, &header, payload).map_err(io::Error::other)?;
    if sent != payload.len() {
        return Err(io::Error::other(format!("{sent} of {} bytes of payload went along", payload.len())));
    }
    expect(&mut peer, &[&header, payload]).await?;
    Ok("232 bytes in front of a payload".to_owned())
}

/// Without a header nothing leaves.
async fn fail_closed(splice: &Arc<Splice>) -> io::Result<String> {
    let (backend, mut peer) = pair(&Watch::start()?).await?;
    splice.maps.watch_first_message(backend.cookie(), &backend).map_err(io::Error::other)?;
    let sent = backend.try_write(b"payload");
    splice.maps.unwatch_first_message(backend.cookie()).map_err(io::Error::other)?;
    match sent {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {}
        other => return Err(io::Error::other(format!("sending without a header gave {other:?}"))),
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

/// Both directions through the kernel, with bytes that arrived before, and an end that is proven.
async fn carry(splice: &Arc<Splice>) -> io::Result<String> {
    const EARLY: usize = 3000;
    const LATE: usize = 200_000;
    let watch = Watch::start()?;
    let (mut client, mut client_peer) = pair(&watch).await?;
    let (mut backend, mut backend_peer) = pair(&watch).await?;
    let payload = pattern(EARLY + LATE);
    let (early, late) = payload.split_at(EARLY);

    client_peer.write_all(early).await?;
    backend_peer.write_all(early).await?;
    let to_backend = Spliced::enrol(splice, &client, &backend).map_err(io::Error::other)?;
    let to_client = Spliced::enrol(splice, &backend, &client).map_err(io::Error::other)?;
    for endpoint in [&mut client, &mut backend] {
        endpoint.arm(Needs { read: false, write: false })?;
    }
    tokio::try_join!(
        speak(&mut client_peer, late, &payload),
        speak(&mut backend_peer, late, &payload),
        finish(&to_backend, &client, &backend),
        finish(&to_client, &backend, &client),
    )?;
    Ok(format!("{} bytes each way, in order and to the end", payload.len()))
}

/// Sends the rest and a FIN, and expects the other side's whole payload and FIN.
async fn speak(peer: &mut TcpStream, rest: &[u8], whole: &[u8]) -> io::Result<()> {
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
    Err(io::Error::other(format!("{got} of {sent} bytes arrived, different from byte {first} on")))
}

async fn finish(spliced: &Spliced, source: &Endpoint, target: &Endpoint) -> io::Result<()> {
    source.finished().await;
    while !spliced.delivered(source, target, 0)? {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    target.finish()
}

async fn leaves_nothing(splice: &Arc<Splice>) -> io::Result<String> {
    match splice.entries().map_err(io::Error::other)? {
        0 => Ok("no entry is left in any map".to_owned()),
        entries => Err(io::Error::other(format!("{entries} entries are left in the maps"))),
    }
}

async fn pair(watch: &Watch) -> io::Result<(Endpoint, TcpStream)> {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    let ours = Endpoint::connect(listener.local_addr()?, watch).await?;
    Ok((ours, listener.accept().await?.0))
}

async fn expect(peer: &mut TcpStream, parts: &[&[u8]]) -> io::Result<()> {
    let whole = parts.concat();
    let mut seen = vec![0; whole.len()];
    peer.read_exact(&mut seen).await?;
    if seen == whole { Ok(()) } else { Err(io::Error::other("the peer read other bytes than were sent")) }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..251).cycle().take(len).collect()
}
