//! Reading and writing lines, with byte counts.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// How long a client may be silent between two lines.
const IDLE: Duration = Duration::from_secs(60);

/// Longest accepted line, in bytes with CRLF. RFC 5321 section 4.5.3.1.6 requires 1,000 in mail
/// text; an unlimited line is an attack.
const MAX_LINE: u64 = 64 * 1024;

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
    /// `TimedOut` after [`IDLE`], `InvalidData` for a line of more than [`MAX_LINE`], and the
    /// socket's own errors.
    pub(super) async fn line(&mut self, into: &mut Vec<u8>) -> io::Result<bool> {
        let mut limited = (&mut self.stream).take(MAX_LINE);
        let count = tokio::time::timeout(IDLE, limited.read_until(b'\n', into)).await??;
        self.received += count as u64;
        if count as u64 == MAX_LINE && !into.ends_with(b"\n") {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "line too long"));
        }
        Ok(count > 0)
    }

    /// The next line as text without its line end, bytes outside UTF-8 replaced; `None` at the end
    /// of the stream.
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
