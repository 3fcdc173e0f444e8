//! What ties a client's SYN at ingress to the same SYN at egress.

use super::HeaderAddresses;

/// A client's SYN on its way through this processor (map `SLOTS`): what NAT is about to hide.
///
/// Forwarding runs from ingress to egress on one processor, and a batch of packets that the driver hands over together
/// runs through each hook in turn; hence several slots a processor, found by the initial sequence number. Somebody who
/// hits a client's slot, or even its number, can at most have the client's SYN dropped, which is then sent again.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// `CLOCK_MONOTONIC` in nanoseconds; 0 if the slot is empty.
    pub at_ns: u64,
    /// The SYN's sequence number.
    pub sequence: u32,
    /// Which listener it is for; [`Slot::DISPUTED`] if two clients claim the number.
    pub listener: u32,
    /// The client, and where it connected to.
    pub addresses: HeaderAddresses,
}

impl Slot {
    /// In place of a listener: SYNs of one batch with the same number, but not of the same client. None of them passes.
    pub const DISPUTED: u32 = u32::MAX;
    /// Slots of a processor; a power of two.
    pub const COUNT: u32 = 256;
    /// How long a packet may take from ingress to egress.
    pub(super) const FRESH_NS: u64 = 50_000_000;

    /// Which slot a SYN with this sequence number uses.
    #[must_use]
    #[inline(always)]
    pub const fn index(sequence: u32) -> u32 {
        (sequence ^ (sequence >> 16)) & (Self::COUNT - 1)
    }

    /// Whether this is the slot of a SYN with this sequence number that leaves now.
    #[must_use]
    #[inline(always)]
    pub const fn fits(&self, sequence: u32, now_ns: u64) -> bool {
        self.listener != Self::DISPUTED && self.waits_for(sequence, now_ns)
    }

    #[inline(always)]
    const fn waits_for(&self, sequence: u32, now_ns: u64) -> bool {
        self.at_ns != 0 && self.sequence == sequence && now_ns.wrapping_sub(self.at_ns) <= Self::FRESH_NS
    }

    /// Remembers a SYN. While another client's with the same number has not left, neither is known any more.
    #[inline(always)]
    pub fn remember(&mut self, sequence: u32, listener: u32, addresses: &HeaderAddresses, now_ns: u64) {
        let disputed = self.waits_for(sequence, now_ns)
            && (self.listener == Self::DISPUTED || !self.addresses.same(addresses));
        self.at_ns = now_ns;
        self.sequence = sequence;
        self.listener = if disputed { Self::DISPUTED } else { listener };
        self.addresses = *addresses;
    }
}
