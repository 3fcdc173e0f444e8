//! The PROXY protocol, versions 1 and 2: what the injector puts in front of a client's bytes.
//!
//! Sending is [`v2::encode`] and [`v1::encode`]; both write into a buffer whose length is the limit and leave it
//! untouched on an error. Reading is [`parse`], which is stricter than a mail server: it is the judge in tests, the
//! door of the demo backend, and no receiver for the wild. [`forgery`] says whether a public client opens with a
//! header of its own.
//!
//! "Section" in these pages is a section of `doc/proxy-protocol.txt` in HAProxy's source, the protocol's
//! specification.

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

/// The twelve bytes every version 2 header starts with (section 2.2).
pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Largest header, in bytes, that is sent unless the operator raises it.
///
/// It is the largest version 2 header without TLVs (16 + two UNIX addresses of 108), and so what the receivers with
/// the smallest buffers (Exim, Cyrus) still take.
pub const SAFE_LEN: usize = 232;

/// Largest header, in bytes, that is ever sent: the design limit of the specification, and the size of Postfix's
/// one and only peek.
pub const MAX_LEN: usize = 536;

/// What a header tells the receiver to do with the connection (section 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The proxy speaks for itself: the receiver keeps the connection's own addresses. Only for receivers known to
    /// take it.
    Local,
    /// The proxy speaks for a client: these are the ends of the client's connection.
    Proxy(Addresses),
}
