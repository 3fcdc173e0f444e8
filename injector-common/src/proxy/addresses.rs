//! The source and destination of the client's connection.

use core::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

/// The source and destination of the client's connection, in the one family that a header can have.
///
/// The destination is the address that the client connected to, not the backend's. [`Addresses::new`]
/// makes an IPv4 client of a dual-stack listener IPv4: Dovecot and others compare `::ffff:a.b.c.d`
/// literally with their lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// Both ends are IPv4.
    V4 {
        /// The client.
        source: SocketAddrV4,
        /// Where the client connected to.
        destination: SocketAddrV4,
    },
    /// At least one end is IPv6; an IPv4 end is mapped, as `::ffff:a.b.c.d` (RFC 4291, section 2.5.5.2).
    /// The protocol does not carry scope and flow label; they are zero.
    V6 {
        /// The client.
        source: SocketAddrV6,
        /// Where the client connected to.
        destination: SocketAddrV6,
    },
}

impl Addresses {
    /// Normalises a pair of socket addresses: IPv4 where both ends are IPv4 (mapped or plain), IPv6 otherwise.
    pub fn new(source: SocketAddr, destination: SocketAddr) -> Self {
        match (as_v4(source), as_v4(destination)) {
            (Some(source), Some(destination)) => Self::V4 { source, destination },
            _ => Self::V6 { source: as_v6(source), destination: as_v6(destination) },
        }
    }

    /// The client's address and port.
    pub fn source(&self) -> SocketAddr {
        match *self {
            Self::V4 { source, .. } => source.into(),
            Self::V6 { source, .. } => source.into(),
        }
    }

    /// The address and port the client connected to.
    pub fn destination(&self) -> SocketAddr {
        match *self {
            Self::V4 { destination, .. } => destination.into(),
            Self::V6 { destination, .. } => destination.into(),
        }
    }

    /// Normalises a value whose variant the caller chose.
    pub(super) fn normalised(&self) -> Self {
        Self::new(self.source(), self.destination())
    }
}

fn as_v4(address: SocketAddr) -> Option<SocketAddrV4> {
    let ip: Ipv4Addr = match address {
        SocketAddr::V4(address) => return Some(address),
        SocketAddr::V6(address) => address.ip().to_ipv4_mapped()?,
    };
    Some(SocketAddrV4::new(ip, address.port()))
}

fn as_v6(address: SocketAddr) -> SocketAddrV6 {
    let ip: Ipv6Addr = match address {
        SocketAddr::V4(address) => address.ip().to_ipv6_mapped(),
        SocketAddr::V6(address) => *address.ip(),
    };
    SocketAddrV6::new(ip, address.port(), 0, 0)
}
