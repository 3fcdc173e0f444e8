//! Named network namespaces, and the three of them every privileged test uses: client, edge and mail.
//!
//! # What is left behind, and when
//! A namespace without processes lives only as long as its name, a bind mount in `/run/netns`. Three things remove it:
//! [`Netns`]'s `Drop`; a janitor process that holds the reading end of a pipe and acts when the test process is gone,
//! whatever ended it (Ctrl-C, SIGKILL, a crash); and the next run, which removes `inj-<pid>-*` of pids that no longer live
//! should the janitor have been killed too. Processes started inside get SIGKILL when the thread that started them ends
//! (see [`Netns::spawn`]), and those they forked are ended with the namespace.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};

/// Internet protocol version of one test case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order reports list them.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// `ipv4` or `ipv6`, as in the names of trials.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }
}

/// One place in the topology, which has an address of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Place {
    /// The address of that family.
    #[must_use]
    pub const fn of(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(self.v4),
            Family::V6 => IpAddr::V6(self.v6),
        }
    }
}

/// The client, 198.51.100.7/24 and 2001:db8:c::7/64: what the mail servers must log.
pub const CLIENT: Place =
    Place { v4: Ipv4Addr::new(198, 51, 100, 7), v6: Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 7) };
/// The edge on the client's side.
pub const EDGE_OUTSIDE: Place =
    Place { v4: Ipv4Addr::new(198, 51, 100, 1), v6: Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 1) };
/// The edge on the mail servers' side: whom they see without the injector.
pub const EDGE_INSIDE: Place =
    Place { v4: Ipv4Addr::new(10, 25, 0, 1), v6: Ipv6Addr::new(0xfd25, 0, 0, 0, 0, 0, 0, 1) };
/// The mail servers.
pub const MAIL: Place =
    Place { v4: Ipv4Addr::new(10, 25, 0, 2), v6: Ipv6Addr::new(0xfd25, 0, 0, 0, 0, 0, 0, 2) };
/// Where the splice engine listens.
pub const VIP_SPLICE: Place = vip(10);
/// Where the relay engine listens.
pub const VIP_RELAY: Place = vip(11);
/// Where the inline engine listens.
pub const VIP_INLINE: Place = vip(12);
/// Where HAProxy listens, to tell a fault of the testbed from one of the injector.
pub const VIP_HAPROXY: Place = vip(13);
/// Every public address on the edge.
pub const VIPS: [Place; 4] = [VIP_SPLICE, VIP_RELAY, VIP_INLINE, VIP_HAPROXY];

/// 192.0.2.N, and 2001:db8:a::N with the same digits (so 0x10 beside 10).
const fn vip(last: u8) -> Place {
    let digits = (last / 10) * 16 + last % 10;
    Place {
        v4: Ipv4Addr::new(192, 0, 2, last),
        v6: Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, digits as u16),
    }
}

/// What the names of namespaces and of scratch directories begin with.
const PREFIX: &str = "inj-";

/// Where iproute2 keeps the names of namespaces.
const NETNS_DIR: &str = "/run/netns";

/// How long `ip netns exec` may take to enter a namespace, on a machine with other work.
const ENTRY_LIMIT: Duration = Duration::from_secs(10);

/// Why a test that needs namespaces cannot run here; `None` if it can.
#[must_use]
pub fn unavailable() -> Option<&'static str> {
    // SAFETY: geteuid takes no arguments, touches no memory and cannot fail.
    if unsafe { libc::geteuid() } != 0 { Some("needs root, for network namespaces") } else { None }
}

/// A directory for one server's files, removed on drop or, should this process be killed, by the janitor.
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

