//! Errors of encoding and parsing headers.

use core::fmt;

/// Why a header cannot be sent. Nothing has been written to the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncodeError {
    /// The header does not fit the buffer, or exceeds [`MAX_LEN`](super::MAX_LEN).
    TooLong {
        /// Bytes the header has.
        needed: usize,
        /// Bytes it may have.
        limit: usize,
    },
    /// A record of this type has no value.
    Empty {
        /// Type byte.
        kind: u8,
    },
    /// A value of this type cannot have this length.
    Length {
        /// Type byte.
        kind: u8,
        /// Bytes of the value.
        len: usize,
    },
    /// Two records of this type.
    Duplicate {
        /// Type byte.
        kind: u8,
    },
    /// The type of a custom record is outside the range for applications.
    NotCustom {
        /// Type byte.
        kind: u8,
    },
}

impl fmt::Display for EncodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TooLong { needed, limit } => {
                write!(
                    f,
                    "the PROXY header has {needed} bytes, {limit} are allowed: send fewer or shorter TLVs"
                )
            }
            Self::Empty { kind } => write!(f, "the TLV of type {kind:#04x} has no value"),
            Self::Length { kind, len } => {
                write!(f, "the TLV of type {kind:#04x} cannot have a value of {len} bytes")
            }
            Self::Duplicate { kind } => write!(f, "two TLVs of type {kind:#04x}"),
            Self::NotCustom { kind } => {
                write!(f, "{kind:#04x} is not a custom TLV type: use 0xe0 to 0xef")
            }
        }
    }
}

impl core::error::Error for EncodeError {}

/// Why bytes are not a PROXY header. Offsets count from the first byte of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// The input is valid so far, but the header is longer.
    Incomplete {
        /// At least this many bytes in total: more than the input has, and not more than the header will
        /// have.
        needed: usize,
    },
    /// The input starts with neither signature.
    NotProxy,
    /// Binary signature, but a version other than 2.
    Version {
        /// Upper four bits of byte 12.
        found: u8,
    },
    /// A command that is neither LOCAL nor PROXY.
    Command {
        /// Lower four bits of byte 12.
        found: u8,
    },
    /// Not one of the seven combinations of family and transport that section 2.2 lists.
    Family {
        /// Byte 13.
        found: u8,
    },
    /// A valid family and transport, but not TCP: UDP, or a UNIX socket.
    NotTcp {
        /// Byte 13.
        found: u8,
    },
    /// The length field is too small for the addresses of the family.
    AddressBlock {
        /// Bytes by the length field.
        length: usize,
        /// Bytes the family's addresses take.
        needed: usize,
    },
    /// A TLV runs over the end of the header.
    TlvTruncated {
        /// Where the TLV starts.
        offset: usize,
        /// Bytes from there to the end of the header.
        available: usize,
    },
    /// A TLV other than NOOP without a value.
    TlvEmpty {
        /// Type byte.
        kind: u8,
        /// Where the TLV starts.
        offset: usize,
    },
    /// A value whose type does not allow this length.
    TlvLength {
        /// Type byte.
        kind: u8,
        /// Where the TLV starts.
        offset: usize,
        /// Bytes of the value.
        len: usize,
    },
    /// A second TLV of a type other than NOOP.
    TlvDuplicate {
        /// Type byte.
        kind: u8,
        /// Where the second one starts.
        offset: usize,
    },
    /// The checksum does not match the header.
    Checksum {
        /// The CRC32C in the header.
        sent: u32,
        /// The CRC32C of the header.
        computed: u32,
    },
    /// No CRLF within the 107 bytes that a version 1 line may have.
    LineTooLong,
    /// A CR without LF, or a LF without CR.
    LineEnding {
        /// Where the lone character stands.
        offset: usize,
    },
    /// The word after `PROXY` is none of `TCP4`, `TCP6`, `UNKNOWN`.
    Protocol {
        /// Where the word starts.
        offset: usize,
    },
    /// The line ends where a field should be.
    MissingField {
        /// Where the line ends.
        offset: usize,
    },
    /// The line goes on after the destination port.
    ExtraField {
        /// Where the excess starts.
        offset: usize,
    },
    /// Not an address of the line's family in the specification's notation.
    Address {
        /// Where the field starts.
        offset: usize,
    },
    /// Not a decimal number from 0 to 65535 without leading zeros.
    Port {
        /// Where the field starts.
        offset: usize,
    },
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Incomplete { needed } => {
                write!(f, "PROXY header incomplete: at least {needed} bytes needed")
            }
            Self::NotProxy => {
                write!(f, "not a PROXY header: the first bytes are not a signature of version 1 or 2")
            }
            Self::Version { found } => write!(f, "PROXY header has version {found}, expected 2"),
            Self::Command { found } => write!(f, "unknown command {found:#x} in the PROXY header"),
            Self::Family { found } => {
                write!(f, "unknown address family and transport {found:#04x} in the PROXY header")
            }
            Self::NotTcp { found } => {
                write!(f, "the PROXY header announces a connection that is not TCP ({found:#04x})")
            }
            Self::AddressBlock { length, needed } => {
                write!(f, "the PROXY header has a length of {length} bytes, but its addresses need {needed}")
            }
            Self::TlvTruncated { offset, available } => {
                write!(
                    f,
                    "the TLV at byte {offset} is longer than the {available} bytes left in the PROXY header"
                )
            }
            Self::TlvEmpty { kind, offset } => {
                write!(f, "the TLV of type {kind:#04x} at byte {offset} has no value")
            }
            Self::TlvLength { kind, offset, len } => {
                write!(f, "the TLV of type {kind:#04x} at byte {offset} cannot have a value of {len} bytes")
            }
            Self::TlvDuplicate { kind, offset } => {
                write!(f, "a second TLV of type {kind:#04x} at byte {offset}")
            }
            Self::Checksum { sent, computed } => {
                write!(f, "the PROXY header has checksum {sent:#010x}, expected {computed:#010x}")
            }
            Self::LineTooLong => write!(f, "no CRLF within the first 107 bytes of the PROXY line"),
            Self::LineEnding { offset } => {
                write!(f, "a lone CR or LF at byte {offset} of the PROXY line, expected CRLF")
            }
            Self::Protocol { offset } => {
                write!(f, "expected TCP4, TCP6 or UNKNOWN at byte {offset} of the PROXY line")
            }
            Self::MissingField { offset } => {
                write!(f, "the PROXY line ends at byte {offset}, expected a field")
            }
            Self::ExtraField { offset } => {
                write!(f, "the PROXY line continues at byte {offset}, after the destination port")
            }
            Self::Address { offset } => {
                write!(f, "byte {offset} of the PROXY line does not start an address of its family")
            }
            Self::Port { offset } => {
                write!(f, "byte {offset} of the PROXY line does not start a port number")
            }
        }
    }
}

impl core::error::Error for ParseError {}
