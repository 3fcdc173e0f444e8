//! What the run costs the machine, and what must be as before when it is over.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Context as _;

/// How often memory is looked at.
const EVERY: Duration = Duration::from_millis(200);

/// Memory of the machine and the daemon, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// `MemAvailable` of /proc/meminfo.
    pub(crate) available: u64,
    /// `Slab` of /proc/meminfo.
    pub(crate) slab: u64,
    /// `mem` of TCP in /proc/net/sockstat, which counts pages for all namespaces.
    pub(crate) tcp: u64,
    /// `VmRSS` of the daemon.
    pub(crate) daemon: u64,
}

impl Memory {
    pub(crate) fn now(daemon: u32) -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (meminfo, status) = (text("/proc/meminfo"), text(&format!("/proc/{daemon}/status")));
        Self {
            available: kibibytes(&meminfo, "MemAvailable:"),
            slab: kibibytes(&meminfo, "Slab:"),
            tcp: tcp_pages(&text("/proc/net/sockstat")) * 4096,
            daemon: kibibytes(&status, "VmRSS:"),
        }
    }
}

/// Watches memory until it is asked for the extremes.
#[derive(Debug)]
pub(crate) struct MemoryWatch {
    before: Memory,
    stop: mpsc::Sender<()>,
    watching: JoinHandle<Memory>,
}

impl MemoryWatch {
    pub(crate) fn start(daemon: u32) -> Self {
        let before = Memory::now(daemon);
        let (stop, stopped) = mpsc::channel();
        let watching = thread::spawn(move || {
            let mut peak = before;
            while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                let now = Memory::now(daemon);
                peak = Memory {
                    available: peak.available.min(now.available),
                    slab: peak.slab.max(now.slab),
                    tcp: peak.tcp.max(now.tcp),
                    daemon: peak.daemon.max(now.daemon),
                };
            }
            peak
        });
        Self { before, stop, watching }
    }

    /// What was at the start, and the worst since.
    pub(crate) fn end(self) -> (Memory, Memory) {
        drop(self.stop);
        // It does not panic; without it there is nothing to report.
        (self.before, self.watching.join().unwrap_or_default())
    }
}

/// The number behind a name, in bytes; the kernel prints kibibytes.
fn kibibytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn tcp_pages(text: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix("TCP:")).unwrap_or_default();
    let mut fields = line.split_whitespace();
    fields.find(|field| *field == "mem");
    fields.next().and_then(|pages| pages.parse().ok()).unwrap_or(0)
}

/// Descriptors that a process has open.
pub(crate) fn descriptors(pid: u32) -> anyhow::Result<usize> {
    let path = format!("/proc/{pid}/fd");
    Ok(fs::read_dir(&path).with_context(|| path.clone())?.count())
}

/// The hash maps of a process, sockets or not, with the number of their elements.
pub(crate) fn map_entries(pid: u32) -> anyhow::Result<Vec<(String, usize)>> {
    let mut ids: Vec<u32> = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor may be closed meanwhile.
        let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
        ids.extend(info.lines().find_map(|line| line.strip_prefix("map_id:")?.trim().parse::<u32>().ok()));
    }
    ids.sort_unstable();
    ids.dedup();
    let mut entries = Vec::new();
    for id in ids {
        let map = open_map(id).with_context(|| format!("opening BPF map {id}"))?;
        let info = map_info(&map).with_context(|| format!("asking about BPF map {id}"))?;
        if matches!(info.kind, BPF_MAP_TYPE_HASH | BPF_MAP_TYPE_SOCKHASH) {
            let count = count(&map, &info).with_context(|| format!("walking BPF map {}", info.name))?;
            entries.push((info.name, count));
        }
    }
    Ok(entries)
}

// include/uapi/linux/bpf.h: commands, map types, and where in `union bpf_attr` and `struct bpf_map_info` things are.
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_MAP_GET_FD_BY_ID: libc::c_long = 14;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_MAP_TYPE_SOCKHASH: u32 = 18;

struct MapInfo {
    kind: u32,
    key_size: usize,
    most: usize,
    name: String,
}

/// The beginning of `struct bpf_map_info`, up to and with the name.
#[repr(C)]
#[derive(Default)]
struct RawInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    name: [u8; 16],
}

/// `union bpf_attr` for commands on a map and a key.
#[repr(C)]
#[derive(Default)]
struct KeyAttributes {
    fd: u32,
    padding: u32,
    key: u64,
    next: u64,
}

