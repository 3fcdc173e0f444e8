//! Plain sockets of a test, with time limits.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use injector_common::proxy::{ParseError, Parsed, parse};

/// Longer waits mean that something hangs: long enough for a machine that is busy with other things,
/// since a wait ends with what it waits for.
pub const LIMIT: Duration = Duration::from_secs(30);

/// At once: no timer has expired. The shortest one that matters is TCP's first retransmission of a SYN,
/// after a second.
pub const AT_ONCE: Duration = Duration::from_millis(900);

/// Sets the time limit of reads and writes to [`LIMIT`], and disables Nagle's algorithm.
///
/// # Errors
/// As setsockopt(2).
pub fn patient(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    stream.set_nodelay(true)
}

/// Accepts one connection, within [`LIMIT`].
///
/// # Errors
/// As accept(2), and when no connection arrives.
pub fn accept(listener: &TcpListener) -> anyhow::Result<TcpStream> {
    accept_within(listener, LIMIT)
}

/// The same within another limit.
///
/// # Errors
/// As [`accept`].
pub fn accept_within(listener: &TcpListener, limit: Duration) -> anyhow::Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + limit;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                patient(&stream)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ensure!(Instant::now() < deadline, "no connection reached the backend");
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => bail!("accepting at the backend: {error}"),
        }
    }
}

/// The number of segments received on this connection (`tcpi_segs_in`, struct tcp_info,
/// include/uapi/linux/tcp.h).
///
/// # Errors
/// As getsockopt(2), and when the kernel lacks the field.
pub fn segments_received(stream: &TcpStream) -> anyhow::Result<u32> {
    const SEGS_IN: usize = 140;
    let mut raw = [0_u8; SEGS_IN + 4];
    let mut len = libc::socklen_t::try_from(raw.len())?;
    let (socket, place) = (stream.as_raw_fd(), raw.as_mut_ptr().cast());
    // SAFETY: `raw` is writable for `len` bytes, and the kernel writes at most that many.
    let got = unsafe { libc::getsockopt(socket, libc::IPPROTO_TCP, libc::TCP_INFO, place, &raw mut len) };
    ensure!(got == 0, "TCP_INFO: {}", io::Error::last_os_error());
    ensure!(usize::try_from(len)? == raw.len(), "TCP_INFO has {len} bytes");
    Ok(u32::from_ne_bytes(*raw.last_chunk().context("the kernel lacks tcpi_segs_in")?))
}

/// Reads exactly the expected bytes.
///
/// # Errors
/// As read(2), and when other bytes arrive.
pub fn expect(stream: &mut TcpStream, bytes: &[u8]) -> anyhow::Result<()> {
    let mut seen = vec![0; bytes.len()];
    stream
        .read_exact(&mut seen)
        .with_context(|| format!("waiting for {:?}", String::from_utf8_lossy(bytes)))?;
    ensure!(
        seen == bytes,
        "{:?} where {:?} was expected",
        String::from_utf8_lossy(&seen),
        String::from_utf8_lossy(bytes)
    );
    Ok(())
}

/// Sends bytes and expects them on the other side.
///
/// # Errors
/// As write(2), and as [`expect`].
pub fn pass(from: &mut TcpStream, to: &mut TcpStream, bytes: &[u8]) -> anyhow::Result<()> {
    from.write_all(bytes)?;
    expect(to, bytes)
}

/// Accepts one connection and reads its header, which must arrive complete in the first read;
/// returns the bytes after it.
///
/// # Errors
/// As [`accept`], and when there is no complete header.
pub fn accept_with_header(listener: &TcpListener) -> anyhow::Result<(TcpStream, Header, Vec<u8>)> {
    let mut stream = accept(listener)?;
    let mut first = vec![0; 16384];
    let count = stream.read(&mut first).context("reading the header")?;
    first.truncate(count);
    let header = match parse(&first) {
        Ok(parsed) => Header::of(&first, &parsed),
        Err(ParseError::Incomplete { needed }) => {
            bail!("{count} bytes in the first read, the header has {needed}")
        }
        Err(error) => bail!("no header but {first:02x?}: {error}"),
    };
    let rest = first.split_off(header.bytes.len());
    Ok((stream, header, rest))
}

/// The first bytes that a backend read.
#[derive(Debug)]
pub struct Header {
    /// All bytes of the header.
    pub bytes: Vec<u8>,
    /// The client that the header names.
    pub source: SocketAddr,
    /// The client's destination that the header names.
    pub destination: SocketAddr,
}

impl Header {
    fn of(first: &[u8], parsed: &Parsed<'_>) -> Self {
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let (source, destination) = parsed
            .command
            .addresses()
            .map_or((nowhere, nowhere), |addresses| (addresses.source(), addresses.destination()));
        Self { bytes: first.get(..parsed.len).unwrap_or_default().to_vec(), source, destination }
    }
}

/// How the other side ended a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// A FIN, after these bytes.
    Fin(Vec<u8>),
    /// A reset, after these bytes.
    Reset(Vec<u8>),
}

/// Reads until the connection ends.
///
/// # Errors
/// As read(2), except for a reset.
pub fn ending(stream: &mut TcpStream) -> anyhow::Result<Ending> {
    let mut seen = Vec::new();
    match stream.read_to_end(&mut seen) {
        Ok(_) => Ok(Ending::Fin(seen)),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(Ending::Reset(seen)),
        Err(error) => Err(error).with_context(|| format!("after {} bytes", seen.len())),
    }
}
