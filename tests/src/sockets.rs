//! Plain sockets of a test, which never wait for ever.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

/// Nothing takes longer unless it hangs.
pub const LIMIT: Duration = Duration::from_secs(10);

/// Has reads and writes fail after [`LIMIT`], and sends at once.
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
/// As accept(2), and when none comes.
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

/// Reads exactly what is expected.
///
/// # Errors
/// As read(2), and when it is something else.
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

/// Says something and expects it at the other end.
///
/// # Errors
/// As write(2), and as [`expect`].
pub fn pass(from: &mut TcpStream, to: &mut TcpStream, bytes: &[u8]) -> anyhow::Result<()> {
    from.write_all(bytes)?;
    expect(to, bytes)
}
