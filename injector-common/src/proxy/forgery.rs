//! Clients that bring a header of their own.

use super::{SIGNATURE, v1};

/// What the first bytes of a public client say about forging a header.
///
/// Whoever reaches a backend behind the injector's header would get nothing by it, for only the first header
/// counts. But no honest mail client opens like this, and a backend that stops reading headers would believe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgery {
    /// The bytes are no header's.
    No,
    /// So far a prefix of a signature: read more before deciding.
    Undecided,
    /// The client opens with a PROXY signature: refuse it.
    Yes,
}

/// Judges the first bytes of a client, however many have come.
///
/// A version 1 header is known by `PROXY` and the space behind it, in capitals as the specification has it; version
/// 2 by its twelve bytes. At most twelve bytes are needed to decide.
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
