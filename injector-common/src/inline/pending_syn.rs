//! What ties a client's SYN at ingress to the same SYN at egress.

use super::HeaderAddresses;
use crate::SeqNumber;

/// A client's SYN on its way through this host (map `SYN_CACHE`): what NAT is about to hide.
///
/// The packet carries the slot's [token](PendingSyn::token) from ingress to egress, in `skb->tc_index`, which neither forwarding nor NAT
/// nor reassembly writes. So a slot is that packet's and no other's: a SYN that was not read at ingress has no token, whatever its
/// numbers are. Somebody who floods with SYNs until a slot is used again can at most have a SYN dropped, which is then
/// sent again.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PendingSyn {
    /// `CLOCK_MONOTONIC` in nanoseconds; 0 if the slot is empty.
    pub at_ns: u64,
    /// The SYN's sequence number.
    pub sequence: SeqNumber,
    /// Which listener it is for; [`PendingSyn::DISPUTED`] if two clients claim the slot and the number.
    pub listener: u32,
    /// The client, and where it connected to.
    pub addresses: HeaderAddresses,
}

impl PendingSyn {
    /// In place of a listener: the slot was used again while its SYN was under way, for one with the same number. None of them
    /// passes.
    pub const DISPUTED: u32 = u32::MAX;
    /// Slots of all processors.
    pub const COUNT: u32 = Self::PROCESSORS * Self::EACH + 1;
    /// Processors with slots of their own; others share with one of them.
    const PROCESSORS: u32 = 64;
    /// Slots of each.
    const EACH: u32 = 1023;
    /// How long a packet may take from ingress to egress: longer than the kernel waits for a neighbour's address (three seconds:
    /// `mcast_solicit` times `retrans_time_ms`, Documentation/networking/ip-sysctl.rst).
    pub(super) const FRESH_NS: u64 = 5_000_000_000;

    /// Which slot the SYN with this number, of all that this processor has seen, uses. Never 0, which a packet has that was not
    /// seen: that slot stays empty.
    #[must_use]
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "less than COUNT, which fits")]
    pub const fn token(processor: u32, number: u32) -> u16 {
        ((number % Self::EACH) * Self::PROCESSORS + processor % Self::PROCESSORS + 1) as u16
    }

    /// Takes the slot for a SYN with this sequence number that leaves now, once.
    #[inline(always)]
    pub fn take(&mut self, sequence: SeqNumber, now_ns: u64) -> bool {
        let fits = self.fits(sequence, now_ns);
        if fits {
            self.at_ns = 0;
        }
        fits
    }

    /// Whether this is the slot of a SYN with this sequence number that leaves now.
    #[must_use]
    #[inline(always)]
    pub fn fits(&self, sequence: SeqNumber, now_ns: u64) -> bool {
        self.listener != Self::DISPUTED && self.waits_for(sequence, now_ns)
    }

    #[inline(always)]
    fn waits_for(&self, sequence: SeqNumber, now_ns: u64) -> bool {
        self.at_ns != 0 && self.sequence == sequence && now_ns.wrapping_sub(self.at_ns) <= Self::FRESH_NS
    }

    /// Stores a SYN. While another one with the same number has not left, both are disputed.
    #[inline(always)]
    pub fn store(&mut self, sequence: SeqNumber, listener: u32, addresses: &HeaderAddresses, now_ns: u64) {
        let disputed = self.waits_for(sequence, now_ns)
            && (self.listener == Self::DISPUTED || !self.addresses.same(addresses));
        self.at_ns = now_ns;
        self.sequence = sequence;
        self.listener = if disputed { Self::DISPUTED } else { listener };
        self.addresses = *addresses;
    }
}

const _: () = assert!(PendingSyn::COUNT <= u16::MAX as u32 + 1);
