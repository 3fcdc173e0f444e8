//! Resources that a test uses, and that must be released at its end.

use std::fs;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::netns::Netns;

/// How often memory is read.
const EVERY: Duration = Duration::from_millis(200);

/// Memory of the machine and the daemon, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// `MemAvailable` of /proc/meminfo.
    pub available: u64,
    /// Memory of the kernel itself: all that is neither free, nor page cache, nor a page of a
    /// process. Data that is queued on a socket without being charged to it is visible only here.
    pub kernel: u64,
    /// `Slab` of /proc/meminfo.
    pub slab: u64,
    /// `mem` of TCP in /proc/net/sockstat, which counts pages for all namespaces.
    pub tcp: u64,
    /// `VmRSS` of the daemon.
    pub daemon: u64,
}

impl Memory {
    /// The current values, with the daemon of this process id.
    #[must_use]
    pub fn now(daemon: u32) -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (meminfo, status) = (text("/proc/meminfo"), text(&format!("/proc/{daemon}/status")));
        Self {
            available: kibibytes(&meminfo, "MemAvailable:"),
            kernel: kernel(&meminfo),
            slab: kibibytes(&meminfo, "Slab:"),
            tcp: tcp_pages(&text("/proc/net/sockstat")) * 4096,
            daemon: kibibytes(&status, "VmRSS:"),
        }
    }
}

/// The most memory that this process has had (`VmHWM`), in bytes.
#[must_use]
pub fn peak_memory(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    kibibytes(&status, "VmHWM:")
}

/// Reads memory until asked for the extremes.
#[derive(Debug)]
pub struct MemoryWatch {
    before: Memory,
    stop: mpsc::Sender<()>,
    watching: JoinHandle<Memory>,
}

impl MemoryWatch {
    /// Starts now.
    #[must_use]
    pub fn start(daemon: u32) -> Self {
        let before = Memory::now(daemon);
        let (stop, stopped) = mpsc::channel();
        let watching = thread::spawn(move || {
            let mut peak = before;
            while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                let now = Memory::now(daemon);
                peak = Memory {
                    available: peak.available.min(now.available),
                    kernel: peak.kernel.max(now.kernel),
                    slab: peak.slab.max(now.slab),
                    tcp: peak.tcp.max(now.tcp),
                    daemon: peak.daemon.max(now.daemon),
                };
            }
            peak
        });
        Self { before, stop, watching }
    }

    /// The values at the start, and the worst since.
    #[must_use]
    pub fn end(self) -> (Memory, Memory) {
        drop(self.stop);
        // The thread does not panic; without it there is nothing to report.
        (self.before, self.watching.join().unwrap_or_default())
    }
}

/// The number after a name, in bytes; the kernel prints kibibytes.
fn kibibytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// `MemTotal` minus the parts that have names, and minus the slabs that only cache files.
fn kernel(meminfo: &str) -> u64 {
    let others = ["MemFree:", "Buffers:", "Cached:", "SwapCached:", "AnonPages:", "SReclaimable:"]
        .map(|name| kibibytes(meminfo, name));
    kibibytes(meminfo, "MemTotal:").saturating_sub(others.iter().sum())
}

/// Bytes that are charged to the TCP sockets of a namespace: receive and send queues, and forward
/// allocations (`r`, `w` and `f` of `skmem`, ss(8)).
///
/// # Errors
/// When `ss` is missing.
pub fn socket_buffers(netns: &Netns) -> anyhow::Result<u64> {
    let output = netns.command("ss").args(["-tamnH"]).output().context("cannot run ss (install iproute2)")?;
    Ok(charged(&String::from_utf8_lossy(&output.stdout)))
}

fn charged(listing: &str) -> u64 {
    let memories = listing.split("skmem:(").skip(1).filter_map(|rest| rest.split_once(')'));
    // A forward allocation may be negative, which ss prints as an unsigned number.
    let number = |text: &str| text.parse().map(u32::cast_signed).ok().map(i64::from);
    let of = |field: &str| ["r", "w", "f"].into_iter().find_map(|name| number(field.strip_prefix(name)?));
    let sum: i64 = memories.flat_map(|(memory, _)| memory.split(',').filter_map(of)).sum();
    u64::try_from(sum).unwrap_or(0)
}

fn tcp_pages(text: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix("TCP:")).unwrap_or_default();
    let mut fields = line.split_whitespace();
    fields.find(|field| *field == "mem");
    fields.next().and_then(|pages| pages.parse().ok()).unwrap_or(0)
}

/// Descriptors that a process has open, without pipes: the daemon keeps some of these for the next
/// bulk, at most `MAX_PIPES`.
///
/// # Errors
/// When there is no such process, or it has too many pipes.
pub fn descriptors(pid: u32) -> anyhow::Result<usize> {
    let path = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&path).with_context(|| path.clone())?;
    // Closed meanwhile: the link no longer exists.
    let links = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    let (pipes, others): (Vec<_>, Vec<_>) =
        links.partition(|link| link.as_os_str().as_encoded_bytes().starts_with(b"pipe:"));
    // Both ends of each, and the standard streams.
    ensure!(pipes.len() <= 2 * MAX_PIPES + 3, "{} ends of pipes", pipes.len());
    Ok(others.len())
}

/// The maximum number of pipes of the daemon (`MAX_PIPES` of injector-user).
const MAX_PIPES: usize = 32;

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
        let listing = "ESTAB 0 0 a b\n\t skmem:(r1,rb2,t4,tb8,f16,w32,o64,bl128,d256) x\nc skmem:(r1000,f4294967295,w2001)\n";
        assert_eq!(charged(listing), 3049);
        let memory = Memory::now(std::process::id());
        assert!(memory.available > 0 && memory.slab > 0 && memory.daemon > 0, "{memory:?}");
    }

    #[test]
    fn a_descriptor_more_is_counted() {
        let own = std::process::id();
        assert!(descriptors(own).unwrap() > 2);
        assert!(descriptors(u32::MAX).is_err());
    }
}
