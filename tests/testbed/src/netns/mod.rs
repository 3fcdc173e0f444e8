//! Named network namespaces, and the three of them that every privileged test uses: client, edge
//! and mail.
//!
//! # What is left behind, and when
//! A namespace without processes exists only as long as its name, a bind mount in `/run/netns`.
//! Three things remove it: [`Netns`]'s `Drop`; a janitor process that holds the reading end of a
//! pipe and acts when the test process has exited for any reason (Ctrl-C, SIGKILL, a crash); and
//! the next run, which removes `inj-<pid>-*` of pids that no longer exist, in case the janitor was
//! killed too. Processes started inside get SIGKILL when the thread that started them ends (see
//! [`Netns::spawn`]), and those they forked are killed with the namespace.

mod address;
mod cleanup;
mod ip;
mod spawn;
mod topology;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};

pub use self::address::{
    CLIENT, EDGE_INSIDE, EDGE_OUTSIDE, Family, HostAddresses, MAIL, VIP_HAPROXY, VIP_INLINE, VIP_RELAY,
    VIP_SPLICE, VIPS,
};
pub use self::cleanup::scratch_dir;
use self::cleanup::{remove, start_janitor};
use self::ip::{NETNS_DIR, PREFIX, ip};
pub(crate) use self::spawn::die_with_parent;
use self::spawn::spawn_on_lasting_thread;
pub use self::topology::Topology;
use crate::wait::wait_until;

/// How long `ip netns exec` may take to enter a namespace, on a busy machine.
const ENTRY_LIMIT: Duration = Duration::from_secs(10);

/// Why a test that needs namespaces cannot run here; `None` if it can.
#[must_use]
pub fn unavailable() -> Option<&'static str> {
    // SAFETY: geteuid takes no arguments, touches no memory and cannot fail.
    if unsafe { libc::geteuid() } != 0 { Some("needs root, for network namespaces") } else { None }
}

/// A network namespace of this process, deleted on drop with all processes in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Creates the namespace `inj-<pid>-<role>`, with `lo` up and without IPv6 duplicate address
    /// detection.
    ///
    /// # Errors
    /// When not root, when iproute2 is missing, or when this process already has a namespace for
    /// that role.
    pub fn new(role: &str) -> anyhow::Result<Self> {
        if let Some(reason) = unavailable() {
            bail!("network namespace for {role}: {reason}");
        }
        start_janitor()?;
        let name = format!("{PREFIX}{}-{role}", std::process::id());
        ip(&["netns", "add", &name])?;
        let netns = Self { name };
        // A tentative link-local address cannot send neighbour solicitations, so forwarding would
        // stall for the first second.
        netns.sysctl("net/ipv6/conf/all/accept_dad", "0")?;
        netns.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        netns.ip(&["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// Its name for `ip netns`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `f` inside, on its own thread, so that the rest of this process stays outside.
    ///
    /// # Errors
    /// When the namespace cannot be entered or `f` panics. The result of `f` is returned unchanged.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        self.handle().run(f)
    }

    /// A listener inside.
    ///
    /// A child of this process that has not called execve(2) yet has the descriptors of all threads: an
    /// earlier listener may keep the address for a moment after it was dropped.
    ///
    /// # Errors
    /// As bind(2), if the address stays in use.
    pub fn listen(&self, address: SocketAddr) -> anyhow::Result<TcpListener> {
        let bind = || self.run(|| TcpListener::bind(address));
        let is_final = |outcome: &io::Result<TcpListener>| match outcome {
            Ok(_) => true,
            Err(error) => error.kind() != io::ErrorKind::AddrInUse,
        };
        wait_until("binding", bind, is_final)?.with_context(|| address.to_string())
    }

    /// A handle that does not keep the namespace alive.
    #[must_use]
    pub fn handle(&self) -> NetnsHandle {
        NetnsHandle { name: self.name.clone() }
    }

    /// `program`, to be started inside by `ip netns exec`, which replaces itself: the child's pid
    /// is the program's.
    ///
    /// The child is killed when the *thread* that spawned it ends: for anything that lives longer,
    /// use [`Self::spawn`].
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.handle().command(program)
    }

    /// Starts a command made by [`Self::command`] that runs until it is stopped or this process
    /// exits.
    ///
    /// PR_SET_PDEATHSIG refers to the spawning thread, hence one lasting thread does the spawning.
    ///
    /// When it returns, the child is inside: `Drop` kills the processes that it finds there, and
    /// would miss one that is still entering.
    ///
    /// # Errors
    /// When the command cannot be started.
    pub fn spawn(&self, command: Command) -> anyhow::Result<Child> {
        let what = format!("{command:?}");
        let mut child = spawn_on_lasting_thread(command).with_context(|| format!("cannot start {what}"))?;
        self.await_entry(&mut child).with_context(|| format!("{what} did not enter {}", self.name))?;
        Ok(child)
    }

    /// Waits until the child is inside, or has exited.
    fn await_entry(&self, child: &mut Child) -> anyhow::Result<()> {
        let inside = fs::metadata(Path::new(NETNS_DIR).join(&self.name))?;
        let current = format!("/proc/{}/ns/net", child.id());
        let deadline = Instant::now() + ENTRY_LIMIT;
        while child.try_wait()?.is_none() {
            // A process that is exiting has no namespace; the next check finds that it has exited.
            if fs::metadata(&current).is_ok_and(|now| (now.dev(), now.ino()) == (inside.dev(), inside.ino()))
            {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "waited {ENTRY_LIMIT:?}");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Runs `nft COMMANDS` inside; semicolons separate the commands.
    ///
    /// # Errors
    /// When `nft` is missing or fails; the error has the commands and the output.
    pub fn nft(&self, commands: &str) -> anyhow::Result<()> {
        self.handle().nft(commands)
    }

    /// Runs `ip -n NAME ARGS…`.
    ///
    /// # Errors
    /// When `ip` fails; the error has the command and the output.
    pub fn ip(&self, args: &[&str]) -> anyhow::Result<()> {
        ip(&[&["-n", &self.name], args].concat())
    }

    /// Sets `/proc/sys/KEY` of this namespace; `key` with slashes, under `net/`.
    ///
    /// # Errors
    /// When there is no such setting, or it rejects the value.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.run(|| fs::write(&path, value))?
            .with_context(|| format!("{}: cannot write {value} to {}", self.name, path.display()))
    }
}

/// A handle of a namespace, which does not keep it alive.
#[derive(Clone, Debug)]
pub struct NetnsHandle {
    name: String,
}

impl NetnsHandle {
    /// The namespace with this name for `ip netns`, which another program made.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned() }
    }

    /// As [`Netns::command`].
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        die_with_parent(&mut command);
        command
    }

    /// As [`Netns::nft`].
    ///
    /// # Errors
    /// As [`Netns::nft`], and when the namespace no longer exists.
    pub fn nft(&self, commands: &str) -> anyhow::Result<()> {
        let output = self.run(|| Command::new("nft").arg(commands).output())?.context("cannot run nft")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "nft {commands}: {complaint}");
        Ok(())
    }

    /// As [`Netns::run`].
    ///
    /// # Errors
    /// As [`Netns::run`], and when the namespace no longer exists.
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

    /// Moves the calling thread into the namespace, permanently.
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

#[cfg(test)]
mod tests {
    use super::*;

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
