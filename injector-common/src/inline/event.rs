//! Events that the daemon receives, and the list that it gives to the program `sweep`.

use super::{Flow, Key};

/// What happened to a connection. The daemon reads these records from the ring buffer `EVENTS`.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// One of [`Event::ACKNOWLEDGED`] and those that follow it.
    pub kind: u32,
    /// Makes what follows start on a word's boundary.
    pub reserved: u32,
    /// Which connection.
    pub key: Key,
    /// Its state then.
    pub flow: Flow,
}

impl Event {
    /// The backend has the header.
    pub const ACKNOWLEDGED: u32 = 1;
    /// Both sides have finished, or one has reset.
    pub const ENDED: u32 = 2;
    /// The backend has refused the SYN. Its source address is not verified.
    pub const REFUSED: u32 = 3;
}

/// A connection that has ended. The daemon lists them in a packet that is never sent, for the program `sweep`.
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClosedFlow {
    /// Which connection,
    pub key: Key,
    /// and which of those that had the same ports ([`Flow::created_ns`]).
    pub created_ns: u64,
    /// [`Flow::last_ns`] as it was seen: where the connection had not ended, a later packet keeps it.
    pub last_ns: u64,
}

impl ClosedFlow {
    /// Where the first stands: behind the Ethernet header that the kernel asks for, on a word's boundary.
    pub const AT: usize = 16;
    /// So many to a packet. With what the kernel puts around it, that must fit into a page (bpf_test_init,
    /// net/bpf/test_run.c).
    pub const MOST: usize = 52;

    /// This one.
    #[must_use]
    pub const fn new(key: Key, flow: &Flow) -> Self {
        Self { key, created_ns: flow.created_ns, last_ns: flow.last_ns }
    }

    /// Whether this entry is that connection, and has ended or been silent since.
    #[must_use]
    #[inline(always)]
    pub const fn may_remove(&self, flow: &Flow) -> bool {
        flow.created_ns == self.created_ns && (flow.closed() || flow.last_ns == self.last_ns)
    }
}
