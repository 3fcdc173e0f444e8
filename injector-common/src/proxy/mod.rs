//! The PROXY protocol, versions 1 and 2: the header that the injector sends before a client's bytes.
//!
//! [`v2::encode`] and [`v1::encode`] write a header into a buffer. The buffer's length is the limit, and
//! an error leaves the buffer unchanged. [`parse`] reads a header. It is stricter than a mail server:
//! tests and the demo backend use it. [`forgery`] detects a public client that sends its own header.
//!
//! "Section" means a section of the protocol's specification, `doc/proxy-protocol.txt` in HAProxy's
//! source.

mod addresses;
mod checksum;
mod error;
mod forgery;
mod parse;
mod parsed;
mod tlv;
pub mod v1;
pub mod v2;
mod writer;

pub use addresses::Addresses;
pub use error::{EncodeError, ParseError};
pub use forgery::{Forgery, forgery};
pub use parse::parse;
pub use parsed::{Announced, Parsed, Version};
pub use tlv::{RawTlv, Tlv, Tlvs, UNIQUE_ID_MAX, kind};

/// The twelve bytes that start every version 2 header (section 2.2).
pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// The largest header, in bytes, that is sent by default.
///
/// It is the largest version 2 header without TLVs (16 + two UNIX addresses of 108), which the receivers
/// with the smallest buffers (Exim, Cyrus) accept.
pub const SAFE_LEN: usize = 232;

/// The largest header, in bytes, that can be configured: the design limit of the specification, and the
/// size of Postfix's only peek.
pub const MAX_LEN: usize = 536;

/// The command of a header (section 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The proxy speaks for itself: the receiver uses the connection's own addresses. Some receivers
    /// reject it.
    Local,
    /// The proxy speaks for a client, whose connection has these addresses.
    Proxy(Addresses),
}
