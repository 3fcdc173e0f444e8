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

/// A connection as it looks between the edge and the backend (the key of maps `PENDING` and `FLOWS`).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Key {
    /// Whom the backend takes for its client: the client, or the edge where it masquerades.
    pub source: Address,
    /// The backend.
    pub backend: Address,
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
