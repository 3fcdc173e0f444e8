//! The maps of a running daemon, accessed from outside, as the kernel allows root to: corrupting
//! them, for real failures of the real mechanism without a hook in the daemon, and counting their
//! entries.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, bail};

use super::fdinfo::{descriptors_with, field};
use super::program;
use super::syscall::{Attributes, call, descriptor};

/// Commands of bpf(2), include/uapi/linux/bpf.h.
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_MAP_GET_FD_BY_ID: libc::c_long = 14;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_FREEZE: libc::c_long = 22;

const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_MAP_TYPE_SOCKHASH: u32 = 18;
const BPF_PROG_TYPE_SK_MSG: u32 = 16;
const BPF_SK_MSG_VERDICT: u32 = 7;

/// A map of a running process.
#[derive(Debug)]
pub struct DaemonMap(OwnedFd);

impl DaemonMap {
    /// The map called `name` of the process `pid`.
    ///
    /// # Errors
    /// When the process has no such map.
    pub fn of(pid: u32, name: &str) -> anyhow::Result<Self> {
        for id in map_ids(pid)? {
            let map = Self::open(id)?;
            if map.info()?.name == name {
                return Ok(map);
            }
        }
        bail!("process {pid} has no map {name}")
    }

    /// The map that is pinned there.
    ///
    /// # Errors
    /// When there is none.
    pub fn pinned(path: &Path) -> anyhow::Result<Self> {
        let name = CString::new(path.as_os_str().as_encoded_bytes())?;
        let map = descriptor(BPF_OBJ_GET, &mut Attributes::new().pointer(0, name.as_ptr().cast()));
        Ok(Self(map.with_context(|| format!("opening {}", path.display()))?))
    }

    /// Its number of keys; exact only while the map does not change.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn entries(&self) -> anyhow::Result<usize> {
        self.count(&self.info()?)
    }

    /// How many keys it has room for.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn capacity(&self) -> anyhow::Result<usize> {
        Ok(self.info()?.most)
    }

    fn open(id: u32) -> anyhow::Result<Self> {
        let map = descriptor(BPF_MAP_GET_FD_BY_ID, &mut Attributes::new().u32(0, id));
        Ok(Self(map.with_context(|| format!("opening BPF map {id}"))?))
    }

    /// Freezes the map: user space cannot change it any more.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn freeze(&self) -> anyhow::Result<()> {
        call(BPF_MAP_FREEZE, &mut Attributes::new().fd(0, &self.0)).context("freezing a map")?;
        Ok(())
    }

    /// Replaces the program: every message sent on a socket in this map is dropped.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn drop_messages(&self) -> anyhow::Result<()> {
        const SK_DROP: u64 = 0;
        self.answer_messages(SK_DROP)
    }

    /// Replaces the program: every message is sent unchanged.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn pass_messages(&self) -> anyhow::Result<()> {
        const SK_PASS: u64 = 1;
        self.answer_messages(SK_PASS)
    }

    fn answer_messages(&self, action: u64) -> anyhow::Result<()> {
        let program = program::answering(BPF_PROG_TYPE_SK_MSG, BPF_SK_MSG_VERDICT, action)?;
        let mut attach = Attributes::new().fd(0, &self.0).fd(4, &program).u32(8, BPF_SK_MSG_VERDICT);
        call(BPF_PROG_ATTACH, &mut attach).context("attaching a program of our own")?;
        Ok(())
    }

    fn info(&self) -> anyhow::Result<Info> {
        /// Size of `struct bpf_map_info` up to and including the name, and the offsets of its
        /// fields.
        const INFO: u32 = 40;
        const KIND: usize = 0;
        const KEY_SIZE: usize = 8;
        const MOST: usize = 16;
        const NAME: usize = 24;
        let mut info = [0_u8; INFO as usize];
        let mut query =
            Attributes::new().fd(0, &self.0).u32(4, INFO).pointer(8, info.as_mut_ptr().cast_const());
        call(BPF_OBJ_GET_INFO_BY_FD, &mut query).context("asking about a map")?;
        let number = |at: usize| {
            let bytes = info.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default();
            u32::from_ne_bytes(bytes)
        };
        let name = info.get(NAME..).unwrap_or_default().split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(Info {
            kind: number(KIND),
            key_size: usize::try_from(number(KEY_SIZE))?,
            most: usize::try_from(number(MOST))?,
            name: String::from_utf8_lossy(name).into_owned(),
        })
    }

    /// All keys, with their values of this size; complete only while the map does not change.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn pairs(&self, value_size: usize) -> anyhow::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let keys = self.keys(&self.info()?)?;
        let pair = |key: Vec<u8>| {
            let mut value = vec![0_u8; value_size];
            let mut lookup = Attributes::new()
                .fd(0, &self.0)
                .pointer(8, key.as_ptr())
                .pointer(16, value.as_mut_ptr().cast_const());
            match call(BPF_MAP_LOOKUP_ELEM, &mut lookup) {
                Ok(_) => Ok(Some((key, value))),
                // Removed meanwhile, for instance by the sweep.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
                Err(error) => Err(error).context("reading a map"),
            }
        };
        keys.into_iter().filter_map(|key| pair(key).transpose()).collect()
    }

    /// Sets the value of a key.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn set(&self, key: &[u8], value: &[u8]) -> anyhow::Result<()> {
        let mut update =
            Attributes::new().fd(0, &self.0).pointer(8, key.as_ptr()).pointer(16, value.as_ptr());
        call(BPF_MAP_UPDATE_ELEM, &mut update).context("changing a map")?;
        Ok(())
    }

    /// The number of keys; exact only while the map does not change.
    fn count(&self, info: &Info) -> anyhow::Result<usize> {
        Ok(self.keys(info)?.len())
    }

    fn keys(&self, info: &Info) -> anyhow::Result<Vec<Vec<u8>>> {
        let (mut key, mut next) = (vec![0_u8; info.key_size], vec![0_u8; info.key_size]);
        let mut keys = Vec::new();
        // A concurrent change of the map may restart the iteration.
        while keys.len() <= info.most {
            let from = if keys.is_empty() { std::ptr::null() } else { key.as_ptr() };
            let mut step =
                Attributes::new().fd(0, &self.0).pointer(8, from).pointer(16, next.as_mut_ptr().cast_const());
            match call(BPF_MAP_GET_NEXT_KEY, &mut step) {
                Ok(_) => keys.push(next.clone()),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
                Err(error) => return Err(error).with_context(|| format!("walking BPF map {}", info.name)),
            }
            std::mem::swap(&mut key, &mut next);
        }
        Ok(keys)
    }
}

