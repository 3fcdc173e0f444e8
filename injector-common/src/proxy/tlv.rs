//! Type-length-value records after the addresses of a version 2 header (section 2.2, from
//! "Type-Length-Value" on).

use super::{EncodeError, ParseError, checksum};

/// Type bytes registered by the specification.
pub mod kind {
    use core::ops::RangeInclusive;

    /// Protocol chosen by ALPN (RFC 7301).
    pub const ALPN: u8 = 0x01;
    /// Host name the client asked for, UTF-8.
    pub const AUTHORITY: u8 = 0x02;
    /// Checksum of the header, 4 bytes.
    pub const CRC32C: u8 = 0x03;
    /// Padding, ignored by receivers.
    pub const NOOP: u8 = 0x04;
    /// Opaque name of the connection, at most 128 bytes.
    pub const UNIQUE_ID: u8 = 0x05;
    /// The client's TLS parameters. Never sent: the injector does not terminate TLS, and receivers take
    /// the record as proof of TLS.
    pub const SSL: u8 = 0x20;
    /// Name of the network namespace, US-ASCII.
    pub const NETNS: u8 = 0x30;
    /// For applications (section 2.2.8).
    pub const CUSTOM: RangeInclusive<u8> = 0xE0..=0xEF;
}

/// The most bytes that a UNIQUE_ID may have (section 2.2.5).
pub const UNIQUE_ID_MAX: usize = 128;

/// Bytes of type and length, which precede every value.
const HEAD_LEN: usize = 3;

/// A record to send.
///
/// Values are bytes as on the wire. The configuration checks that an authority is a host name: Dovecot
/// disconnects on an invalid one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tlv<'a> {
    /// Protocol chosen by ALPN.
    Alpn(&'a [u8]),
    /// Host name the client asked for.
    Authority(&'a [u8]),
    /// Checksum over the whole header, computed while encoding.
    Crc32c,
    /// Opaque name of the connection, 1 to 128 bytes.
    UniqueId(&'a [u8]),
    /// Padding: this many zero bytes, 0 allowed, after the three of type and length.
    Noop(u16),
    /// An application's own record.
    Custom {
        /// Type byte, within [`kind::CUSTOM`].
        kind: u8,
        /// At least one byte.
        value: &'a [u8],
    },
}

impl<'a> Tlv<'a> {
    /// The type byte on the wire.
    pub fn kind(&self) -> u8 {
        match *self {
            Self::Alpn(_) => kind::ALPN,
            Self::Authority(_) => kind::AUTHORITY,
            Self::Crc32c => kind::CRC32C,
            Self::UniqueId(_) => kind::UNIQUE_ID,
            Self::Noop(_) => kind::NOOP,
            Self::Custom { kind, .. } => kind,
        }
    }

    /// What follows type and length.
    pub(super) fn value(&self) -> Value<'a> {
        match *self {
            Self::Alpn(value)
            | Self::Authority(value)
            | Self::UniqueId(value)
            | Self::Custom { value, .. } => Value::Bytes(value),
            Self::Crc32c => Value::Checksum,
            Self::Noop(len) => Value::Zeros(len.into()),
        }
    }
}

/// How a value is written.
pub(super) enum Value<'a> {
    Bytes(&'a [u8]),
    Checksum,
    Zeros(usize),
}

impl Value<'_> {
    pub(super) fn len(&self) -> usize {
        match *self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Checksum => checksum::LEN,
            Self::Zeros(len) => len,
        }
    }
}

/// Bytes of `tlvs` on the wire, after checking that they may be sent.
pub(super) fn encoded_len(tlvs: &[Tlv<'_>]) -> Result<usize, EncodeError> {
    let mut seen = Seen::default();
    let mut total: usize = 0;
    for tlv in tlvs {
        let kind = tlv.kind();
        if matches!(tlv, Tlv::Custom { .. }) && !kind::CUSTOM.contains(&kind) {
            return Err(EncodeError::NotCustom { kind });
        }
        let len = tlv.value().len();
        match violation(kind, len, &mut seen) {
            Some(Violation::Empty) => return Err(EncodeError::Empty { kind }),
            Some(Violation::Length) => return Err(EncodeError::Length { kind, len }),
            Some(Violation::Duplicate) => return Err(EncodeError::Duplicate { kind }),
            None => total = total.saturating_add(HEAD_LEN).saturating_add(len),
        }
    }
    Ok(total)
}

/// A received record with its raw value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawTlv<'a> {
    /// Type byte.
    pub kind: u8,
    /// The position of the type byte, from the start of the header.
    pub offset: usize,
    /// The value, without type and length.
    pub value: &'a [u8],
}

impl RawTlv<'_> {
    /// The position of the value, from the start of the header.
    pub(super) fn value_offset(&self) -> usize {
        self.offset.saturating_add(HEAD_LEN)
    }
}

/// The records of a header in their order. The iterator ends at the first malformed one.
///
/// [`parse`](super::parse()) checks all records, so in a [`Parsed`](super::Parsed) every item is `Ok`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tlvs<'a> {
    rest: &'a [u8],
    offset: usize,
    seen: Seen,
}

impl<'a> Tlvs<'a> {
    /// Reads `block`, which starts at byte `offset` of the header.
    pub(super) fn new(block: &'a [u8], offset: usize) -> Self {
        Self { rest: block, offset, seen: Seen::default() }
    }

    /// No records.
    pub(super) fn none() -> Self {
        Self::new(&[], 0)
    }

    fn read(&mut self) -> Result<RawTlv<'a>, ParseError> {
        let offset = self.offset;
        let truncated = ParseError::TlvTruncated { offset, available: self.rest.len() };

        let (&[kind, high, low], behind) = self.rest.split_first_chunk().ok_or(truncated)?;
        let len = usize::from(u16::from_be_bytes([high, low]));
        let (value, rest) = behind.split_at_checked(len).ok_or(truncated)?;
        match violation(kind, len, &mut self.seen) {
            Some(Violation::Empty) => return Err(ParseError::TlvEmpty { kind, offset }),
            Some(Violation::Length) => return Err(ParseError::TlvLength { kind, offset, len }),
            Some(Violation::Duplicate) => return Err(ParseError::TlvDuplicate { kind, offset }),
            None => {}
        }

        self.offset = offset.saturating_add(HEAD_LEN).saturating_add(len);
        self.rest = rest;
        Ok(RawTlv { kind, offset, value })
    }
}

impl<'a> Iterator for Tlvs<'a> {
    type Item = Result<RawTlv<'a>, ParseError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let read = self.read();
        if read.is_err() {
            self.rest = &[];
        }
        Some(read)
    }
}

/// Why a record may be neither sent nor accepted.
enum Violation {
    Empty,
    Length,
    Duplicate,
}

/// The rules for sending and receiving. Padding is exempt: receivers ignore it.
fn violation(kind: u8, len: usize, seen: &mut Seen) -> Option<Violation> {
    match kind {
        kind::NOOP => return None,
        _ if len == 0 => return Some(Violation::Empty),
        kind::CRC32C if len != checksum::LEN => return Some(Violation::Length),
        kind::UNIQUE_ID if len > UNIQUE_ID_MAX => return Some(Violation::Length),
        _ => {}
    }
    (!seen.insert(kind)).then_some(Violation::Duplicate)
}

/// The set of types seen so far, one bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen([u128; 2]);

impl Seen {
    /// False when `kind` was there already.
    fn insert(&mut self, kind: u8) -> bool {
        let Self([low, high]) = self;
        let word = if kind < 128 { low } else { high };
        let bit = 1u128 << (kind % 128);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}
