//! The header as one line of text (section 2.1), for receivers that only support version 1.

use core::fmt::Write;
use core::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use core::{fmt, str};

use super::parsed::{Announced, Parsed, Version};
use super::writer::Writer;
use super::{Addresses, EncodeError, ParseError, Tlvs};

/// The longest version 1 header, CRLF included.
pub const MAX_LEN: usize = 107;

/// The start of every version 1 header.
pub(super) const SIGNATURE: &[u8] = b"PROXY ";

/// Bytes of the shortest header, `PROXY UNKNOWN` and CRLF.
pub(super) const MIN_LEN: usize = 15;

/// Writes a header to the start of `out` and returns its length in bytes, at most 104. An error leaves
/// `out` unchanged.
///
/// # Errors
///
/// [`EncodeError::TooLong`] when `out` has no room for it.
pub fn encode(addresses: &Addresses, out: &mut [u8]) -> Result<usize, EncodeError> {
    let mut line = [0; MAX_LEN];
    let mut writer = Writer::new(&mut line);
    let written = write(addresses, &mut writer);
    let needed = writer.len();

    let too_long = EncodeError::TooLong { needed, limit: out.len() };
    // MAX_LEN bytes hold any line, so this never fails. If it did, no header would be sent.
    written.map_err(|fmt::Error| too_long)?;
    let line = line.get(..needed).ok_or(too_long)?;
    out.get_mut(..needed).ok_or(too_long)?.copy_from_slice(line);
    Ok(needed)
}

fn write(addresses: &Addresses, line: &mut Writer<'_>) -> fmt::Result {
    match addresses.normalised() {
        Addresses::V4 { source, destination } => {
            let (from, to) = (source.ip(), destination.ip());
            write!(line, "PROXY TCP4 {from} {to} {} {}\r\n", source.port(), destination.port())
        }
        Addresses::V6 { source, destination } => {
            let (from, to) = (Hexadecimal(*source.ip()), Hexadecimal(*destination.ip()));
            write!(line, "PROXY TCP6 {from} {to} {} {}\r\n", source.port(), destination.port())
        }
    }
}

/// Formats an IPv6 address in hexadecimal groups only. `Ipv6Addr` formats a mapped address with a dotted
/// tail, which the specification does not allow.
struct Hexadecimal(Ipv6Addr);

impl fmt::Display for Hexadecimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.to_ipv4_mapped() {
            None => write!(f, "{}", self.0),
            Some(mapped) => {
                let [a, b, c, d] = mapped.octets();
                let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
                write!(f, "::ffff:{high:x}:{low:x}")
            }
        }
    }
}

/// Reads an input known to start with [`SIGNATURE`].
pub(super) fn parse(input: &[u8]) -> Result<Parsed<'_>, ParseError> {
    let line = find_line(input)?;
    let mut fields = Fields { line, offset: SIGNATURE.len() };

    let (offset, protocol) = fields.next()?;
    let command = match protocol {
        b"TCP4" => Announced::Proxy(read_addresses::<Ipv4Addr>(&mut fields)?),
        b"TCP6" => Announced::Proxy(read_addresses::<Ipv6Addr>(&mut fields)?),
        // The rest up to CRLF is ignored.
        b"UNKNOWN" => Announced::Unknown,
        _ => return Err(ParseError::Protocol { offset }),
    };
    let len = line.len() + b"\r\n".len();
    Ok(Parsed { version: Version::One, command, tlvs: Tlvs::none(), len })
}

/// The line without its CRLF.
fn find_line(input: &[u8]) -> Result<&[u8], ParseError> {
    // The CR of a valid line is at MAX_LEN - 2 at the latest.
    let window = input.get(..MAX_LEN - 1).unwrap_or(input);
    let Some(end) = window.iter().position(|byte| matches!(byte, b'\r' | b'\n')) else {
        if window.len() == MAX_LEN - 1 {
            return Err(ParseError::LineTooLong);
        }
        return Err(ParseError::Incomplete { needed: MIN_LEN.max(input.len() + 2) });
    };
    let (line, ending) = input.split_at_checked(end).ok_or(ParseError::LineEnding { offset: end })?;
    match ending {
        [b'\r', b'\n', ..] => Ok(line),
        [b'\r'] => Err(ParseError::Incomplete { needed: MIN_LEN.max(input.len() + 1) }),
        _ => Err(ParseError::LineEnding { offset: end }),
    }
}

fn read_addresses<A: Notation>(fields: &mut Fields<'_>) -> Result<Addresses, ParseError> {
    let source: A = read_address(fields)?;
    let destination: A = read_address(fields)?;
    let source_port = read_port(fields)?;
    let destination_port = read_port(fields)?;
    fields.end()?;

    let (source, destination) = (source.with_port(source_port), destination.with_port(destination_port));
    Ok(Addresses::new(source, destination))
}

fn read_address<A: Notation>(fields: &mut Fields<'_>) -> Result<A, ParseError> {
    let (offset, field) = fields.next()?;
    str::from_utf8(field).ok().and_then(A::read).ok_or(ParseError::Address { offset })
}

fn read_port(fields: &mut Fields<'_>) -> Result<u16, ParseError> {
    let (offset, field) = fields.next()?;
    // `u16::from_str` alone would accept "+25" and "025".
    let canonical = match field {
        [b'0'] => true,
        [b'1'..=b'9', rest @ ..] => rest.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    let port = str::from_utf8(field).ok().filter(|_| canonical).and_then(|field| field.parse().ok());
    port.ok_or(ParseError::Port { offset })
}

/// The notation of a family's addresses in a line.
trait Notation: Sized {
    fn read(field: &str) -> Option<Self>;
    fn with_port(self, port: u16) -> SocketAddr;
}

impl Notation for Ipv4Addr {
    /// Four decimal numbers. The standard library rejects leading zeros, as the specification does.
    fn read(field: &str) -> Option<Self> {
        field.parse().ok()
    }

    fn with_port(self, port: u16) -> SocketAddr {
        (self, port).into()
    }
}

impl Notation for Ipv6Addr {
    /// Hexadecimal groups. The specification does not allow the dotted tail of RFC 4291, section 2.2,
    /// form 3.
    fn read(field: &str) -> Option<Self> {
        if field.contains('.') {
            return None;
        }
        field.parse().ok()
    }

    fn with_port(self, port: u16) -> SocketAddr {
        (self, port).into()
    }
}

/// Fields separated by exactly one space. Two in a row make an empty field, which is never valid.
struct Fields<'a> {
    line: &'a [u8],
    /// The start of the next field; one past the line's end after the last field.
    offset: usize,
}

impl<'a> Fields<'a> {
    /// The next field and its start.
    fn next(&mut self) -> Result<(usize, &'a [u8]), ParseError> {
        let offset = self.offset;
        let Some(rest) = self.line.get(offset..) else {
            return Err(ParseError::MissingField { offset: self.line.len() });
        };
        let field = rest.split(|byte| *byte == b' ').next().unwrap_or_default();
        self.offset = offset + field.len() + 1;
        Ok((offset, field))
    }

    /// Fails unless the last field was taken.
    fn end(&self) -> Result<(), ParseError> {
        if self.offset <= self.line.len() {
            return Err(ParseError::ExtraField { offset: self.offset });
        }
        Ok(())
    }
}
