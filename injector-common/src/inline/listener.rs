//! Listeners and backends, as the daemon gives them to the program.

/// A listener (map `LISTENERS`, by address; the address may be unspecified).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Listener {
    /// Its place in `TEMPLATES` and `USAGE`, from 1 on. A name keeps its id while any flow of it lives.
    pub id: u32,
    /// Its tables in `BACKEND_TABLES`, for IPv4 and IPv6; 0 if no backend gets connections, so that they go to the socket.
    pub tables: [u32; 2],
    /// The timeouts of its connections.
    pub timeouts: Timeouts,
}

/// After how many seconds without a packet a connection is over.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// While both sides may send.
    pub idle: u32,
    /// Once one side has finished.
    pub half_closed: u32,
    /// Once the backend has finished and the client has acknowledged all of it. Not longer than `half_closed`.
    pub client_fin: u32,
}

/// A backend (map `BACKENDS`, at an index that the tables contain).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backend {
    /// Its PROXY port: IPv4 in the first word, in network order.
    pub ip: [u32; 4],
    /// The port, in the host's byte order.
    pub port: u16,
    /// How many of `SOURCES` are this backend's; 0 to keep the client's address and port.
    pub sources: u16,
    /// The first of them.
    pub first_source: u32,
}

/// Which backend each client gets (map `BACKEND_TABLES`): indices of `BACKENDS`. A table is written while no listener uses it; one
/// write of the [`Listener`] then switches to it.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendTable {
    /// The first [`BackendTable::SIZE`].
    pub backends: [u16; Self::PLACES],
}

impl BackendTable {
    /// Entries: a prime, and so many that weights come out within one percent for up to 40 backends.
    pub const SIZE: u32 = 4093;
    /// What there is room for: a whole number of pages.
    pub const PLACES: usize = 4096;
    /// How many tables there are: two for each family of each listener, and the first one, which is never used.
    pub const COUNT: u32 = (super::Usage::COUNT - 1) * 4 + 1;

    /// The entry of a client. Any edge with the same configuration chooses the same.
    #[must_use]
    #[inline(always)]
    pub fn entry(client: [u32; 4], port: u16) -> u32 {
        client.iter().fold(mix(u32::from(port)), |hash, word| mix(hash ^ word.to_be())) % Self::SIZE
    }
}

/// How many backends and how many source addresses there may be.
pub const MAX_BACKENDS: u32 = 1024;

/// What the search for a source port of a client begins with.
#[must_use]
#[inline(always)]
pub fn port_hash(client: [u32; 4], port: u16) -> u32 {
    client.iter().fold(u32::from(port) ^ 0x9E37_79B9, |hash, word| mix(hash ^ word.to_be()))
}

/// The number of the port to try, of those that are left to the engine. An odd step reaches all of them.
#[must_use]
#[inline(always)]
pub const fn port_probe(hash: u32, attempt: u32) -> u32 {
    hash.wrapping_add((mix(hash) | 1).wrapping_mul(attempt))
}

/// Mixes the bits of a word (the finalizer of MurmurHash3).
#[must_use]
#[inline(always)]
pub const fn mix(mut word: u32) -> u32 {
    word ^= word >> 16;
    word = word.wrapping_mul(0x85EB_CA6B);
    word ^= word >> 13;
    word = word.wrapping_mul(0xC2B2_AE35);
    word ^ word >> 16
}

/// The ports that the program may use towards backends (map `SETTINGS`): all from 1024 on but those that the host's own sockets
/// get (`net.ipv4.ip_local_port_range`).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortRange {
    /// The first port of the host's sockets.
    pub host_first: u16,
    /// The last.
    pub host_last: u16,
}

impl PortRange {
    const FIRST: u32 = 1024;

    /// How many ports are left.
    #[must_use]
    #[inline(always)]
    pub const fn count(self) -> u32 {
        ((1 << 16) - Self::FIRST).saturating_sub(self.host_last as u32 + 1 - self.host_first as u32)
    }

    /// Whether this port is one of them.
    #[must_use]
    #[inline(always)]
    pub const fn contains(self, port: u16) -> bool {
        port as u32 >= Self::FIRST && (port < self.host_first || port > self.host_last)
    }

    /// The port with this number among them; 0 if there is none.
    #[must_use]
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "below 2^16 by `count`")]
    pub const fn port(self, number: u32) -> u16 {
        let count = self.count();
        if count == 0 {
            return 0;
        }
        let port = Self::FIRST + number % count;
        if port < self.host_first as u32 {
            port as u16
        } else {
            (port + self.host_last as u32 + 1 - self.host_first as u32) as u16
        }
    }

    /// The range without the host's; `None` if too little is left of either side to tell them apart.
    #[must_use]
    pub const fn new(host_first: u16, host_last: u16) -> Option<Self> {
        let range = Self { host_first, host_last };
        if host_first as u32 >= Self::FIRST && host_first <= host_last && range.count() >= 1024 {
            Some(range)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    extern crate std;

    #[test]
    fn every_port_outside_the_hosts_range_is_one() {
        for (first, last) in [(32768, 60999), (1024, 60000), (10_000, 65_535), (2000, 2000)] {
            let range = PortRange::new(first, last).unwrap();
            let ports: HashSet<_> = (0..range.count()).map(|number| range.port(number)).collect();
            assert_eq!(ports.len(), range.count() as usize);
            assert!(ports.iter().all(|port| range.contains(*port)));
            assert!(!range.contains(first) && !range.contains(last) && !range.contains(80));
        }
        for (first, last) in [(80, 90), (5000, 4000), (1024, 65_000)] {
            assert_eq!(PortRange::new(first, last), None);
        }
    }

    #[test]
    fn probes_reach_many_ports() {
        let range = PortRange::new(32768, 60999).unwrap();
        let probes: HashSet<_> = (0..1000)
            .map(|attempt| range.port(port_probe(port_hash([1, 2, 3, 4], 40_000), attempt)))
            .collect();
        assert!(probes.len() > 950, "{}", probes.len());
    }

    #[test]
    fn clients_spread_over_a_table() {
        let mut hits = [0_u32; 16];
        for client in 0..4096_u32 {
            let entry = BackendTable::entry([0, 0, 0, client.to_be()], 40_000);
            hits[(entry * 16 / BackendTable::SIZE) as usize] += 1;
        }
        assert!(hits.iter().all(|hits| (180..=332).contains(hits)), "{hits:?}");
    }
}
