//! What a client's SYN says.

use super::HeaderAddresses;
use crate::SeqNumber;

/// A SYN for a listener, as it came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syn {
    /// The sequence number of the client's first byte: the SYN's own, plus one.
    pub first: SeqNumber,
    /// [`Listener::id`](super::Listener::id).
    pub listener: u32,
    /// The client, and where it connects to.
    pub addresses: HeaderAddresses,
}