/// `union bpf_attr` for asking about an object.
#[repr(C)]
#[derive(Default)]
struct InfoAttributes {
    fd: u32,
    length: u32,
    info: u64,
}

fn open_map(id: u32) -> io::Result<OwnedFd> {
    // The number is where other commands have the descriptor.
    let fd = call(BPF_MAP_GET_FD_BY_ID, &mut KeyAttributes { fd: id, ..KeyAttributes::default() })?;
    // SAFETY: this command returns a descriptor that is ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn map_info(map: &OwnedFd) -> io::Result<MapInfo> {
    let mut info = RawInfo::default();
    let length = u32::try_from(size_of::<RawInfo>()).map_err(io::Error::other)?;
    let mut attributes =
        InfoAttributes { fd: number(map)?, length, info: std::ptr::from_mut(&mut info) as u64 };
    call(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    let name = info.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(MapInfo {
        kind: info.kind,
        key_size: usize::try_from(info.key_size).map_err(io::Error::other)?,
        most: usize::try_from(info.max_entries).map_err(io::Error::other)?,
        name: String::from_utf8_lossy(name).into_owned(),
    })
}

/// How many keys there are; exact while nobody changes the map.
fn count(map: &OwnedFd, info: &MapInfo) -> io::Result<usize> {
    let (mut key, mut next) = (vec![0_u8; info.key_size], vec![0_u8; info.key_size]);
    let mut count = 0;
    // A map that changes meanwhile may send the walk back to its start.
    while count <= info.most {
        let from = if count == 0 { 0 } else { key.as_ptr() as u64 };
        let mut attributes =
            KeyAttributes { fd: number(map)?, padding: 0, key: from, next: next.as_mut_ptr() as u64 };
        match call(BPF_MAP_GET_NEXT_KEY, &mut attributes) {
            Ok(_) => count += 1,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
            Err(error) => return Err(error),
        }
        std::mem::swap(&mut key, &mut next);
    }
    Ok(count)
}

fn number(fd: &OwnedFd) -> io::Result<u32> {
    u32::try_from(fd.as_raw_fd()).map_err(io::Error::other)
}

fn call<T>(command: libc::c_long, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: the attributes are the whole beginning of a bpf_attr, of which the kernel takes the rest as zero; what they
    // point to is as large as the map's keys, or as the length given with it, and outlives the call in every caller.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(result).map_err(io::Error::other) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        assert_eq!(kibibytes("MemFree: 3 kB\nSlab:      12 kB\n", "Slab:"), 12 << 10);
        assert_eq!(kibibytes("", "Slab:"), 0);
        assert_eq!(
            tcp_pages("sockets: used 9\nTCP: inuse 3 orphan 0 tw 5 alloc 7 mem 42\nUDP: inuse 1 mem 2\n"),
            42
        );
        let memory = Memory::now(std::process::id());
        assert!(memory.available > 0 && memory.slab > 0 && memory.daemon > 0, "{memory:?}");
    }

    #[test]
    fn a_descriptor_more_is_counted() {
        let own = std::process::id();
        assert!(descriptors(own).unwrap() > 2);
        assert!(descriptors(u32::MAX).is_err());
    }

    #[test]
    fn a_map_of_this_process_is_walked() {
        // BPF_MAP_CREATE: a hash of four-byte keys and values, for at most eight.
        #[repr(C)]
        #[derive(Default)]
        struct Create([u32; 12]);
        let mut attributes = Create([BPF_MAP_TYPE_HASH, 4, 4, 8, 0, 0, 0, 0x6b61_6f73, 0, 0, 0, 0]);
        let Ok(fd) = call(0, &mut attributes) else {
            eprintln!("skipped: may not create BPF maps");
            return;
        };
        // SAFETY: the descriptor is ours.
        let map = unsafe { OwnedFd::from_raw_fd(fd) };
        let mine = |entries: &[(String, usize)]| {
            entries.iter().find(|(name, _)| name == "soak").map(|(_, count)| *count)
        };
        let own = std::process::id();
        assert_eq!(mine(&map_entries(own).unwrap()), Some(0));
        for key in [3_u32, 4, 5] {
            // BPF_MAP_UPDATE_ELEM; the value is the key.
            let at = std::ptr::from_ref(&key) as u64;
            let fd = number(&map).unwrap();
            call(2, &mut KeyAttributes { fd, padding: 0, key: at, next: at }).unwrap();
        }
        assert_eq!(mine(&map_entries(own).unwrap()), Some(3));
    }
}
