//! Memory shared with a BPF map.

use std::{
    io,
    marker::PhantomData,
    os::fd::BorrowedFd,
    ptr::NonNull,
    sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
};

use rustix::mm;
use zerocopy::{FromBytes, IntoBytes};

/// The mapped memory of a BPF array of 64-bit words (`BPF_F_MMAPABLE`, Linux 5.5). Reading it takes
/// no system call.
#[derive(Debug)]
pub struct MmapArray {
    first: NonNull<AtomicU64>,
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
        let first = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { first, count })
    }

    /// The present value of the word at `index`.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<u64> {
        // SAFETY: inside the mapping, which starts at a page boundary, so every word is aligned.
        let word = (index < self.count).then(|| unsafe { self.first.add(index).as_ref() });
        word.map(|word| word.load(Ordering::Acquire))
    }
}

impl Drop for MmapArray {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and no reference into it outlives the value.
        let _ = unsafe { mm::munmap(self.first.as_ptr().cast(), self.count * size_of::<u64>()) };
    }
}

/// The mapped memory of a BPF array of larger values, which BPF programs change at any time. Reading
/// and writing takes no system call.
#[derive(Debug)]
pub struct MmapRecords<T> {
    start: NonNull<u8>,
    count: usize,
    record: PhantomData<T>,
}

// SAFETY: the memory is accessed only by atomic operations, and the mapping lives as long as the
// value.
unsafe impl<T> Send for MmapRecords<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for MmapRecords<T> {}

impl<T: FromBytes + IntoBytes> MmapRecords<T> {
    /// The kernel keeps values of an array as far apart as their size, rounded up to whole words
    /// (array_map_alloc, kernel/bpf/arraymap.c). Whole words leave no rest.
    const WORDS: usize = {
        assert!(size_of::<T>() != 0 && size_of::<T>().is_multiple_of(size_of::<u64>()));
        size_of::<T>() / size_of::<u64>()
    };

    /// Maps the first `count` values of the array, to read and to write them.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn map(array: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        let len = count.checked_mul(Self::WORDS * size_of::<u64>()).ok_or(io::ErrorKind::InvalidInput)?;
        let access = mm::ProtFlags::READ | mm::ProtFlags::WRITE;
        // SAFETY: creates a new mapping, at an address that the kernel chooses.
        let start = unsafe { mm::mmap(std::ptr::null_mut(), len, access, mm::MapFlags::SHARED, array, 0) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { start, count, record: PhantomData })
    }

    /// How many values there are.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.count
    }

    /// A copy of the value at `index`. A program may change it meanwhile: every word is whole, the
    /// value need not be of one moment.
    #[must_use]
    pub fn read(&self, index: usize) -> Option<T> {
        let mut value = T::new_zeroed();
        let (words, _) = value.as_mut_bytes().as_chunks_mut::<{ size_of::<u64>() }>();
        for (number, word) in words.iter_mut().enumerate() {
            let word_of_map = self.word(index, number * size_of::<u64>())?;
            *word = word_of_map.load(Ordering::Relaxed).to_ne_bytes();
        }
        Some(value)
    }

    /// The 32-bit field at this offset of the value at `index`; `None` outside of the value, and if
    /// the offset is not aligned.
    #[must_use]
    pub fn field(&self, index: usize, offset: usize) -> Option<&AtomicU32> {
        self.at(index, offset)
    }

    /// The byte at this offset of the value at `index`.
    #[must_use]
    pub fn byte(&self, index: usize, offset: usize) -> Option<&AtomicU8> {
        self.at(index, offset)
    }

    /// The 64-bit field at this offset of the value at `index`.
    #[must_use]
    pub fn word(&self, index: usize, offset: usize) -> Option<&AtomicU64> {
        self.at(index, offset)
    }

    /// `A` is one of the atomic integers.
    fn at<A>(&self, index: usize, offset: usize) -> Option<&A> {
        let fits = offset.is_multiple_of(size_of::<A>()) && offset + size_of::<A>() <= size_of::<T>();
        if index >= self.count || !fits {
            return None;
        }
        // SAFETY: inside the mapping, which starts at a page boundary; values are whole 64-bit words,
        // so the integer is aligned. Zeroed or not, every bit pattern is one of an integer.
        Some(unsafe { self.start.add(index * size_of::<T>() + offset).cast::<A>().as_ref() })
    }
}

impl<T> Drop for MmapRecords<T> {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and no reference into it outlives the value.
        let _ = unsafe { mm::munmap(self.start.as_ptr().cast(), self.count * size_of::<T>()) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    /// Any file can be mapped.
    fn file(bytes: &[u8]) -> std::fs::File {
        use std::io::Write as _;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn records_are_read_and_written_in_place() {
        let bytes: Vec<u8> = (0..48).collect();
        let file = file(&bytes);
        let records = MmapRecords::<[u64; 2]>::map(file.as_fd(), 3).unwrap();
        let second = [16, 24].map(|at| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap()));
        assert_eq!(records.read(1), Some(second));
        assert_eq!(records.read(3), None);

        records.field(1, 4).unwrap().store(7, Ordering::Relaxed);
        records.byte(1, 15).unwrap().store(9, Ordering::Relaxed);
        assert!(records.field(1, 2).is_none() && records.field(1, 16).is_none());
        assert!(records.byte(2, 16).is_none() && records.byte(3, 0).is_none());
        let other = MmapRecords::<[u8; 16]>::map(file.as_fd(), 3).unwrap().read(1).unwrap();
        assert_eq!(other[4..8], 7_u32.to_ne_bytes());
        assert_eq!(other[15], 9);
        assert_eq!((other[3], other[14]), (19, 30));
    }
}
