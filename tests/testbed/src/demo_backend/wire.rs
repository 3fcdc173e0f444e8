//! Lines in, lines out, and a count of both.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// How long a client may be silent between two lines.
const IDLE: Duration = Duration::from_secs(60);

/// Longest line taken, in bytes with CRLF. RFC 5321 section 4.5.3.1.6 asks for 1,000 in mail text; more than that is
/// generous, without end is an attack.
const LONGEST_LINE: u64 = 64 * 1024;

/// A connection after its header.
#[derive(Debug)]
pub(super) struct Wire {
    stream: BufReader<TcpStream>,
    received: u64,
    sent: u64,
}

impl Wire {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream: BufReader::with_capacity(64 * 1024, stream), received: 0, sent: 0 }
    }

    pub(super) fn received(&self) -> u64 {
        self.received
    }

    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    /// Appends the next line, with its line end, to `into`; `false` at the end of the stream.
    ///
    /// # Errors
    /// `TimedOut` after [`IDLE`], `InvalidData` for a line of more than [`LONGEST_LINE`], and the socket's own.
    pub(super) async fn line(&mut self, into: &mut Vec<u8>) -> io::Result<bool> {
        let mut limited = (&mut self.stream).take(LONGEST_LINE);
        let count = tokio::time::timeout(IDLE, limited.read_until(b'\n', into)).await??;
        self.received += count as u64;
        if count as u64 == LONGEST_LINE && !into.ends_with(b"\n") {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "line too long"));
        }
        Ok(count > 0)
    }

    /// The next line as text without its line end, bytes outside UTF-8 replaced; `None` at the end of the stream.
    pub(super) async fn text(&mut self) -> io::Result<Option<String>> {
        let mut line = Vec::new();
        let more = self.line(&mut line).await?;
        Ok(more.then(|| String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned()))
    }

    /// Sends all of `bytes`.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        tokio::time::timeout(IDLE, self.stream.write_all(bytes)).await??;
        self.sent += bytes.len() as u64;
        Ok(())
    }
}
