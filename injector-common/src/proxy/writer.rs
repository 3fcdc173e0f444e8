//! Writes into a borrowed buffer with bounds checks.

use core::fmt;

/// A buffer that is filled from its start.
pub(super) struct Writer<'a> {
    out: &'a mut [u8],
    len: usize,
}

impl<'a> Writer<'a> {
    pub(super) fn new(out: &'a mut [u8]) -> Self {
        Self { out, len: 0 }
    }

    /// Bytes written so far.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Appends `bytes`; `None`, and nothing written, when they do not fit.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Option<()> {
        self.room(bytes.len())?.copy_from_slice(bytes);
        Some(())
    }

    /// Appends `count` zero bytes; `None`, and nothing written, when they do not fit.
    pub(super) fn put_zeros(&mut self, count: usize) -> Option<()> {
        self.room(count)?.fill(0);
        Some(())
    }

    fn room(&mut self, count: usize) -> Option<&mut [u8]> {
        let end = self.len.checked_add(count)?;
        let room = self.out.get_mut(self.len..end)?;
        self.len = end;
        Some(room)
    }
}

impl fmt::Write for Writer<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.put(text.as_bytes()).ok_or(fmt::Error)
    }
}
