//! A strict reader of both versions.

use super::{ParseError, SIGNATURE, parsed::Parsed, v1, v2};

/// Reads the header at the start of `input`; version 1 or 2 by their first bytes.
///
/// Strict: what the specification does not allow is refused, and so are TLVs that a sender should not make (empty
/// or twice the same, NOOP apart). The length of a version 2 header is not limited here; a caller that bounds its
/// buffer compares its size with [`ParseError::Incomplete`]. Addresses come out normalised, as [`Addresses::new`]
/// makes them.
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
