//! The three namespaces, a server that greets, and an injector in front of it.

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::{ADMIN, Injector};
use injector_testbed::netns::{Family, MAIL, Netns, Topology, VIP_RELAY};
use injector_testbed::sockets::{LIMIT, patient};
use tempfile::TempDir;

/// Where clients connect.
const PORT: u16 = 2500;
/// Where the server expects the header.
const BACKEND_PORT: u16 = 12500;

/// How long an answer to a SYN may take before a session counts as refused.
const REFUSED_AFTER: Duration = Duration::from_millis(700);

/// The namespaces, shared by all trials of a group.
#[derive(Debug)]
pub(crate) struct Testbed {
    pub(crate) topology: Topology,
    _bpffs: BpfFs,
    _server: Server,
}

impl Testbed {
    pub(crate) fn new(group: &str) -> anyhow::Result<Self> {
        let topology = Topology::named(group)?;
        let server = Server::start(&topology.mail)?;
        Ok(Self { topology, _bpffs: BpfFs::mount()?, _server: server })
    }

    /// An injector with these tables before its listener.
    pub(crate) fn injector(&self, top: &str) -> anyhow::Result<Injector> {
        Injector::start(&self.topology.edge, &config(top))
    }

    /// Whether a client is served: it gets the banner.
    pub(crate) fn is_served(&self, family: Family) -> anyhow::Result<bool> {
        self.is_served_at(SocketAddr::new(VIP_RELAY.of(family), PORT))
    }

    /// The same, at another address.
    pub(crate) fn is_served_at(&self, address: SocketAddr) -> anyhow::Result<bool> {
        self.topology.client.run(|| session(address, REFUSED_AFTER))?
    }

    /// Waits until a client is served, or no longer. Returns how long after `since` that was.
    pub(crate) fn wait_served(
        &self,
        family: Family,
        served: bool,
        since: Instant,
    ) -> anyhow::Result<Duration> {
        self.wait_served_at(SocketAddr::new(VIP_RELAY.of(family), PORT), served, since)
    }

    /// The same, at another address.
    pub(crate) fn wait_served_at(
        &self,
        address: SocketAddr,
        served: bool,
        since: Instant,
    ) -> anyhow::Result<Duration> {
        let deadline = Instant::now() + LIMIT;
        loop {
            // A refused session counts from its start: a dropped packet is noticed late.
            let start = since.elapsed();
            if self.is_served_at(address)? == served {
                return Ok(start);
            }
            ensure!(Instant::now() < deadline, "served is never {served} at {address}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// A session that must be served; returns how long it took to its banner.
    pub(crate) fn session(&self) -> anyhow::Result<Duration> {
        let address = SocketAddr::new(VIP_RELAY.of(Family::V4), PORT);
        let start = Instant::now();
        ensure!(self.topology.client.run(|| session(address, LIMIT))??, "a session was refused");
        Ok(start.elapsed())
    }
}

/// A configuration with these tables before its listener.
pub(crate) fn config(top: &str) -> String {
    format!(
        "[metrics]\nlisten = \"127.0.0.1:9145\"\n\n{ADMIN}\n{top}\n\n[[listener]]\nname = \"test\"\n\
         bind = [\"{}:{PORT}\", \"[{}]:{PORT}\"]\nprotocol = \"smtp\"\nengine = \"relay\"\n\
         backends = [\"{}:{BACKEND_PORT}\"]\n",
        VIP_RELAY.v4, VIP_RELAY.v6, MAIL.v4
    )
}

/// Whether a client is accepted in time, and gets the server's banner.
fn session(address: SocketAddr, limit: Duration) -> anyhow::Result<bool> {
    let refused = |kind| {
        let by_kernel = [ErrorKind::TimedOut, ErrorKind::WouldBlock];
        let by_daemon = [ErrorKind::ConnectionReset, ErrorKind::ConnectionRefused];
        by_kernel.contains(&kind) || by_daemon.contains(&kind)
    };
    let mut stream = match TcpStream::connect_timeout(&address, limit) {
        Ok(stream) => stream,
        Err(error) if refused(error.kind()) => return Ok(false),
        Err(error) => bail!("{address}: {error}"),
    };
    // Once it is accepted, a server may be slow: a ban ends the session.
    stream.set_read_timeout(Some(LIMIT))?;
    let mut banner = [0; 4];
    match stream.read_exact(&mut banner) {
        // A ban that came after the accept ends the session by the protocol's words.
        Ok(()) if &banner == b"421 " => Ok(false),
        Ok(()) => {
            ensure!(&banner == b"220 ", "greeted with {banner:?}");
            let _ = stream.write_all(b"QUIT\r\n");
            Ok(true)
        }
        Err(error) if refused(error.kind()) || error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => bail!("{address}: {error}"),
    }
}

/// A file with an API key, and its directory.
pub(crate) fn key_file(key: &str) -> anyhow::Result<(TempDir, PathBuf)> {
    let dir = injector_testbed::netns::scratch_dir("key")?;
    let path = dir.path().join("key");
    fs::write(&path, key)?;
    Ok((dir, path))
}

/// A server that reads the header, greets, and closes after QUIT.
#[derive(Debug)]
struct Server {
    ended: Arc<AtomicBool>,
    accepting: Option<thread::JoinHandle<()>>,
}

impl Server {
    fn start(netns: &Netns) -> anyhow::Result<Self> {
        let address = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), BACKEND_PORT);
        let listener = netns.listen(address)?;
        listener.set_nonblocking(true)?;
        let ended = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&ended);
        let accepting = thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let Ok((stream, _)) = listener.accept() else {
                    thread::sleep(Duration::from_millis(2));
                    continue;
                };
                // A client that leaves is its own affair.
                thread::spawn(move || drop(serve(stream)));
            }
        });
        Ok(Self { ended, accepting: Some(accepting) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn serve(mut stream: TcpStream) -> anyhow::Result<()> {
    stream.set_nonblocking(false)?;
    patient(&stream)?;
    let mut fixed = [0; 16];
    stream.read_exact(&mut fixed)?;
    let mut rest = vec![0; usize::from(u16::from_be_bytes([fixed[14], fixed[15]]))];
    stream.read_exact(&mut rest)?;
    stream.write_all(b"220 hello\r\n")?;
    stream.read_exact(&mut [0; 6])?;
    Ok(())
}
