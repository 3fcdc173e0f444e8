//! A strict parser of both versions.

use super::{ParseError, SIGNATURE, parsed::Parsed, v1, v2};

/// Parses the header at the start of `input`. The first bytes decide between version 1 and 2.
///
/// It rejects everything that the specification does not allow, and TLVs that a sender should not send
/// (empty ones, and duplicates other than NOOP). It does not limit the length of a version 2 header: a
/// caller with a bounded buffer compares its size with [`ParseError::Incomplete`]. Addresses are
/// normalised, as by [`Addresses::new`](super::Addresses::new).
///
/// # Errors
///
/// [`ParseError::Incomplete`] as long as more bytes may still make a header of the input; every other error is
/// final.
pub fn parse(input: &[u8]) -> Result<Parsed<'_>, ParseError> {
    if input.starts_with(&SIGNATURE) {
        v2::parse(input)
    } else if input.starts_with(v1::SIGNATURE) {
        v1::parse(input)
    } else if v1::SIGNATURE.starts_with(input) {
        Err(ParseError::Incomplete { needed: v1::MIN_LEN })
    } else if SIGNATURE.starts_with(input) {
        Err(ParseError::Incomplete { needed: v2::FIXED_LEN })
    } else {
        Err(ParseError::NotProxy)
    }
}
