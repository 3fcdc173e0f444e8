//! Detects clients that send a PROXY header.

use super::{SIGNATURE, v1};

/// Whether a public client's first bytes are a forged header.
///
/// Behind the injector's header a forged one has no effect, because only the first header counts. But an
/// honest mail client never starts like this, and a backend that accepts bare connections would believe
/// the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgery {
    /// The bytes do not start a header.
    No,
    /// The bytes are a prefix of a signature: read more before deciding.
    Undecided,
    /// The client starts with a PROXY signature: reject it.
    Yes,
}

/// Judges the first bytes of a client, of any number.
///
/// A version 1 header starts with `PROXY` and a space, in capitals; a version 2 header with its twelve
/// bytes. Twelve bytes are always enough to decide.
pub fn forgery(first: &[u8]) -> Forgery {
    let signatures: [&[u8]; 2] = [&SIGNATURE, v1::SIGNATURE];
    if signatures.iter().any(|signature| first.starts_with(signature)) {
        Forgery::Yes
    } else if signatures.iter().any(|signature| signature.starts_with(first)) {
        Forgery::Undecided
    } else {
        Forgery::No
    }
}
