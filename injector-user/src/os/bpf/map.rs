//! Maps of any layout.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use super::{Attr, MapInfo, command, descriptor, length, map_info};

/// A map whose entries are bytes: its layout need not be known.
#[derive(Debug)]
pub struct ByteMap {
    map: OwnedFd,
    info: MapInfo,
}

impl ByteMap {
    /// The map of this descriptor.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn new(map: OwnedFd) -> io::Result<Self> {
        Ok(Self { info: map_info(map.as_fd())?, map })
    }

    /// What the kernel says about it.
    #[must_use]
    pub const fn info(&self) -> &MapInfo {
        &self.info
    }

    /// All keys. Keys that come or go meanwhile may be missing.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn keys(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut keys = std::collections::HashSet::new();
        let mut key: Option<Vec<u8>> = None;
        // An iteration whose key is removed meanwhile starts again: up to a limit.
        for _ in 0..u64::from(self.info.max_entries).saturating_mul(4).max(64) {
            let Some(next) = self.next_key(key.as_deref())? else { break };
            keys.insert(next.clone());
            key = Some(next);
        }
        Ok(keys.into_iter().collect())
    }

    /// Calls `each` with all entries. With entries that come or go meanwhile, some may be missing or come
    /// more than once.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn for_each(&self, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        let mut key = self.next_key(None)?;
        // As in `keys`.
        for _ in 0..u64::from(self.info.max_entries).saturating_mul(4).max(64) {
            let Some(this) = key else { break };
            if let Some(value) = self.get(&this)? {
                each(&this, &value);
            }
            key = self.next_key(Some(&this))?;
        }
        Ok(())
    }

    fn next_key(&self, key: Option<&[u8]>) -> io::Result<Option<Vec<u8>>> {
        let mut next = vec![0_u8; self.info.key_size];
        let mut attr = Attr::new();
        attr.word(0, descriptor(self.map.as_fd())).pointer(16, next.as_mut_ptr());
        if let Some(key) = key {
            self.check(key)?;
            attr.pointer(8, key.as_ptr());
        }
        // SAFETY: both keys have the map's length.
        match unsafe { attr.call(command::MAP_GET_NEXT_KEY) } {
            Ok(_) => Ok(Some(next)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The value of a key; `None` if there is none.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.check(key)?;
        let mut value = vec![0_u8; self.info.value_size];
        let mut attr = Attr::new();
        attr.word(0, descriptor(self.map.as_fd())).pointer(8, key.as_ptr()).pointer(16, value.as_mut_ptr());
        // SAFETY: key and value have the map's lengths.
        match unsafe { attr.call(command::MAP_LOOKUP_ELEM) } {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether it has any entry.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn has_entries(&self) -> io::Result<bool> {
        Ok(self.next_key(None)?.is_some())
    }

    /// Writes entries: as many keys as values, one behind the other. In batches if the kernel can: hash maps
    /// since Linux 5.6, tries later.
    ///
    /// # Errors
    /// As bpf(2): `E2BIG` or `ENOSPC` if the map is full. What was written before stays.
    pub fn insert_all(&self, keys: &[u8], values: &[u8]) -> io::Result<()> {
        /// Entries at once: the kernel copies a batch's entry by entry, and is not to be kept too long.
        const BATCH: usize = 4096;
        /// The kernel's own error where a map has no operation (include/linux/errno.h).
        const ENOTSUPP: i32 = 524;

        let MapInfo { key_size, value_size, .. } = self.info;
        let whole = keys.len().is_multiple_of(key_size) && values.len().is_multiple_of(value_size);
        if !whole || keys.len() / key_size != values.len() / value_size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let batches = keys.chunks(BATCH * key_size).zip(values.chunks(BATCH * value_size));
        for (keys, values) in batches {
            match self.insert_batch(keys, values) {
                // Also before Linux 5.6, which does not know the command.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP)) =>
                {
                    for (key, value) in keys.chunks_exact(key_size).zip(values.chunks_exact(value_size)) {
                        self.insert(key, value)?;
                    }
                }
                written => written?,
            }
        }
        Ok(())
    }

    fn insert_batch(&self, keys: &[u8], values: &[u8]) -> io::Result<()> {
        let mut attr = Attr::new();
        attr.pointer(16, keys.as_ptr()).pointer(24, values.as_ptr());
        attr.word(32, length(keys.len() / self.info.key_size)).word(36, descriptor(self.map.as_fd()));
        // SAFETY: keys and values have the map's lengths, and are as many as `attr` says, by the caller.
        unsafe { attr.call(command::MAP_UPDATE_BATCH) }.map(drop)
    }

    /// Writes an entry.
    ///
    /// # Errors
    /// As bpf(2): `E2BIG` or `ENOSPC` if the map is full.
    pub fn insert(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.check(key)?;
        if value.len() != self.info.value_size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut attr = Attr::new();
        attr.word(0, descriptor(self.map.as_fd())).pointer(8, key.as_ptr()).pointer(16, value.as_ptr());
        // SAFETY: key and value have the map's lengths.
        unsafe { attr.call(command::MAP_UPDATE_ELEM) }.map(drop)
    }

    /// Removes an entry, if there is one.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn remove(&self, key: &[u8]) -> io::Result<()> {
        self.check(key)?;
        let mut attr = Attr::new();
        attr.word(0, descriptor(self.map.as_fd())).pointer(8, key.as_ptr());
        // SAFETY: the key has the map's length.
        match unsafe { attr.call(command::MAP_DELETE_ELEM) } {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes all entries.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn clear(&self) -> io::Result<()> {
        self.keys()?.iter().try_for_each(|key| self.remove(key))
    }

    fn check(&self, key: &[u8]) -> io::Result<()> {
        if key.len() == self.info.key_size { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}
