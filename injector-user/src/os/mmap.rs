//! Memory shared with a BPF map.

use std::{io, os::fd::BorrowedFd};

use rustix::mm;

/// The mapped memory of a BPF array of 64-bit words (`BPF_F_MMAPABLE`, Linux 5.5). Reading it takes
/// no system call.
#[derive(Debug)]
pub struct MmapArray {
    first: std::ptr::NonNull<std::sync::atomic::AtomicU64>,
    count: usize,
}

// SAFETY: the memory is read only by atomic loads, and the mapping lives as long as the value.
unsafe impl Send for MmapArray {}
// SAFETY: as above.
unsafe impl Sync for MmapArray {}

impl MmapArray {
    /// Maps the first `count` words of the array.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn of(array: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        let len = count * size_of::<u64>();
        // SAFETY: creates a new mapping, at an address that the kernel chooses.
        let start = unsafe {
            mm::mmap(std::ptr::null_mut(), len, mm::ProtFlags::READ, mm::MapFlags::SHARED, array, 0)
        }?;
        let first = std::ptr::NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { first, count })
    }

    /// The present value of the word at `index`.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<u64> {
        // SAFETY: inside the mapping, which starts at a page boundary, so every word is aligned.
        let word = (index < self.count).then(|| unsafe { self.first.add(index).as_ref() });
        word.map(|word| word.load(std::sync::atomic::Ordering::Acquire))
    }
}

impl Drop for MmapArray {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and no reference into it outlives the value.
        let _ = unsafe { mm::munmap(self.first.as_ptr().cast(), self.count * size_of::<u64>()) };
    }
}
