//! Finds what the privileged tests left on the machine.

use std::{
    collections::BTreeSet,
    fs, io,
    path::Path,
    process::{self, Command},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

/// Prefixes of the names of everything that the tests and the injector create.
const OURS: [&str; 2] = ["inj-", "injector"];

/// How long the kernel and the tests' own cleanup may take after a test has ended.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(10);

/// The machine before the tests.
pub(super) struct Before {
    things: BTreeSet<String>,
    children: BTreeSet<u32>,
}

impl Before {
    /// Records what exists, and makes this process the reaper of the tests' orphans.
    ///
    /// # Errors
    /// When the kernel refuses the latter.
    pub(super) fn look() -> Result<Self> {
        // SAFETY: this prctl(2) command takes plain numbers and touches no memory.
        let adopted = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
        if adopted != 0 {
            return Err(io::Error::last_os_error()).context("cannot become the reaper of the tests' orphans");
        }
        Ok(Self { things: things(), children: descendants() })
    }

    /// Lists what the tests left, and ends their processes.
    pub(super) fn left_behind(self) -> Vec<String> {
        let end = Instant::now() + CLEANUP_TIMEOUT;
        loop {
            reap();
            let processes: Vec<u32> = descendants().difference(&self.children).copied().collect();
            let things: Vec<String> = things().difference(&self.things).cloned().collect();
            if processes.is_empty() && things.is_empty() {
                return Vec::new();
            }
            if Instant::now() > end {
                let mut left: Vec<String> = processes.iter().map(|pid| describe(*pid)).collect();
                left.extend(things);
                processes.into_iter().for_each(kill);
                reap();
                return left;
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Descriptions of our namespaces, tables, interfaces and pins.
fn things() -> BTreeSet<String> {
    let folders = [
        ("network namespace", "/run/netns"),
        ("network interface", "/sys/class/net"),
        ("pinned BPF object", "/sys/fs/bpf"),
    ];
    let entries = folders.iter().flat_map(|(kind, folder)| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(move |entry| (*kind, entry.file_name().to_string_lossy().into_owned()))
    });
    let tables = tables().into_iter().map(|name| ("nftables table", name));
    let ours = |name: &str| OURS.iter().any(|start| name.starts_with(start));
    entries
        .chain(tables)
        .filter(|(_, name)| ours(name))
        .map(|(kind, name)| format!("{kind} {name}"))
        .collect()
}

/// The names of the host's nftables tables; none where nft doesn't run.
fn tables() -> Vec<String> {
    let Ok(output) = Command::new("nft").args(["list", "tables"]).output() else { return Vec::new() };
    // table inet injector
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter_map(|line| line.split_whitespace().nth(2)).map(ToOwned::to_owned).collect()
}

/// Every living process that descends from this one.
fn descendants() -> BTreeSet<u32> {
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, parent(pid)?)))
        .collect();
    let mut found = BTreeSet::from([process::id()]);
    loop {
        let next: Vec<u32> = parents
            .iter()
            .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid))
            .map(|it| it.0)
            .collect();
        if next.is_empty() {
            break;
        }
        found.extend(next);
    }
    found.remove(&process::id());
    found
}

/// The parent of a process; `None` if the process is gone or is a zombie.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    parse_stat(&stat)
}

/// `pid (name) state parent …`; the name may hold spaces and parentheses (proc_pid_stat(5)).
fn parse_stat(stat: &str) -> Option<u32> {
    let mut rest = stat.rsplit_once(')')?.1.split_whitespace();
    let state = rest.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    rest.next()?.parse().ok()
}

fn describe(pid: u32) -> String {
    let line = fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    format!("process {pid}: {}", line.trim())
}

/// Ends a process of the tests.
fn kill(pid: u32) {
    if let Ok(pid) = libc::pid_t::try_from(pid) {
        // SAFETY: kill(2) touches no memory. The process descends from this one, which has not
        // reaped it: the number is still its own.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
}

/// Reaps orphans that have ended. Call it only while no other code waits for a child of this
/// process.
fn reap() {
    loop {
        // SAFETY: a null status pointer is allowed by waitpid(2), which then stores nothing.
        let pid = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
        if pid <= 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_found_with_any_name() {
        assert_eq!(parse_stat("12 (smtpd) S 7 12 12 0"), Some(7));
        assert_eq!(parse_stat("12 (a) b (c) R 9 1 1"), Some(9));
        assert_eq!(parse_stat("12 (gone) Z 7 12"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn a_child_of_a_child_descends_from_here() {
        let mut shell = Command::new("sh").args(["-c", "sleep 30 & wait"]).spawn().unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        let sleeping = loop {
            let found = descendants().into_iter().find(|pid| describe(*pid).ends_with("sleep 30"));
            if let Some(pid) = found {
                break pid;
            }
            assert!(Instant::now() < end, "the grandchild was not found");
            thread::sleep(Duration::from_millis(10));
        };
        assert!(descendants().contains(&shell.id()));
        kill(sleeping);
        shell.wait().unwrap();
        assert!(!descendants().contains(&sleeping));
    }

    #[test]
    fn only_our_own_names_are_listed() {
        assert!(things().iter().all(|thing| !thing.ends_with(" lo")), "every machine has lo");
    }
}
