//! Encodes the PROXY header of one connection in the format that its receiver expects.

use std::net::SocketAddr;

use injector_common::proxy::{self, Addresses, Command, EncodeError, Tlv};

use crate::config::{ProxyVersion, Receiver, UNIQUE_ID_LEN};

/// An encoded header.
#[derive(Clone, Debug)]
pub struct EncodedHeader {
    bytes: [u8; proxy::MAX_LEN],
    len: usize,
}

impl EncodedHeader {
    /// The header for a client at `source` that connected to `destination`. It includes `unique_id`
    /// if the receiver is configured for it.
    ///
    /// # Errors
    /// If it exceeds the receiver's limit; a checked configuration excludes that.
    pub fn new(
        receiver: &Receiver,
        source: SocketAddr,
        destination: SocketAddr,
        unique_id: &[u8; UNIQUE_ID_LEN],
    ) -> Result<Self, EncodeError> {
        let addresses = Addresses::new(source, destination);
        let mut bytes = [0; proxy::MAX_LEN];
        let len = match receiver.version {
            ProxyVersion::V1 => proxy::v1::encode(&addresses, &mut bytes)?,
            ProxyVersion::V2 => {
                let limit = receiver.max_header.min(proxy::MAX_LEN);
                let room = bytes.get_mut(..limit).unwrap_or_default();
                proxy::v2::encode(&Command::Proxy(addresses), &tlvs(receiver, unique_id), room)?
            }
        };
        Ok(Self { bytes, len })
    }

    /// The bytes of the header.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

fn tlvs<'a>(receiver: &'a Receiver, unique_id: &'a [u8; UNIQUE_ID_LEN]) -> Vec<Tlv<'a>> {
    let mut tlvs = Vec::new();
    if let Some(authority) = &receiver.authority {
        tlvs.push(Tlv::Authority(authority.as_bytes()));
    }
    if receiver.unique_id {
        tlvs.push(Tlv::UniqueId(unique_id));
    }
    tlvs.extend(receiver.custom.iter().map(|custom| Tlv::Custom { kind: custom.kind, value: &custom.value }));
    if let Some(length) = receiver.noop {
        tlvs.push(Tlv::Noop(length));
    }
    if receiver.crc32c {
        tlvs.push(Tlv::Crc32c);
    }
    tlvs
}

#[cfg(test)]
mod tests {
    use injector_common::proxy::{Version, parse};

    use super::*;
    use crate::config::CustomTlv;

    const ID: [u8; UNIQUE_ID_LEN] = *b"0123456789abcdef0123456789abcdef";

    fn rendered(receiver: &Receiver) -> EncodedHeader {
        let (source, destination) = ("198.51.100.7:40000".parse().unwrap(), "192.0.2.10:25".parse().unwrap());
        EncodedHeader::new(receiver, source, destination, &ID).unwrap()
    }

    #[test]
    fn the_default_is_28_bytes_without_tlvs() {
        let header = rendered(&Receiver::default());
        assert_eq!(header.as_bytes().len(), 28);
        let parsed = parse(header.as_bytes()).unwrap();
        assert_eq!(parsed.version, Version::Two);
        assert_eq!(parsed.tlvs.count(), 0);
    }

    #[test]
    fn every_tlv_of_the_profile_is_sent() {
        let receiver = Receiver {
            crc32c: true,
            unique_id: true,
            authority: Some("mail.example".to_owned()),
            noop: Some(5),
            custom: vec![CustomTlv { kind: 0xE1, value: b"edge".to_vec() }],
            ..Receiver::default()
        };
        let header = rendered(&receiver);
        let parsed = parse(header.as_bytes()).unwrap();
        assert!(parsed.is_checksummed());
        assert_eq!(parsed.tlv(0x02), Some(&b"mail.example"[..]));
        assert_eq!(parsed.tlv(0x05), Some(&ID[..]));
        assert_eq!(parsed.tlv(0xE1), Some(&b"edge"[..]));
        assert_eq!(parsed.tlv(0x04), Some(&[0; 5][..]));
    }

    #[test]
    fn version_1_is_text() {
        let header = rendered(&Receiver { version: ProxyVersion::V1, ..Receiver::default() });
        assert_eq!(header.as_bytes(), b"PROXY TCP4 198.51.100.7 192.0.2.10 40000 25\r\n");
    }
}
