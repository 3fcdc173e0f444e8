//! A program running in a namespace: its output goes to a file, and it ends with its owner.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::netns::Netns;

/// How often conditions are checked.
pub(crate) const POLL: Duration = Duration::from_millis(20);

/// A running program; killed on drop.
#[derive(Debug)]
pub struct Process {
    name: &'static str,
    child: Child,
}

impl Process {
    /// Starts a command made by [`Netns::command`] with both outputs appended to a file.
    ///
    /// # Errors
    /// When the file or the program cannot be opened.
    pub fn start(
        name: &'static str,
        netns: &Netns,
        mut command: Command,
        output: &Path,
    ) -> anyhow::Result<Self> {
        let file = File::options().create(true).append(true).open(output);
        let file = file.with_context(|| format!("cannot write {name}'s output to {}", output.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        Ok(Self { name, child: netns.spawn(command)? })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until a socket listens on every one of `addresses` in the namespace.
    ///
    /// This reads the kernel's socket table instead of connecting: a connection would leave a trace
    /// in the logs.
    ///
    /// # Errors
    /// When the program exits first, or after the limit.
    pub fn wait_listening(
        &mut self,
        netns: &Netns,
        addresses: &[SocketAddr],
        limit: Duration,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let open = netns.run(listening)??;
            let missing: Vec<_> = addresses.iter().filter(|wanted| !covers(&open, **wanted)).collect();
            if missing.is_empty() {
                return Ok(());
            }
            self.ensure_running()?;
            ensure!(
                Instant::now() < deadline,
                "{} does not listen on {missing:?} after {limit:?}",
                self.name
            );
            thread::sleep(POLL);
        }
    }

    /// # Errors
    /// When the program has exited.
    pub fn ensure_running(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("{} ended: {status}", self.name),
            None => Ok(()),
        }
    }

    /// Waits for the exit.
    ///
    /// # Errors
    /// When it still runs after the limit; it is killed then.
    pub fn wait(mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "{} still runs after {limit:?}", self.name);
            thread::sleep(POLL);
        }
    }

    /// Sends a signal, unless the program has exited and was waited for.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn signal(&mut self, signal: libc::c_int) -> anyhow::Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        let pid = libc::pid_t::try_from(self.child.id())?;
        // SAFETY: kill touches no memory, and the child has not been waited for, so the pid is
        // still its own.
        let result = unsafe { libc::kill(pid, signal) };
        ensure!(result == 0, "cannot signal {}: {}", self.name, io::Error::last_os_error());
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if the child has already exited.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether one of the listening sockets accepts connections to `wanted`. A wildcard covers its own
/// family only, because all servers here bind the families separately.
fn covers(open: &[SocketAddr], wanted: SocketAddr) -> bool {
    open.iter().any(|socket| {
        let any = socket.ip().is_unspecified() && socket.is_ipv4() == wanted.is_ipv4();
        socket.port() == wanted.port() && (any || socket.ip() == wanted.ip())
    })
}

/// Addresses of all listening TCP sockets in the calling thread's namespace.
fn listening() -> anyhow::Result<Vec<SocketAddr>> {
    let mut sockets = Vec::new();
    for table in ["tcp", "tcp6"] {
        let path = format!("/proc/thread-self/net/{table}");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        sockets.extend(text.lines().skip(1).filter_map(parse_listening));
    }
    Ok(sockets)
}

/// Reads one line of `/proc/net/tcp` or `tcp6`; `None` if the socket is not listening (state 0A).
///
/// The kernel prints addresses as 32-bit words in host order, ports as numbers
/// (`net/ipv4/tcp_ipv4.c`, `get_tcp4_sock`).
fn parse_listening(line: &str) -> Option<SocketAddr> {
    let mut fields = line.split_whitespace().skip(1);
    let (address, port) = fields.next()?.split_once(':')?;
    if fields.nth(1)? != "0A" {
        return None;
    }
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip = if address.len() == 8 {
        IpAddr::V4(Ipv4Addr::from(word(0)?))
    } else {
        let mut octets = [0; 16];
        for (index, chunk) in octets.chunks_exact_mut(4).enumerate() {
            chunk.copy_from_slice(&word(index * 8)?);
        }
        IpAddr::V6(Ipv6Addr::from(octets))
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// Has the calling thread run on this processor only.
///
/// # Errors
/// As sched_setaffinity(2).
pub fn bind_thread(processor: usize) -> anyhow::Result<()> {
    // SAFETY: all zeroes is a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the number of a processor of this machine is less than CPU_SETSIZE.
    unsafe { libc::CPU_SET(processor, &mut set) };
    // SAFETY: 0 is the calling thread, and the size is that of the set.
    let bound = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) };
    ensure!(bound == 0, "cannot bind a thread to processor {processor}: {}", io::Error::last_os_error());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_table_shows_a_listener_of_either_family() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = std::net::TcpListener::bind(address).unwrap();
            let address = listener.local_addr().unwrap();
            assert!(covers(&listening().unwrap(), address), "{address}");
            drop(listener);
            assert!(!covers(&listening().unwrap(), address), "{address}");
        }
    }
}
