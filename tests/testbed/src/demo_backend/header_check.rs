//! Checks the header the way Postfix does.
//!
//! Postfix waits until the socket is readable, peeks *once* at up to 536 bytes, and rejects the
//! connection unless the complete header is among them (`postscreen_haproxy.c` and
//! `smtpd_haproxy.c`, by `haproxy_srvr_receive` in `src/global/haproxy_srvr.c`). This detects an
//! injector that sends the header in two pieces.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use injector_common::proxy::{self, Announced, ParseError};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Number of bytes to peek: the longest v2 header that the specification expects (section 2.2).
const WINDOW: usize = 536;

/// An accepted header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its bytes, as received.
    pub raw: Vec<u8>,
    /// The client that it names; `None` for LOCAL, when the TCP peer is the client.
    pub source: Option<SocketAddr>,
    /// The address the client connected to; `None` for LOCAL.
    pub destination: Option<SocketAddr>,
}

/// Why a connection was closed before the protocol started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderError {
    /// Nothing arrived in time.
    Silent,
    /// The client closed without sending anything.
    Closed,
    /// The first read held only the beginning of a header.
    Split {
        /// The received bytes.
        seen: Vec<u8>,
    },
    /// The first read was not a valid header.
    Malformed {
        /// The received bytes, at most 536.
        seen: Vec<u8>,
        /// The parser's error.
        reason: String,
    },
    /// The connection broke.
    Broken {
        /// The socket's error.
        reason: String,
    },
}

impl fmt::Display for HeaderError {
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

/// Reads the header from the stream, and no byte more, so that the client's bytes follow.
pub(super) async fn receive(stream: &mut TcpStream, header_timeout: Duration) -> Result<Header, HeaderError> {
    let broken = |error: io::Error| HeaderError::Broken { reason: error.to_string() };
    let mut window = [0; WINDOW];
    let count = match timeout(header_timeout, stream.peek(&mut window)).await {
        Err(_) => return Err(HeaderError::Silent),
        Ok(peeked) => peeked.map_err(broken)?,
    };
    let mut header = check(&window[..count])?;
    stream.read_exact(&mut header.raw).await.map_err(broken)?;
    Ok(header)
}

/// Checks the first read.
fn check(seen: &[u8]) -> Result<Header, HeaderError> {
    if seen.is_empty() {
        return Err(HeaderError::Closed);
    }
    let parsed = match proxy::parse(seen) {
        Ok(parsed) => parsed,
        Err(ParseError::Incomplete { .. }) => return Err(HeaderError::Split { seen: seen.to_vec() }),
        Err(error) => return Err(HeaderError::Malformed { seen: seen.to_vec(), reason: error.to_string() }),
    };
    if parsed.command == Announced::Unknown {
        // Postfix rejects a proxy that does not know its client.
        return Err(HeaderError::Malformed {
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

    /// PROXY, TCP over IPv4, 198.51.100.7:40000 to 192.0.2.10:25, as in section 2.2 of the
    /// specification.
    const HEADER: [u8; 28] = [
        0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a, // signature
        0x21, 0x11, 0x00, 0x0c, // version 2, PROXY; AF_INET, STREAM; 12 bytes follow
        198, 51, 100, 7, 192, 0, 2, 10, 0x9c, 0x40, 0x00, 0x19,
    ];

    #[test]
    fn a_header_is_taken_and_what_follows_is_left() {
        let header = check(&[&HEADER[..], b"EHLO x\r\n"].concat()).unwrap();
        assert_eq!(header.raw, HEADER);
        assert_eq!(header.source, Some("198.51.100.7:40000".parse().unwrap()));
        assert_eq!(header.destination, Some("192.0.2.10:25".parse().unwrap()));
    }

    #[test]
    fn a_header_cut_anywhere_is_refused_as_split() {
        for length in 1..HEADER.len() {
            assert_eq!(
                check(&HEADER[..length]),
                Err(HeaderError::Split { seen: HEADER[..length].to_vec() }),
                "{length} bytes"
            );
        }
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let mut other_version = HEADER;
        other_version[12] = 0x31;
        let unspecified = b"\r\n\r\n\0\r\nQUIT\n\x21\x00\x00\x00".as_slice();
        for seen in [b"EHLO client.example\r\n".as_slice(), b"\r\nEHLO", unspecified, &other_version] {
            assert!(matches!(check(seen), Err(HeaderError::Malformed { .. })), "{seen:02x?}");
        }
        assert_eq!(check(b""), Err(HeaderError::Closed));
    }
}
