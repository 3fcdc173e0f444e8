//! The header, demanded the way Postfix does it.
//!
//! Postfix waits until the socket is readable, peeks *once* at up to 536 bytes, and refuses the connection unless the
//! whole header is among them (`postscreen_haproxy.c` and `smtpd_haproxy.c`, by `haproxy_srvr_receive` in
//! `src/global/haproxy_srvr.c`). An injector that sends the header in two pieces is therefore caught here.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use injector_common::proxy::{self, Announced, ParseError};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How much is peeked at: the longest header the specification foresees for v2 (section 2.2).
const WINDOW: usize = 536;

/// A header the backend accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its bytes, as they came.
    pub raw: Vec<u8>,
    /// The client it names; `None` for LOCAL, when the TCP peer speaks for itself.
    pub source: Option<SocketAddr>,
    /// The address the client connected to; `None` for LOCAL.
    pub destination: Option<SocketAddr>,
}

/// Why a connection was closed before a word was spoken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Nothing came in time.
    Silent,
    /// The client closed without sending anything.
    Closed,
    /// The first read held only the beginning of a header.
    Split {
        /// What it held.
        seen: Vec<u8>,
    },
    /// The first read was not a header, or a wrong one.
    Malformed {
        /// What it held, 536 bytes at most.
        seen: Vec<u8>,
        /// What the parser said.
        reason: String,
    },
    /// The connection broke.
    Broken {
        /// What the socket said.
        reason: String,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent => write!(f, "no header in time"),
            Self::Closed => write!(f, "closed before a header"),
            Self::Split { seen } => write!(f, "only {} bytes of the header in the first read", seen.len()),
            Self::Malformed { reason, .. } => write!(f, "{reason}"),
            Self::Broken { reason } => write!(f, "connection broken: {reason}"),
        }
    }
}

/// Takes the header off the stream: exactly its bytes, so that what follows is the client's.
pub(super) async fn demand(stream: &mut TcpStream, patience: Duration) -> Result<Header, Refusal> {
    let broken = |error: io::Error| Refusal::Broken { reason: error.to_string() };
    let mut window = [0; WINDOW];
    let count = match timeout(patience, stream.peek(&mut window)).await {
        Err(_) => return Err(Refusal::Silent),
        Ok(peeked) => peeked.map_err(broken)?,
    };
    let mut header = judge(&window[..count])?;
    stream.read_exact(&mut header.raw).await.map_err(broken)?;
    Ok(header)
}

/// Decides on the first read.
fn judge(seen: &[u8]) -> Result<Header, Refusal> {
    if seen.is_empty() {
        return Err(Refusal::Closed);
    }
    let parsed = match proxy::parse(seen) {
        Ok(parsed) => parsed,
        Err(ParseError::Incomplete { .. }) => return Err(Refusal::Split { seen: seen.to_vec() }),
        Err(error) => return Err(Refusal::Malformed { seen: seen.to_vec(), reason: error.to_string() }),
    };
    if parsed.command == Announced::Unknown {
        // Postfix has no use for a proxy that cannot say for whom it speaks.
        return Err(Refusal::Malformed {
            seen: seen.to_vec(),
            reason: "a proxied client without address".to_owned(),
        });
    }
    let addresses = parsed.command.addresses();
    Ok(Header {
        raw: seen[..parsed.len].to_vec(),
        source: addresses.map(|addresses| addresses.source()),
        destination: addresses.map(|addresses| addresses.destination()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PROXY, TCP over IPv4, 198.51.100.7:40000 to 192.0.2.10:25, as in section 2.2 of the specification.
    const HEADER: [u8; 28] = [
        0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a, // signature
        0x21, 0x11, 0x00, 0x0c, // version 2, PROXY; AF_INET, STREAM; 12 bytes follow
        198, 51, 100, 7, 192, 0, 2, 10, 0x9c, 0x40, 0x00, 0x19,
    ];

    #[test]
    fn a_header_is_taken_and_what_follows_is_left() {
        let header = judge(&[&HEADER[..], b"EHLO x\r\n"].concat()).unwrap();
        assert_eq!(header.raw, HEADER);
        assert_eq!(header.source, Some("198.51.100.7:40000".parse().unwrap()));
        assert_eq!(header.destination, Some("192.0.2.10:25".parse().unwrap()));
    }

    #[test]
    fn a_header_cut_anywhere_is_refused_as_split() {
        for cut in 1..HEADER.len() {
            assert_eq!(
                judge(&HEADER[..cut]),
                Err(Refusal::Split { seen: HEADER[..cut].to_vec() }),
                "{cut} bytes"
            );
        }
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let mut other_version = HEADER;
        other_version[12] = 0x31;
        let unspecified = b"\r\n\r\n\0\r\nQUIT\n\x21\x00\x00\x00".as_slice();
        for seen in [b"EHLO client.example\r\n".as_slice(), b"\r\nEHLO", unspecified, &other_version] {
            assert!(matches!(judge(seen), Err(Refusal::Malformed { .. })), "{seen:02x?}");
        }
        assert_eq!(judge(b""), Err(Refusal::Closed));
    }
}
