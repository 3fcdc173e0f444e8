//! The initial sequence numbers of connecting sockets' peers.

/// An entry of the map `PEER_ISNS`: the initial sequence number that a connecting socket's peer chose,
/// and which of the sockets that share the entry it belongs to. Both are in one word, so a reader never
/// sees half of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerIsn(pub u64);

impl PeerIsn {
    /// Entries of the map. The kernel assigns cookies in sequence, so an entry stays until about this
    /// many more sockets of the whole machine have got one. The daemon reads it right after it was
    /// written.
    pub const COUNT: u32 = 16 * 1024;

    /// The index of the entry of the socket with this cookie, below [`PeerIsn::COUNT`].
    #[must_use]
    pub const fn index(cookie: u64) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "less than COUNT")]
        let index = (cookie % Self::COUNT as u64) as u32;
        index
    }

    /// The entry of the socket with this cookie.
    #[must_use]
    pub const fn new(cookie: u64, sequence: u32) -> Self {
        Self(Self::generation(cookie) << 32 | sequence as u64)
    }

    /// The sequence number, if the entry belongs to the socket with this cookie.
    #[must_use]
    pub const fn sequence(self, cookie: u64) -> Option<u32> {
        #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
        let sequence = self.0 as u32;
        if self.0 >> 32 == Self::generation(cookie) { Some(sequence) } else { None }
    }

    /// Tells the sockets apart that share an entry. For the first 2^46 sockets it is never 0, which an
    /// unwritten entry has.
    const fn generation(cookie: u64) -> u64 {
        (cookie / Self::COUNT as u64 + 1) & u32::MAX as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_isn_belongs_to_one_of_the_sockets_that_share_its_entry() {
        let count = u64::from(PeerIsn::COUNT);
        for cookie in [1, count - 1, count, 7 * count + 1, u64::from(u32::MAX) * count - 1] {
            let entry = PeerIsn::new(cookie, 0xDEAD_BEEF);
            assert!(PeerIsn::index(cookie) < PeerIsn::COUNT);
            assert_eq!(entry.sequence(cookie), Some(0xDEAD_BEEF));
            let next = cookie + count;
            assert_eq!(PeerIsn::index(next), PeerIsn::index(cookie));
            assert_eq!(entry.sequence(next), None);
            // An unwritten entry.
            assert_eq!(PeerIsn(0).sequence(cookie), None);
        }
    }
}
