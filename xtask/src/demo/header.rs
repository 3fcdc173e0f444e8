//! Splits a PROXY header into fields, each with its meaning.

use std::net::SocketAddr;

use injector_common::proxy::{self, Announced, ParseError, SIGNATURE, Version, kind};

/// A run of bytes and its meaning.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// The bytes.
    pub(super) bytes: Vec<u8>,
    /// Their meaning.
    pub(super) meaning: String,
}

/// Splits a header into all of its bytes, in order. The meanings come from the parser.
///
/// # Errors
/// When it is not a complete header.
pub(super) fn fields(raw: &[u8]) -> Result<Vec<Field>, ParseError> {
    let parsed = proxy::parse(raw)?;
    let raw = raw.get(..parsed.len).unwrap_or(raw);
    if parsed.version == Version::One {
        let line = String::from_utf8_lossy(raw).trim_end().to_owned();
        return Ok(vec![Field { bytes: raw.to_vec(), meaning: format!("version 1: {line}") }]);
    }
    let mut cutter = Cutter { rest: raw, fields: Vec::new() };
    cutter.cut(SIGNATURE.len(), "signature");
    let command = if parsed.command == Announced::Local { "LOCAL" } else { "PROXY" };
    cutter.cut(1, &format!("version 2, command {command}"));
    let addresses = parsed.command.addresses();
    cutter.cut(1, addresses.map_or("no addresses", |both| family(both.source())));
    cutter.cut(2, &format!("{} bytes follow", raw.len().saturating_sub(16)));
    if let Some(both) = addresses {
        let (source, destination) = (both.source(), both.destination());
        let length = if source.is_ipv4() { 4 } else { 16 };
        cutter.cut(length, &format!("source       {}", source.ip()));
        cutter.cut(length, &format!("destination  {}", destination.ip()));
        cutter.cut(2, &format!("source port       {}", source.port()));
        cutter.cut(2, &format!("destination port  {}", destination.port()));
    }
    for tlv in parsed.tlvs.clone().flatten() {
        cutter.cut(3 + tlv.value.len(), &format!("TLV {}, {} bytes", tlv_name(tlv.kind), tlv.value.len()));
    }
    cutter.cut(cutter.rest.len(), "ignored");
    Ok(cutter.fields)
}

/// The rest of a header, and the fields that were cut off its front.
struct Cutter<'a> {
    rest: &'a [u8],
    fields: Vec<Field>,
}

impl Cutter<'_> {
    fn cut(&mut self, length: usize, meaning: &str) {
        let (bytes, rest) = self.rest.split_at(length.min(self.rest.len()));
        if !bytes.is_empty() {
            self.fields.push(Field { bytes: bytes.to_vec(), meaning: meaning.to_owned() });
        }
        self.rest = rest;
    }
}

fn family(source: SocketAddr) -> &'static str {
    if source.is_ipv4() { "TCP over IPv4" } else { "TCP over IPv6" }
}

fn tlv_name(number: u8) -> String {
    match number {
        kind::ALPN => "ALPN".to_owned(),
        kind::AUTHORITY => "AUTHORITY".to_owned(),
        kind::CRC32C => "CRC32C".to_owned(),
        kind::NOOP => "NOOP".to_owned(),
        kind::UNIQUE_ID => "UNIQUE_ID".to_owned(),
        other => format!("{other:#04x}"),
    }
}

#[cfg(test)]
mod tests {
    use injector_common::proxy::{Addresses, Command, Tlv, v1, v2};

    use super::*;

    fn addresses(source: &str, destination: &str) -> Addresses {
        Addresses::new(source.parse().unwrap(), destination.parse().unwrap())
    }

    #[test]
    fn fields_contain_every_byte() {
        let v4 = addresses("198.51.100.7:40000", "192.0.2.10:25");
        let v6 = addresses("[2001:db8:c::7]:40000", "[2001:db8:a::10]:25");
        let cases: [(Command, &[Tlv<'_>]); 4] = [
            (Command::Proxy(v4), &[]),
            (Command::Proxy(v6), &[]),
            (Command::Proxy(v4), &[Tlv::Crc32c, Tlv::UniqueId(b"a1")]),
            (Command::Local, &[]),
        ];
        for (command, tlvs) in cases {
            let mut buffer = [0; 128];
            let length = v2::encode(&command, tlvs, &mut buffer).unwrap();
            let fields = fields(&buffer[..length]).unwrap();
            assert_eq!(
                fields.iter().flat_map(|field| field.bytes.clone()).collect::<Vec<_>>(),
                buffer[..length]
            );
            assert!(!fields.iter().any(|field| field.meaning == "ignored"), "{fields:?}");
        }
    }

    #[test]
    fn addresses_stand_beside_their_own_bytes() {
        let mut buffer = [0; 28];
        let command = Command::Proxy(addresses("198.51.100.7:40000", "192.0.2.10:25"));
        v2::encode(&command, &[], &mut buffer).unwrap();
        let fields = fields(&buffer).unwrap();
        let meaning = |bytes: &[u8]| {
            fields.iter().find(|field| field.bytes == bytes).map(|field| field.meaning.as_str())
        };
        assert_eq!(meaning(&[198, 51, 100, 7]), Some("source       198.51.100.7"));
        assert_eq!(meaning(&[0x00, 0x19]), Some("destination port  25"));
        assert_eq!(meaning(&[0x21]), Some("version 2, command PROXY"));
    }

    #[test]
    fn version_1_is_shown_as_its_line() {
        let mut buffer = [0; v1::MAX_LEN];
        let length = v1::encode(&addresses("198.51.100.7:40000", "192.0.2.10:25"), &mut buffer).unwrap();
        let fields = fields(&buffer[..length]).unwrap();
        assert_eq!(fields[0].meaning, "version 1: PROXY TCP4 198.51.100.7 192.0.2.10 40000 25");
        assert_eq!(fields.len(), 1);
    }
}
