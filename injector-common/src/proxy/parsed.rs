//! A header that was parsed.

use super::{Addresses, Tlvs, kind};

/// A whole header at the start of the parsed input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed<'a> {
    /// Its version.
    pub version: Version,
    /// What it says about the connection.
    pub command: Announced,
    /// The records after the addresses; none in version 1.
    pub tlvs: Tlvs<'a>,
    /// Bytes of the whole header. The payload follows.
    pub len: usize,
}

impl<'a> Parsed<'a> {
    /// The value of the first record of type `kind`.
    pub fn tlv(&self, kind: u8) -> Option<&'a [u8]> {
        self.tlvs.clone().flatten().find(|tlv| tlv.kind == kind).map(|tlv| tlv.value)
    }

    /// Whether the header has a CRC32C. [`parse`](super::parse()) has verified it.
    pub fn is_checksummed(&self) -> bool {
        self.tlv(kind::CRC32C).is_some()
    }
}

/// The version of a header.
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
    /// `UNKNOWN` in version 1, PROXY with AF_UNSPEC in version 2: the sender does not know the client's
    /// address. A receiver may reject it (sections 2.1 and 2.2); Postfix and Exim do.
    Unknown,
}

impl Announced {
    /// The addresses of the client's connection, if the header has them.
    pub fn addresses(&self) -> Option<Addresses> {
        match *self {
            Self::Proxy(addresses) => Some(addresses),
            Self::Local | Self::Unknown => None,
        }
    }
}