/// A network namespace of this process, deleted on drop with everything started in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes the namespace `inj-<pid>-<role>`, with `lo` up and without IPv6 duplicate address detection.
    ///
    /// # Errors
    /// When not root, when iproute2 is missing, or when this process already has a namespace for that role.
    pub fn new(role: &str) -> anyhow::Result<Self> {
        if let Some(reason) = unavailable() {
            bail!("network namespace for {role}: {reason}");
        }
        start_janitor()?;
        let name = format!("{PREFIX}{}-{role}", std::process::id());
        ip(&["netns", "add", &name])?;
        let netns = Self { name };
        // A tentative link-local address cannot ask for neighbours, so forwarding would stall for the first second.
        netns.sysctl("net/ipv6/conf/all/accept_dad", "0")?;
        netns.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        netns.ip(&["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// The name under which `ip netns` knows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `f` inside, on a thread of its own, so that no other work of this process is moved along.
    ///
    /// # Errors
    /// When the namespace cannot be entered or `f` panics. What `f` returns is passed on as it is.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        self.entrance().run(f)
    }

    /// The way in, for those who do not keep the namespace alive.
    #[must_use]
    pub fn entrance(&self) -> Entrance {
        Entrance { name: self.name.clone() }
    }

    /// `program`, to be started inside by `ip netns exec`, which replaces itself: the child's pid is the program's.
    ///
    /// The child is killed when the *thread* that spawned it ends: for anything that lives longer, use [`Self::spawn`].
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        die_with_parent(&mut command);
        command
    }

    /// Starts a command made by [`Self::command`] that is to live until it is ended or this process dies.
    ///
    /// PR_SET_PDEATHSIG means the death of the spawning thread, hence one thread that stays and does the spawning.
    ///
    /// When it returns, the child is inside: `Drop` ends whom it finds there, and would miss one on its way in.
    ///
    /// # Errors
    /// When the command cannot be started.
    pub fn spawn(&self, command: Command) -> anyhow::Result<Child> {
        let what = format!("{command:?}");
        let mut child = spawn_on_lasting_thread(command).with_context(|| format!("cannot start {what}"))?;
        self.await_entry(&mut child).with_context(|| format!("{what} did not enter {}", self.name))?;
        Ok(child)
    }

    /// Waits until the child is inside, or has ended.
    fn await_entry(&self, child: &mut Child) -> anyhow::Result<()> {
        let inside = fs::metadata(Path::new(NETNS_DIR).join(&self.name))?;
        let current = format!("/proc/{}/ns/net", child.id());
        let deadline = Instant::now() + ENTRY_LIMIT;
        while child.try_wait()?.is_none() {
            // A process that is just ending has no namespace any more; the next look finds it gone.
            if fs::metadata(&current).is_ok_and(|now| (now.dev(), now.ino()) == (inside.dev(), inside.ino()))
            {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "waited {ENTRY_LIMIT:?}");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// `nft COMMANDS` inside, which are separated by semicolons.
    ///
    /// # Errors
    /// When `nft` is missing or refuses; the error carries the commands and what it printed.
    pub fn nft(&self, commands: &str) -> anyhow::Result<()> {
        self.entrance().nft(commands)
    }

    /// `ip -n NAME ARGS…`.
    ///
    /// # Errors
    /// When `ip` fails; the error carries the command and what it printed.
    pub fn ip(&self, args: &[&str]) -> anyhow::Result<()> {
        ip(&[&["-n", &self.name], args].concat())
    }

    /// Sets `/proc/sys/KEY` of this namespace; `key` with slashes, under `net/`.
    ///
    /// # Errors
    /// When there is no such setting, or it refuses the value.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.run(|| fs::write(&path, value))?
            .with_context(|| format!("{}: cannot write {value} to {}", self.name, path.display()))
    }
}

/// The way into a namespace, which it does not keep alive.
#[derive(Clone, Debug)]
pub struct Entrance {
    name: String,
}

impl Entrance {
    /// As [`Netns::nft`].
    ///
    /// # Errors
    /// As [`Netns::nft`], and when the namespace is gone.
    pub fn nft(&self, commands: &str) -> anyhow::Result<()> {
        let output = self.run(|| Command::new("nft").arg(commands).output())?.context("cannot run nft")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "nft {commands}: {complaint}");
        Ok(())
    }

    /// As [`Netns::run`].
    ///
    /// # Errors
    /// As [`Netns::run`], and when the namespace is gone.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        let inside = || {
            self.enter()?;
            Ok(f())
        };
        thread::scope(|scope| scope.spawn(inside).join()).unwrap_or_else(|panic| {
            let message = panic.downcast_ref::<String>().map(String::as_str);
            let message = message.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("(no message)");
            Err(anyhow!("panicked in namespace {}: {message}", self.name))
        })
    }

    /// Moves the calling thread, for good.
    fn enter(&self) -> anyhow::Result<()> {
        let path = Path::new(NETNS_DIR).join(&self.name);
        let file = File::open(&path).with_context(|| format!("no namespace {}", path.display()))?;
        // SAFETY: setns reads nothing from memory; the descriptor is open for the whole call.
        let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
        ensure!(result == 0, "cannot enter {}: {}", path.display(), io::Error::last_os_error());
        Ok(())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.name) {
            eprintln!("namespace {} is left behind: {error:#}", self.name);
        }
    }
}

