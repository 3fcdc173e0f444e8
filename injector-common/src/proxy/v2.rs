//! The binary header (section 2.2): sixteen fixed bytes, addresses, TLVs.

use core::net::{IpAddr, SocketAddr};

use super::parsed::{Announced, Parsed, Version};
use super::tlv::{self, Value};
use super::writer::Writer;
use super::{Addresses, Command, EncodeError, MAX_LEN, ParseError, SIGNATURE, Tlv, Tlvs, checksum, kind};

/// Bytes of signature, version and command, family and transport, length.
pub(super) const FIXED_LEN: usize = 16;

const VERSION: u8 = 2;

/// Byte 12: version in the upper four bits, command in the lower.
const LOCAL: u8 = VERSION << 4;
const PROXY: u8 = VERSION << 4 | 1;

/// Byte 13: address family in the upper four bits, transport in the lower.
const UNSPEC: u8 = 0x00;
const TCP_V4: u8 = 0x11;
const UDP_V4: u8 = 0x12;
const TCP_V6: u8 = 0x21;
const UDP_V6: u8 = 0x22;
const UNIX_STREAM: u8 = 0x31;
const UNIX_DGRAM: u8 = 0x32;

/// Two addresses and two ports.
const V4_LEN: usize = 2 * 4 + 2 * 2;
const V6_LEN: usize = 2 * 16 + 2 * 2;

