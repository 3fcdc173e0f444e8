//! Addresses, as maps and headers have them.

/// An address with a port. Its alignment has the programs write it by words.
#[repr(C, align(4))]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Address {
    /// IPv6, or IPv4 mapped into it.
    pub ip: [u8; 16],
    /// The port.
    pub port: u16,
    /// Makes the size a multiple of four.
    pub reserved: u16,
}

impl Address {
    /// An address.
    #[must_use]
    #[inline(always)]
    pub const fn new(ip: [u8; 16], port: u16) -> Self {
        Self { ip, port, reserved: 0 }
    }

    /// Makes it `a.b.c.d`, in network order, if no other than IPv4 addresses were in it before: what is zero in all of them stays.
    #[inline(always)]
    pub const fn set_mapped(&mut self, ip: u32) {
        let [.., ff, fe, a, b, c, d] = &mut self.ip;
        (*ff, *fe) = (0xFF, 0xFF);
        [*a, *b, *c, *d] = ip.to_ne_bytes();
    }

    /// Makes it IPv6, of words in network order.
    #[inline(always)]
    pub const fn set(&mut self, ip: [u32; 4]) {
        let (words, _) = self.ip.as_chunks_mut::<4>();
        let [w0, w1, w2, w3] = words else { return };
        *w0 = ip[0].to_ne_bytes();
        *w1 = ip[1].to_ne_bytes();
        *w2 = ip[2].to_ne_bytes();
        *w3 = ip[3].to_ne_bytes();
    }

    /// `a.b.c.d` as IPv6.
    #[must_use]
    #[inline(always)]
    pub const fn mapped(ip: [u8; 4]) -> [u8; 16] {
        let [a, b, c, d] = ip;
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, a, b, c, d]
    }
}

/// The addresses of a packet as it comes in (the key of the map `FLOWS`).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Key {
    /// Who sent it.
    pub source: Address,
    /// Whom it is sent to.
    pub destination: Address,
}

/// Source and destination as they stand in a packet, in network order.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tuple {
    /// The source; IPv4 in the first word.
    pub source: [u32; 4],
    /// The destination.
    pub destination: [u32; 4],
    /// The source's port and the destination's, as a TCP header begins.
    pub ports: u32,
    /// 1 for IPv6, 0 for IPv4.
    pub ipv6: u32,
}

impl Tuple {
    /// The ports, in the host's byte order, as a TCP header begins.
    #[must_use]
    #[inline(always)]
    pub const fn ports(source: u16, destination: u16) -> u32 {
        ((source as u32) << 16 | destination as u32).to_be()
    }

    /// The source's port.
    #[must_use]
    #[inline(always)]
    pub const fn source_port(&self) -> u16 {
        (u32::from_be(self.ports) >> 16) as u16
    }

    /// That of packets in the other direction.
    #[must_use]
    #[inline(always)]
    pub const fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            ports: self.ports.rotate_left(16),
            ipv6: self.ipv6,
        }
    }

    /// Makes a zeroed key that of packets in the other direction.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
    pub const fn reversed_key(&self, key: &mut Key) {
        let ports = u32::from_be(self.ports);
        let Key { source, destination } = key;
        if self.ipv6 == 0 {
            source.set_mapped(self.destination[0]);
            destination.set_mapped(self.source[0]);
        } else {
            source.set(self.destination);
            destination.set(self.source);
        }
        (destination.port, source.port) = ((ports >> 16) as u16, ports as u16);
    }

    /// Whether packets with these addresses are answers to packets with the others. Of IPv4 the first words are compared.
    #[must_use]
    #[inline(always)]
    pub const fn answers(&self, other: &Self) -> bool {
        let first = self.source[0] == other.destination[0]
            && self.destination[0] == other.source[0]
            && self.ports == other.ports.rotate_left(16)
            && self.ipv6 == other.ipv6;
        if self.ipv6 == 0 {
            return first;
        }
        first
            && self.source[1] == other.destination[1]
            && self.source[2] == other.destination[2]
            && self.source[3] == other.destination[3]
            && self.destination[1] == other.source[1]
            && self.destination[2] == other.source[2]
            && self.destination[3] == other.source[3]
    }

    /// The two addresses with their ports.
    #[must_use]
    pub fn read(&self) -> (Address, Address) {
        let mut key = Key::default();
        self.reversed_key(&mut key);
        (key.destination, key.source)
    }
}

/// The addresses of a header as they stand in it: the client's and the destination's, then their ports, in network order. In
/// a packet they stand in the same order.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeaderAddresses {
    /// The first [`HeaderAddresses::IPV4`] or all.
    pub bytes: [u8; Self::IPV6],
    /// 1 for IPv6, 0 for IPv4.
    pub ipv6: u32,
}

impl HeaderAddresses {
    /// Their length for IPv4.
    pub const IPV4: usize = 12;
    /// For IPv6.
    pub const IPV6: usize = 36;

    /// Whether they are equal: word by word, for programs have no function that compares memory.
    #[must_use]
    #[inline(always)]
    pub fn same(&self, other: &Self) -> bool {
        let (words, _) = self.bytes.as_chunks::<4>();
        let (others, _) = other.bytes.as_chunks::<4>();
        let differs =
            |(one, other): (&[u8; 4], &[u8; 4])| u32::from_ne_bytes(*one) ^ u32::from_ne_bytes(*other);
        self.ipv6 == other.ipv6 && words.iter().zip(others).map(differs).fold(0, |all, bits| all | bits) == 0
    }

    /// The client, and where it connected to; `None` if the ports are missing.
    #[must_use]
    pub fn read(&self) -> Option<(Address, Address)> {
        let (ips, ports) = self.bytes.split_at_checked(if self.ipv6 == 0 { 8 } else { 32 })?;
        let ip = |bytes: &[u8]| match bytes {
            [a, b, c, d] => Some(Address::mapped([*a, *b, *c, *d])),
            _ => bytes.try_into().ok(),
        };
        let (source, destination) = ips.split_at_checked(ips.len() / 2)?;
        let ([[sp0, sp1], [dp0, dp1], ..], _) = ports.as_chunks::<2>() else { return None };
        let client = Address::new(ip(source)?, u16::from_be_bytes([*sp0, *sp1]));
        Some((client, Address::new(ip(destination)?, u16::from_be_bytes([*dp0, *dp1]))))
    }
}

impl Default for HeaderAddresses {
    fn default() -> Self {
        Self { bytes: [0; Self::IPV6], ipv6: 0 }
    }
}