/// client — edge — mail, joined by veth, with the addresses above.
///
/// The client reaches the public addresses through the edge; the mail servers' default route is the edge, which forwards.
/// Interfaces are `eth0` in client and mail, `outside` and `inside` in the edge.
#[derive(Debug)]
pub struct Topology {
    /// Where senders and readers run.
    pub client: Netns,
    /// Where the injector runs; the public addresses are on its `lo`.
    pub edge: Netns,
    /// Where Postfix and Dovecot run.
    pub mail: Netns,
}

impl Topology {
    /// Makes the three namespaces. A process can have one such topology at a time.
    ///
    /// # Errors
    /// As [`Netns::new`], and when the kernel has no veth.
    pub fn new() -> anyhow::Result<Self> {
        let topology =
            Self { client: Netns::new("client")?, edge: Netns::new("edge")?, mail: Netns::new("mail")? };
        let Self { client, edge, mail } = &topology;
        join((client, "eth0"), (edge, "outside"))?;
        join((edge, "inside"), (mail, "eth0"))?;
        add_address(client, "eth0", CLIENT)?;
        add_address(edge, "outside", EDGE_OUTSIDE)?;
        add_address(edge, "inside", EDGE_INSIDE)?;
        add_address(mail, "eth0", MAIL)?;
        for vip in VIPS {
            edge.ip(&["address", "add", &format!("{}/32", vip.v4), "dev", "lo"])?;
            edge.ip(&["address", "add", &format!("{}/128", vip.v6), "dev", "lo", "nodad"])?;
        }
        edge.sysctl("net/ipv4/ip_forward", "1")?;
        edge.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        client.ip(&["route", "add", "192.0.2.0/24", "via", &EDGE_OUTSIDE.v4.to_string()])?;
        client.ip(&["route", "add", "2001:db8:a::/64", "via", &EDGE_OUTSIDE.v6.to_string()])?;
        mail.ip(&["route", "add", "default", "via", &EDGE_INSIDE.v4.to_string()])?;
        mail.ip(&["route", "add", "default", "via", &EDGE_INSIDE.v6.to_string()])?;
        Ok(topology)
    }
}

/// Joins two namespaces by a veth pair whose ends have these names, both up.
fn join(left: (&Netns, &str), right: (&Netns, &str)) -> anyhow::Result<()> {
    let (left_name, right_name) = (left.0.name(), right.0.name());
    let ends = ["link", "add", left.1, "netns", left_name, "type", "veth", "peer", "name", right.1];
    ip(&[&ends[..], &["netns", right_name]].concat())?;
    left.0.ip(&["link", "set", left.1, "up"])?;
    right.0.ip(&["link", "set", right.1, "up"])
}

/// Gives an interface both addresses of a place; the IPv6 one is usable at once.
fn add_address(netns: &Netns, interface: &str, place: Place) -> anyhow::Result<()> {
    netns.ip(&["address", "add", &format!("{}/24", place.v4), "dev", interface])?;
    netns.ip(&["address", "add", &format!("{}/64", place.v6), "dev", interface, "nodad"])
}

/// Runs `ip ARGS…` and makes its complaint the error.
fn ip(args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(args).output().context("cannot run ip (install iproute2)")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", args.join(" "), complaint.trim());
    Ok(())
}

