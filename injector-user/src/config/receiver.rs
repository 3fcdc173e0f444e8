//! `[listener.receiver]`: the header format that the backend expects, checked for consistency.

use std::fmt;

use injector_common::inline::HEADER_CAPACITY;

use super::parse::{
    address,
    section::{Section, Spanned},
};

/// Bytes of a unique id. The PROXY protocol allows 128 (section 2.2.5). These are 128 bits in
/// hexadecimal, so that one text is found in the logs of the injector and of the backend.
pub const UNIQUE_ID_LEN: usize = 32;

/// A v2 header with IPv6 addresses and no TLVs, the longest without TLVs (section 2.2).
const HEADER_WITHOUT_TLVS: usize = 16 + 36;
/// Type and length of a TLV (section 2.2).
const TLV_OVERHEAD: usize = 3;
/// Every receiver reads this much at once.
const DEFAULT_MAX_HEADER: usize = 232;
/// The design limit of the specification (section 2.2), and the most that Postfix reads.
const MAX_HEADER: usize = 536;

const VERSIONS: [(&str, ProxyVersion); 2] = [("v1", ProxyVersion::V1), ("v2", ProxyVersion::V2)];

/// `[listener.receiver]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receiver {
    /// Version of the header.
    pub version: ProxyVersion,
    /// The maximum length of a v2 header in bytes, 52 to 536. Every header of this listener fits,
    /// with IPv4 and IPv6 addresses.
    pub max_header: usize,
    /// Add a `PP2_TYPE_CRC32C`.
    pub crc32c: bool,
    /// Add a `PP2_TYPE_UNIQUE_ID` of [`UNIQUE_ID_LEN`] bytes.
    pub unique_id: bool,
    /// Add a `PP2_TYPE_AUTHORITY` with this host name.
    pub authority: Option<String>,
    /// Add a `PP2_TYPE_NOOP` whose value is this many zero bytes; at least 1.
    pub noop: Option<u16>,
    /// Further TLVs, of distinct kinds, none of them empty.
    pub custom: Vec<CustomTlv>,
}

/// Version of the PROXY protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProxyVersion {
    /// Text, without TLVs, for receivers that support nothing else.
    V1,
    /// Binary.
    #[default]
    V2,
}

/// A TLV whose meaning the backend's administrator defines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CustomTlv {
    /// `PP2_TYPE_MIN_CUSTOM` to `PP2_TYPE_MAX_CUSTOM`: 0xE0 to 0xEF (PROXY protocol, section
    /// 2.2.7).
    pub kind: u8,
    /// At least one byte.
    pub value: Vec<u8>,
}

impl fmt::Display for ProxyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

impl Default for Receiver {
    fn default() -> Self {
        Self {
            version: ProxyVersion::V2,
            max_header: DEFAULT_MAX_HEADER,
            crc32c: false,
            unique_id: false,
            authority: None,
            noop: None,
            custom: Vec::new(),
        }
    }
}

impl Receiver {
    /// The length of the longest header for this receiver. With v1 it is the limit of the
    /// specification (section 2.1, without the final zero), with v2 that of an IPv6 client.
    pub fn max_header_len(&self) -> usize {
        if self.version == ProxyVersion::V1 {
            return 107;
        }
        let tlv = |value: usize| TLV_OVERHEAD + value;
        HEADER_WITHOUT_TLVS
            + if self.crc32c { tlv(4) } else { 0 }
            + if self.unique_id { tlv(UNIQUE_ID_LEN) } else { 0 }
            + self.authority.as_ref().map_or(0, |name| tlv(name.len()))
            + self.noop.map_or(0, |length| tlv(usize::from(length)))
            + self.custom.iter().map(|custom| tlv(custom.value.len())).sum::<usize>()
    }
}

impl Receiver {
    /// Why inline cannot make this header: it only fills in addresses.
    pub(super) fn inline_obstacle(&self) -> Option<String> {
        for (set, what) in [
            (self.version == ProxyVersion::V1, "version = \"v1\""),
            (self.crc32c, "crc32c"),
            (self.unique_id, "unique_id"),
        ] {
            if set {
                return Some(format!(
                    "cannot make the header for each connection, which receiver.{what} needs: remove it, or use \
                     engine splice"
                ));
            }
        }
        // Padded to the alignment that the checksum needs, by a TLV if there is none to lengthen.
        let len = self.max_header_len();
        let padding = if len.is_multiple_of(4) || self.noop.is_some() { 0 } else { 4 };
        let len = len.next_multiple_of(4) + padding;
        (len > HEADER_CAPACITY).then(|| {
            format!(
                "takes headers of at most {HEADER_CAPACITY} bytes, and this one has {len}: use engine splice"
            )
        })
    }
}

