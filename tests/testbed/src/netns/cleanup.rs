//! Removing namespaces and scratch directories, also those of runs that were killed.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;

use super::ip::{NETNS_DIR, PREFIX, ip};

/// A directory for one server's files, removed on drop or, if this process is killed, by the
/// janitor.
///
/// # Errors
/// When the temporary directory cannot be written.
pub fn scratch_dir(role: &str) -> anyhow::Result<tempfile::TempDir> {
    let prefix = format!("{PREFIX}{}-{role}-", std::process::id());
    tempfile::Builder::new()
        .prefix(&prefix)
        .tempdir()
        .with_context(|| format!("no scratch directory for {role}"))
}

/// Deletes a namespace's name after killing the processes inside; without processes the namespace
/// is removed too.
pub(super) fn remove(name: &str) -> anyhow::Result<()> {
    let output = Command::new("ip").args(["netns", "pids", name]).output().context("cannot run ip")?;
    let pids = String::from_utf8_lossy(&output.stdout);
    let own = std::process::id();
    for pid in pids.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()) {
        if u32::try_from(pid).is_ok_and(|pid| pid != own) {
            // SAFETY: kill touches no memory; the pid was listed as running in our own namespace.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
    ip(&["netns", "del", name])
}

/// What [`start_janitor`]'s shell does when the pipe closes: what `Drop` would have done, for
/// everything that is left.
///
/// `$1` is the prefix with the pid. The pipe is this shell's standard input; nothing is ever
/// written to it.
const JANITOR: &str = r#"
trap '' HUP INT TERM
read -r nothing
for path in /run/netns/"$1"*; do
    [ -e "$path" ] || continue
    name=${path##*/}
    for pid in $(ip netns pids "$name"); do kill -9 "$pid"; done
    ip netns del "$name"
done
while read -r _ place _; do
    case $place in "${TMPDIR:-/tmp}/$1"*) umount "$place" ;; esac
done < /proc/mounts
rm -rf "${TMPDIR:-/tmp}/$1"*
"#;

/// Removes what earlier runs left, once, and starts the process that cleans up after this one.
pub(super) fn start_janitor() -> anyhow::Result<()> {
    static JANITOR_PIPE: Mutex<Option<ChildStdin>> = Mutex::new(None);
    let mut pipe = JANITOR_PIPE.lock().unwrap_or_else(PoisonError::into_inner);
    if pipe.is_some() {
        return Ok(());
    }
    remove_stale();
    let own = format!("{PREFIX}{}-", std::process::id());
    let janitor = Command::new("sh")
        .args(["-c", JANITOR, "janitor", &own])
        // In its own process group: Ctrl-C at the terminal does not reach it.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the janitor")?;
    *pipe = janitor.stdin;
    Ok(())
}

/// Removes namespaces and scratch directories with our prefix whose process no longer exists.
fn remove_stale() {
    for path in ours_of_the_dead(Path::new(NETNS_DIR)) {
        if let Some(Err(error)) = path.file_name().and_then(OsStr::to_str).map(remove) {
            eprintln!("cannot remove the stale namespace {}: {error:#}", path.display());
        }
    }
    for path in ours_of_the_dead(&std::env::temp_dir()) {
        if let Err(error) = fs::remove_dir_all(&path) {
            eprintln!("cannot remove the stale directory {}: {error}", path.display());
        }
    }
}

/// Entries of a directory named `inj-<pid>-…` whose process no longer exists.
fn ours_of_the_dead(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| owner(path).is_some_and(|pid| !is_alive(pid))).collect()
}

/// The pid in a name with our prefix.
fn owner(path: &Path) -> Option<u32> {
    let name = path.file_name()?.to_str()?;
    name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
}

fn is_alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::super::unavailable;
    use super::*;

    #[test]
    fn only_names_with_our_prefix_and_a_pid_have_an_owner() {
        assert_eq!(owner(Path::new("/run/netns/inj-42-edge")), Some(42));
        for other in ["/run/netns/edge", "/run/netns/inj-edge", "/run/netns/inj-x-edge", "/run/netns/cni-1-2"]
        {
            assert_eq!(owner(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn what_a_dead_process_left_is_removed() {
        if let Some(reason) = unavailable() {
            eprintln!("skipped: {reason}");
            return;
        }
        let mut dead = Command::new("true").spawn().unwrap();
        let pid = dead.id();
        dead.wait().unwrap();
        let name = format!("{PREFIX}{pid}-unit");
        let scratch = std::env::temp_dir().join(&name);
        ip(&["netns", "add", &name]).unwrap();
        fs::create_dir(&scratch).unwrap();
        let alive = scratch_dir("unit").unwrap();
        remove_stale();
        assert!(!Path::new(NETNS_DIR).join(&name).exists());
        assert!(!scratch.exists());
        assert!(alive.path().exists());
    }
}
