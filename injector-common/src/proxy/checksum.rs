//! The CRC32C of a header (section 2.2.3; RFC 4960, appendix B).

use crc::{CRC_32_ISCSI, Crc};

static CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// Bytes of a checksum's value.
pub(super) const LEN: usize = 4;

/// The checksum of a whole `header`. Its four bytes from `value_at` on count as zero.
///
/// `None` when these bytes are not within the header.
pub(super) fn of(header: &[u8], value_at: usize) -> Option<u32> {
    let before = header.get(..value_at)?;
    let after = header.get(value_at.checked_add(LEN)?..)?;

    let mut digest = CRC32C.digest();
    digest.update(before);
    digest.update(&[0; LEN]);
    digest.update(after);
    Some(digest.finalize())
}