/// Has the kernel kill the child when the thread that spawns it ends.
pub(crate) fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let arm = move || {
        // SAFETY: prctl and getppid are async-signal-safe and touch no memory of ours.
        let (result, current) =
            unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // A parent that died before the call above sends no signal any more.
        if u32::try_from(current).is_ok_and(|current| current == parent) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    };
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(arm) };
}

/// A command for the lasting thread, and where its answer goes.
type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// Spawns on a thread that lives as long as this process.
fn spawn_on_lasting_thread(command: Command) -> anyhow::Result<Child> {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, answer) in inbox {
                // Nobody waits for the answer only if the asking thread is gone; there is nobody to tell then.
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let (answer, spawned) = mpsc::channel();
    spawner.lock().unwrap_or_else(PoisonError::into_inner).send((command, answer))?;
    Ok(spawned.recv()??)
}

/// Deletes a namespace's name after killing what still runs inside; no process left means the namespace is gone too.
fn remove(name: &str) -> anyhow::Result<()> {
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

/// What [`start_janitor`]'s shell does when the pipe closes: what `Drop` would have done, for all that is left.
///
/// `$1` is the prefix with the pid. The pipe is this shell's standard input; nothing is ever written to it.
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

/// Removes what dead runs left, once, and starts the process that cleans up after this one.
fn start_janitor() -> anyhow::Result<()> {
    static JANITOR_PIPE: Mutex<Option<ChildStdin>> = Mutex::new(None);
    let mut pipe = JANITOR_PIPE.lock().unwrap_or_else(PoisonError::into_inner);
    if pipe.is_some() {
        return Ok(());
    }
    remove_stale();
    let own = format!("{PREFIX}{}-", std::process::id());
    let janitor = Command::new("sh")
        .args(["-c", JANITOR, "janitor", &own])
        // A group of its own: Ctrl-C at the terminal is not for it.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the janitor")?;
    *pipe = janitor.stdin;
    Ok(())
}

/// Removes namespaces and scratch directories whose process no longer lives. Only ours: prefix and a dead pid.
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

/// Entries of a directory named `inj-<pid>-…` whose pid is nobody's.
fn ours_of_the_dead(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| owner(path).is_some_and(|pid| !is_alive(pid))).collect()
}

/// The pid in a name of ours.
fn owner(path: &Path) -> Option<u32> {
    let name = path.file_name()?.to_str()?;
    name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
}

fn is_alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_alike_in_both_families() {
        assert_eq!(VIP_INLINE.v4.to_string(), "192.0.2.12");
        assert_eq!(VIP_INLINE.v6.to_string(), "2001:db8:a::12");
    }

    #[test]
    fn only_names_with_our_prefix_and_a_pid_have_an_owner() {
        assert_eq!(owner(Path::new("/run/netns/inj-42-edge")), Some(42));
        for other in ["/run/netns/edge", "/run/netns/inj-edge", "/run/netns/inj-x-edge", "/run/netns/cni-1-2"]
        {
            assert_eq!(owner(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn a_namespace_is_left_with_its_processes() {
        if let Some(reason) = unavailable() {
            eprintln!("skipped: {reason}");
            return;
        }
        let netns = Netns::new("unit").unwrap();
        let inside = netns.run(|| fs::read_link("/proc/thread-self/ns/net").unwrap()).unwrap();
        assert_ne!(inside, fs::read_link("/proc/self/ns/net").unwrap());

        let mut command = netns.command("sleep");
        command.arg("600");
        let mut sleep = netns.spawn(command).unwrap();
        let path = Path::new(NETNS_DIR).join(netns.name());
        assert!(path.exists());
        drop(netns);
        assert!(!path.exists());
        assert!(!sleep.wait().unwrap().success(), "killed, not waited for");
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

    #[test]
    fn a_panic_inside_is_an_error_outside() {
        if let Some(reason) = unavailable() {
            eprintln!("skipped: {reason}");
            return;
        }
        let netns = Netns::new("panic").unwrap();
        let error = netns.run(|| panic!("on purpose")).unwrap_err();
        assert!(error.to_string().contains("on purpose"), "{error:#}");
    }
}