/// Writes a header to the start of `out` and returns its length in bytes: 28 for IPv4 and 52 for IPv6
/// without TLVs.
///
/// TLVs keep their order. The caller limits the size by the length of `out`:
/// [`SAFE_LEN`](super::SAFE_LEN) by default, at most [`MAX_LEN`]. An error leaves `out` unchanged.
///
/// # Errors
///
/// A header longer than allowed, or a TLV that must not be sent; see [`EncodeError`].
pub fn encode(command: &Command, tlvs: &[Tlv<'_>], out: &mut [u8]) -> Result<usize, EncodeError> {
    let needed = measure(command, tlvs)?;
    let too_long = EncodeError::TooLong { needed, limit: out.len().min(MAX_LEN) };
    if needed > MAX_LEN {
        return Err(too_long);
    }
    let header = out.get_mut(..needed).ok_or(too_long)?;

    // The header is known to fit, so neither of these fails. If one did, no header would be sent.
    let checksum_at = write(command, tlvs, header).ok_or(too_long)?;
    if let Some(value_at) = checksum_at {
        let checksum = checksum::of(header, value_at).ok_or(too_long)?;
        let value = header.get_mut(value_at..).and_then(<[u8]>::first_chunk_mut).ok_or(too_long)?;
        *value = checksum.to_be_bytes();
    }
    Ok(needed)
}

/// Bytes that [`encode`] would write.
///
/// # Errors
///
/// As [`encode`], with [`MAX_LEN`] for the limit.
pub fn encoded_len(command: &Command, tlvs: &[Tlv<'_>]) -> Result<usize, EncodeError> {
    let needed = measure(command, tlvs)?;
    if needed > MAX_LEN {
        return Err(EncodeError::TooLong { needed, limit: MAX_LEN });
    }
    Ok(needed)
}

/// Bytes of the header, even if that is too long, after checking its TLVs.
fn measure(command: &Command, tlvs: &[Tlv<'_>]) -> Result<usize, EncodeError> {
    let addresses = match command {
        Command::Local => 0,
        Command::Proxy(addresses) => match addresses.normalised() {
            Addresses::V4 { .. } => V4_LEN,
            Addresses::V6 { .. } => V6_LEN,
        },
    };
    Ok(tlv::encoded_len(tlvs)?.saturating_add(FIXED_LEN + addresses))
}

/// Fills `header`, which has exactly the needed length. Returns the position of the checksum, if there
/// is one; its four bytes are still zero. `None` when something does not fit.
fn write(command: &Command, tlvs: &[Tlv<'_>], header: &mut [u8]) -> Option<Option<usize>> {
    let length = u16::try_from(header.len().checked_sub(FIXED_LEN)?).ok()?;
    let mut checksum_at = None;

    let mut out = Writer::new(header);
    out.put(&SIGNATURE)?;
    match command {
        Command::Local => {
            out.put(&[LOCAL, UNSPEC])?;
            out.put(&length.to_be_bytes())?;
        }
        Command::Proxy(addresses) => write_addresses(&addresses.normalised(), length, &mut out)?,
    }
    for tlv in tlvs {
        let value = tlv.value();
        out.put(&[tlv.kind()])?;
        out.put(&u16::try_from(value.len()).ok()?.to_be_bytes())?;
        match value {
            Value::Bytes(bytes) => out.put(bytes)?,
            Value::Zeros(count) => out.put_zeros(count)?,
            Value::Checksum => {
                checksum_at = Some(out.len());
                out.put_zeros(checksum::LEN)?;
            }
        }
    }
    Some(checksum_at)
}

/// Everything between the signature and the TLVs.
fn write_addresses(addresses: &Addresses, length: u16, out: &mut Writer<'_>) -> Option<()> {
    match addresses {
        Addresses::V4 { source, destination } => {
            out.put(&[PROXY, TCP_V4])?;
            out.put(&length.to_be_bytes())?;
            out.put(&source.ip().octets())?;
            out.put(&destination.ip().octets())?;
        }
        Addresses::V6 { source, destination } => {
            out.put(&[PROXY, TCP_V6])?;
            out.put(&length.to_be_bytes())?;
            out.put(&source.ip().octets())?;
            out.put(&destination.ip().octets())?;
        }
    }
    out.put(&addresses.source().port().to_be_bytes())?;
    out.put(&addresses.destination().port().to_be_bytes())
}

/// Parses an input that starts with the signature.
pub(super) fn parse(input: &[u8]) -> Result<Parsed<'_>, ParseError> {
    let Some((fixed, _)) = input.split_first_chunk::<FIXED_LEN>() else {
        return Err(ParseError::Incomplete { needed: FIXED_LEN });
    };
    let &[.., version_command, family, high, low] = fixed;
    if version_command >> 4 != VERSION {
        return Err(ParseError::Version { found: version_command >> 4 });
    }
    let length = usize::from(u16::from_be_bytes([high, low]));
    let len = FIXED_LEN + length;

    // Errors in the fixed bytes are reported before the rest has arrived.
    let layout = match (version_command, family) {
        (LOCAL, _) => Layout::Ignored(Announced::Local),
        (PROXY, UNSPEC) => Layout::Ignored(Announced::Unknown),
        (PROXY, TCP_V4) => Layout::V4,
        (PROXY, TCP_V6) => Layout::V6,
        (PROXY, UDP_V4 | UDP_V6 | UNIX_STREAM | UNIX_DGRAM) => {
            return Err(ParseError::NotTcp { found: family });
        }
        (PROXY, _) => return Err(ParseError::Family { found: family }),
        (other, _) => return Err(ParseError::Command { found: other & 0x0F }),
    };
    let address_len = layout.address_len();
    let too_short = ParseError::AddressBlock { length, needed: address_len };
    if length < address_len {
        return Err(too_short);
    }

    let header = input.get(..len).ok_or(ParseError::Incomplete { needed: len })?;
    let (addresses, behind) =
        header.get(FIXED_LEN..).and_then(|block| block.split_at_checked(address_len)).ok_or(too_short)?;
    let (command, tlvs) = match layout {
        Layout::Ignored(command) => (command, read_ignored(header, behind)?),
        Layout::V4 | Layout::V6 => {
            let addresses = read_addresses(addresses).ok_or(too_short)?;
            (Announced::Proxy(addresses), read_tlvs(header, behind, FIXED_LEN + address_len)?)
        }
    };
    Ok(Parsed { version: Version::Two, command, tlvs, len })
}

/// The layout of what follows the fixed bytes.
enum Layout {
    V4,
    V6,
    /// A block without meaning.
    Ignored(Announced),
}

impl Layout {
    fn address_len(&self) -> usize {
        match self {
            Self::V4 => V4_LEN,
            Self::V6 => V6_LEN,
            Self::Ignored(_) => 0,
        }
    }
}

/// Reads both addresses from a block that has exactly the length of one family's addresses.
fn read_addresses(block: &[u8]) -> Option<Addresses> {
    let (ips, &[a, b, c, d]) = block.split_last_chunk()?;
    let (source_port, destination_port) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));

    let (source, destination) = ips.split_at_checked(ips.len() / 2)?;
    Some(Addresses::new(
        SocketAddr::new(read_ip(source)?, source_port),
        SocketAddr::new(read_ip(destination)?, destination_port),
    ))
}

fn read_ip(octets: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(octets) {
        return Some(octets.into());
    }
    <[u8; 16]>::try_from(octets).ok().map(IpAddr::from)
}

/// The TLVs in `block`, which starts at byte `offset` of `header`. Each is valid, and so is the checksum,
/// if there is one.
fn read_tlvs<'a>(header: &'a [u8], block: &'a [u8], offset: usize) -> Result<Tlvs<'a>, ParseError> {
    let tlvs = Tlvs::new(block, offset);
    let mut checksum_tlv = None;
    for tlv in tlvs.clone() {
        let tlv = tlv?;
        if tlv.kind == kind::CRC32C {
            checksum_tlv = Some(tlv);
        }
    }
    if let Some(tlv) = checksum_tlv
        && let Ok(sent) = <[u8; checksum::LEN]>::try_from(tlv.value)
        && let Some(computed) = checksum::of(header, tlv.value_offset())
    {
        let sent = u32::from_be_bytes(sent);
        if sent != computed {
            return Err(ParseError::Checksum { sent, computed });
        }
    }
    Ok(tlvs)
}

/// The TLVs of a header without addresses.
///
/// A receiver ignores its family and discards its block (section 2.2), so the block cannot make the
/// header invalid. The specification does not say where TLVs would start. Real senders (see the captured
/// header in the tests) start them at byte 16 even with an IPv4 family. So a block that parses as TLVs
/// from there is read as TLVs, and its checksum is verified; any other block is skipped.
fn read_ignored<'a>(header: &'a [u8], block: &'a [u8]) -> Result<Tlvs<'a>, ParseError> {
    match read_tlvs(header, block, FIXED_LEN) {
        Err(ParseError::Checksum { sent, computed }) => Err(ParseError::Checksum { sent, computed }),
        Err(_) => Ok(Tlvs::none()),
        read => read,
    }
}
