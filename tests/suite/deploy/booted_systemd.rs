//! A systemd of its own: PID 1 of new namespaces, over a temporary copy of this machine's files.
//!
//! The root is an overlay whose upper layer is in memory. This machine's own units and settings are
//! hidden, so that it boots only the journal. It runs in its own cgroup and in the given network
//! namespace.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use injector_testbed::netns::{self, Netns};
use tempfile::TempDir;

/// Boot time limit, on a busy machine.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// Creates the root and becomes systemd. `$1`: an empty directory, `$2`: name of the cgroup, then
/// directories to bind-mount at the same path.
const BOOT: &str = r#"
set -eu
base=$1 group=$2
shift 2
mount --make-rprivate /
mount -t tmpfs tmpfs "$base"
root=$base/root
mkdir "$base/upper" "$base/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$root"

mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
# As systemd does outside of a container: readable only by root.
mount -t bpf bpf "$root/sys/fs/bpf" -o mode=0700,nosuid,nodev,noexec
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/dev" -o mode=0755
for node in null zero full random urandom tty; do
    : > "$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t devpts devpts "$root/dev/pts" -o newinstance,ptmxmode=0666
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for place in "$@"; do
    mkdir -p "$root$place"
    mount --rbind "$place" "$root$place"
done

units=$root/lib/systemd/system
rm -rf "$units"/*.wants "$root"/etc/systemd/system/* "$root"/etc/systemd/*.conf.d "$root/var/log/journal"
rm -rf "$root/etc/injector" "$root"/usr/local/lib/systemd "$root"/etc/tmpfiles.d "$root"/etc/sysusers.d
mkdir -p "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=volatile\nForwardToConsole=no\nReadKMsg=no\n' > "$root/etc/systemd/journald.conf.d/test.conf"
printf '[Unit]\nRequires=basic.target systemd-journald.service\nAfter=basic.target\nAllowIsolate=yes\n' \
    > "$root/etc/systemd/system/test.target"

# First all of the hierarchy, to move into a group of one's own, then only that.
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mkdir "$root/sys/fs/cgroup/$group"
echo 0 > "$root/sys/fs/cgroup/$group/cgroup.procs"
umount "$root/sys/fs/cgroup"
exec unshare --cgroup sh -eu -c '
    mount -t cgroup2 cgroup2 "$1/sys/fs/cgroup"
    cd "$1"
    exec env -i container=injector-test PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        chroot . /lib/systemd/systemd --system --unit=test.target --show-status=no --log-target=journal
' sh "$root"
"#;

/// Removes cgroups `$1` without processes. Systemd's own groups are below them.
const REMOVE_GROUPS: &str = r#"
set -eu
mount --make-rprivate /
mount -t cgroup2 cgroup2 "$2"
for group in "$2"/$1; do
    [ ! -d "$group" ] || find "$group" -depth -type d -exec rmdir {} \; 2> /dev/null || true
done
umount "$2"
"#;

/// A running systemd; stopped on drop with all its processes.
#[derive(Debug)]
pub(crate) struct BootedSystemd {
    /// The process outside the PID namespace; the namespace ends with it.
    keeper: Child,
    /// Systemd's pid on this machine.
    pid: u32,
    group: String,
    dir: TempDir,
}

impl BootedSystemd {
    /// Boots, and waits until the boot target is reached.
    ///
    /// # Errors
    /// When a namespace, a mount or the boot fails.
    pub(crate) fn boot(netns: &Netns, visible: &[&Path]) -> anyhow::Result<Self> {
        let dir = netns::scratch_dir("systemd")?;
        let group = format!("inj-{}-systemd", std::process::id());
        // Cgroups of runs that were killed.
        remove_groups("inj-*-systemd", dir.path());
        let log = fs::File::create(dir.path().join("boot.log"))?;
        let base = dir.path().join("base");
        fs::create_dir(&base)?;
        let mut command = netns.command("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--"]);
        command.args(["sh", "-c", BOOT, "boot"]).arg(&base).arg(&group).args(visible);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let keeper = netns.spawn(command)?;
        let mut booted = Self { keeper, pid: 0, group, dir };
        let outcome = booted.wait_booted();
        outcome.with_context(|| format!("systemd did not boot; it printed:\n{}", booted.console()))?;
        Ok(booted)
    }

    /// Runs a command inside.
    ///
    /// # Errors
    /// When it cannot be started; its exit status is in the output.
    pub(crate) fn run(&self, words: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid.to_string(), "--all", "--root", "--wd", "--", "env", "-i"]);
        command.arg("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.args(["HOME=/root", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0"]).args(words);
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {words:?}"))
    }

    /// Runs a command inside, requires success, and returns its output.
    ///
    /// # Errors
    /// When it fails, with its error output.
    pub(crate) fn must(&self, words: &[&str]) -> anyhow::Result<String> {
        let output = self.run(words)?;
        let (printed, complained) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{words:?}: {}\n{printed}{complained}", output.status);
        Ok(printed.into_owned())
    }

    /// A path inside, as this process can open it.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string()).join("root").join(path.trim_start_matches('/'))
    }

    /// A property of the unit.
    ///
    /// # Errors
    /// As [`Self::must`].
    pub(crate) fn property(&self, unit: &str, name: &str) -> anyhow::Result<String> {
        let text = self.must(&["systemctl", "show", "--value", "--property", name, unit])?;
        Ok(text.trim().to_owned())
    }

    /// The log of the unit, without journald's prefix.
    pub(crate) fn journal(&self, unit: &str) -> String {
        let output = self.run(&["journalctl", "--no-pager", "--output=cat", "--unit", unit]);
        output.map_or_else(|error| error.to_string(), |it| String::from_utf8_lossy(&it.stdout).into_owned())
    }

    fn wait_booted(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + BOOT_LIMIT;
        let children = format!("/proc/{0}/task/{0}/children", self.keeper.id());
        loop {
            if let Some(status) = self.keeper.try_wait()? {
                bail!("it ended: {status}");
            }
            let child = fs::read_to_string(&children).unwrap_or_default();
            self.pid = child.split_whitespace().next().and_then(|pid| pid.parse().ok()).unwrap_or(0);
            if self.pid != 0 && self.is_systemd() {
                let state = self.run(&["systemctl", "is-system-running"])?;
                match String::from_utf8_lossy(&state.stdout).trim() {
                    "running" => return Ok(()),
                    "degraded" => {
                        bail!("degraded:\n{}", self.must(&["systemctl", "--failed", "--no-legend"])?)
                    }
                    _ => {}
                }
            }
            ensure!(Instant::now() < deadline, "not after {BOOT_LIMIT:?}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Whether the preparing shell has become systemd.
    fn is_systemd(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/comm", self.pid)).is_ok_and(|name| name.trim() == "systemd")
    }

    fn console(&self) -> String {
        fs::read_to_string(self.dir.path().join("boot.log")).unwrap_or_default()
    }
}

impl Drop for BootedSystemd {
    fn drop(&mut self) {
        // Both fail only if the child has exited. Its PID namespace ends with it.
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
        let deadline = Instant::now() + Duration::from_secs(5);
        while Path::new("/proc").join(self.pid.to_string()).exists() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        remove_groups(&self.group, self.dir.path());
    }
}

fn remove_groups(name: &str, dir: &Path) {
    let place = dir.join("cgroup");
    // A group that cannot be removed has a living owner, or is empty and harmless.
    let _ = fs::create_dir_all(&place);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", REMOVE_GROUPS, "sh", name]).arg(&place);
    match command.output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => eprintln!("cgroup {name}: {}", String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => eprintln!("cgroup {name}: {error}"),
    }
}