struct Info {
    kind: u32,
    key_size: usize,
    most: usize,
    name: String,
}

/// The ids of all maps that a process has open.
///
/// # Errors
/// When the process has exited.
pub fn map_ids(pid: u32) -> anyhow::Result<Vec<u32>> {
    Ok(descriptors_with(pid, "map_id")?.into_keys().collect())
}

/// The memory of all maps that a process has open, in bytes (`memlock`, bpftool-map(8)).
///
/// # Errors
/// When the process has exited.
pub fn map_memory(pid: u32) -> anyhow::Result<u64> {
    Ok(descriptors_with(pid, "map_id")?.values().filter_map(|info| field(info, "memlock")).sum())
}

/// Whether a map with this id still exists, whatever holds it.
///
/// # Errors
/// As bpf(2).
pub fn map_exists(id: u32) -> anyhow::Result<bool> {
    match descriptor(BPF_MAP_GET_FD_BY_ID, &mut Attributes::new().u32(0, id)) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("looking for BPF map {id}")),
    }
}

/// The hash maps of a process, including socket maps, with their numbers of entries.
///
/// # Errors
/// When the process has exited, or as bpf(2).
pub fn map_entries(pid: u32) -> anyhow::Result<Vec<(String, usize)>> {
    let mut entries = Vec::new();
    for id in map_ids(pid)? {
        let map = DaemonMap::open(id)?;
        let info = map.info()?;
        if matches!(info.kind, BPF_MAP_TYPE_HASH | BPF_MAP_TYPE_SOCKHASH) {
            entries.push((info.name.clone(), map.count(&info)?));
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_of_this_process_is_walked() {
        const BPF_MAP_CREATE: libc::c_long = 0;
        const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
        // Keys and values of four bytes, at most eight entries.
        let create = Attributes::new().u32(0, BPF_MAP_TYPE_HASH).u32(4, 4).u32(8, 4).u32(12, 8);
        let Ok(fd) = descriptor(BPF_MAP_CREATE, &mut create.put(28, b"counted")) else {
            eprintln!("skipped: may not create BPF maps");
            return;
        };
        let own = std::process::id();
        let mine = || {
            let entries = map_entries(own).unwrap();
            entries.iter().find(|(name, _)| name == "counted").map(|(_, count)| *count)
        };
        assert_eq!(mine(), Some(0));
        for key in [3_u32, 4, 5] {
            let at = std::ptr::from_ref(&key).cast();
            let update = Attributes::new().fd(0, &fd).pointer(8, at).pointer(16, at);
            call(BPF_MAP_UPDATE_ELEM, &mut { update }).unwrap();
        }
        assert_eq!(mine(), Some(3));
        assert!(map_ids(own).unwrap().into_iter().all(|id| map_exists(id).unwrap()));
        assert!(!map_exists(u32::MAX).unwrap());
        assert!(map_memory(own).unwrap() > 0);
    }
}
