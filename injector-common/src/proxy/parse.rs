//! A strict reader of both versions.

use super::{Addresses, ParseError, SIGNATURE, Tlvs, kind, v1, v2};

/// A whole header, at the start of the input that was parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed<'a> {
    /// How it was written.
    pub version: Version,
    /// What it says.
    pub command: Announced,
    /// The records behind the addresses; none in version 1.
    pub tlvs: Tlvs<'a>,
    /// Bytes of the whole header: the payload follows.
    pub len: usize,
}

impl<'a> Parsed<'a> {
    /// The value of the first record of type `kind`.
    pub fn tlv(&self, kind: u8) -> Option<&'a [u8]> {
        self.tlvs.clone().flatten().find(|tlv| tlv.kind == kind).map(|tlv| tlv.value)
    }

    /// The header carried a CRC32C, which was right.
    pub fn is_checksummed(&self) -> bool {
        self.tlv(kind::CRC32C).is_some()
    }
}

/// How a header was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// One line of text.
    One,
    /// Binary.
    Two,
}

/// What a received header says about the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announced {
    /// Version 2, LOCAL: the sender speaks for itself.
    Local,
    /// The ends of the client's TCP connection.
    Proxy(Addresses),
    /// `UNKNOWN` in version 1, PROXY with AF_UNSPEC in version 2: there is a client, but the sender cannot say who.
    /// A receiver is free to refuse it (sections 2.1 and 2.2); Postfix and Exim do.
    Unknown,
}

impl Announced {
    /// The ends of the client's connection, where the header tells them.
    pub fn addresses(&self) -> Option<Addresses> {
        match *self {
            Self::Proxy(addresses) => Some(addresses),
            Self::Local | Self::Unknown => None,
        }
    }
}

/// Reads the header at the start of `input`; version 1 or 2 by their first bytes.
///
/// Strict: what the specification does not allow is refused, and so are TLVs that a sender should not make (empty
/// or twice the same, NOOP apart). The length of a version 2 header is not limited here; a caller that bounds its
/// buffer compares its size with [`ParseError::Incomplete`]. Addresses come out normalised, as [`Addresses::new`]
/// makes them.
///
/// # Errors
///
/// [`ParseError::Incomplete`] as long as more bytes may still make a header of the input; every other error is
/// final.
pub fn parse(input: &[u8]) -> Result<Parsed<'_>, ParseError> {
    if input.starts_with(&SIGNATURE) {
        v2::parse(input)
    } else if input.starts_with(v1::SIGNATURE) {
        v1::parse(input)
    } else if v1::SIGNATURE.starts_with(input) {
        Err(ParseError::Incomplete { needed: v1::MIN_LEN })
    } else if SIGNATURE.starts_with(input) {
        Err(ParseError::Incomplete { needed: v2::FIXED_LEN })
    } else {
        Err(ParseError::NotProxy)
    }
}