/// Reads the section and reports what is wrong.
pub(super) fn read(section: Option<Section<'_>>) -> Receiver {
    let default = Receiver::default();
    let Some(section) = section else { return default };
    let version = section.choice("version", &VERSIONS).unwrap_or_default();
    let max_header = section.integer("max_header", HEADER_WITHOUT_TLVS as u64, MAX_HEADER as u64);
    let crc32c = section.flag("crc32c");
    let unique_id = section.flag("unique_id");
    let authority = section.string("authority");
    let noop = section.integer("noop", 1, MAX_HEADER as u64);
    let custom = section.sections("custom");
    if version == ProxyVersion::V1 {
        for (field, at) in [
            ("max_header", max_header.map(|(at, _)| at)),
            ("crc32c", set(crc32c)),
            ("unique_id", set(unique_id)),
            ("authority", authority.map(|(at, _)| at)),
            ("noop", noop.map(|(at, _)| at)),
            ("custom", custom.as_ref().and_then(|all| all.first()).map(Section::at)),
        ] {
            if let Some(at) = at {
                section.report_field(
                    at,
                    field,
                    ": a v1 header is one line of text without TLVs: remove it or use v2",
                );
            }
        }
    }
    let receiver = Receiver {
        version,
        max_header: max_header.and_then(|(_, max)| usize::try_from(max).ok()).unwrap_or(default.max_header),
        crc32c: crc32c.is_some_and(|(_, on)| on),
        unique_id: unique_id.is_some_and(|(_, on)| on),
        authority: authority.and_then(|(at, name)| read_authority(&section, at, name)),
        noop: noop.and_then(|(_, length)| u16::try_from(length).ok()),
        custom: read_custom(custom.unwrap_or_default()),
    };
    reject_too_long(&section, &receiver);
    section.finish();
    receiver
}

fn reject_too_long(section: &Section<'_>, receiver: &Receiver) {
    let (longest, max) = (receiver.max_header_len(), receiver.max_header);
    if receiver.version == ProxyVersion::V1 || longest <= max {
        return;
    }
    let raise = ", or raise max_header if the receiver reads that much at once";
    let raise = if longest <= MAX_HEADER { raise } else { "" };
    section.report(
        section.at(),
        format!(
            "receiver: the header would be {longest} bytes for a client over IPv6, more than max_header = \
             {max}: leave out TLVs{raise}"
        ),
    );
}

fn set(flag: Option<Spanned<bool>>) -> Option<usize> {
    flag.filter(|(_, on)| *on).map(|(at, _)| at)
}

fn read_authority(section: &Section<'_>, at: usize, name: &str) -> Option<String> {
    match address::host_name(name) {
        Ok(name) => Some(name),
        Err(what) => {
            // Dovecot disconnects if the host name is invalid.
            section.report_field(at, "authority", &format!(": {what}"));
            None
        }
    }
}

fn read_custom(sections: Vec<Section<'_>>) -> Vec<CustomTlv> {
    let mut all: Vec<CustomTlv> = Vec::new();
    for section in sections {
        let kind = section.required("kind", read_kind);
        let value = read_value(&section);
        if let Some((at, kind)) = kind
            && all.iter().any(|other| other.kind == kind)
        {
            section.report_field(at, "kind", &format!(" {kind:#X}: given twice"));
        }
        section.finish();
        all.extend(kind.zip(value).map(|((_, kind), value)| CustomTlv { kind, value }));
    }
    all
}

fn read_kind(section: &Section<'_>, field: &'static str) -> Option<Spanned<u8>> {
    let (at, number) = section.integer(field, 0, u64::MAX)?;
    let kind = u8::try_from(number).ok().filter(|kind| (0xE0..=0xEF).contains(kind));
    if kind.is_none() {
        section.report_field(at, field, &format!(" {number:#X}: must be 0xE0 to 0xEF"));
    }
    Some((at, kind?))
}

fn read_value(section: &Section<'_>) -> Option<Vec<u8>> {
    let text = section.string("value");
    let hex = section.string("hex");
    let (at, field, value) = match (text, hex) {
        (Some((at, text)), None) => (at, "value", text.as_bytes().to_vec()),
        (None, Some((at, hex))) => (at, "hex", read_hex(section, at, hex)?),
        (Some(_), Some((at, _))) => {
            section.report_field(at, "hex", ": give either value or hex, not both");
            return None;
        }
        (None, None) => {
            if !section.has("value") && !section.has("hex") {
                section.report_field(section.at(), "value", " is missing (text; or hex for bytes)");
            }
            return None;
        }
    };
    if value.is_empty() {
        section.report_field(at, field, ": must not be empty");
    }
    Some(value)
}

fn read_hex(section: &Section<'_>, at: usize, hex: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        hex.chars().map(|digit| digit.to_digit(16).and_then(|digit| u8::try_from(digit).ok())).collect();
    let bytes = digits.filter(|digits| digits.len().is_multiple_of(2)).map(|digits| {
        digits.chunks_exact(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect()
    });
    if bytes.is_none() {
        section.report_field(
            at,
            "hex",
            &format!(" {hex:?}: must be pairs of hexadecimal digits, such as \"c0ffee\""),
        );
    }
    bytes
}
