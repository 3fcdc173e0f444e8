//! The three namespaces, minimal mail servers in them, and an injector between them.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::{ADMIN, EAGER, Injector};
use injector_testbed::netns::{Family, MAIL, Netns, Topology, VIP_SPLICE};
use injector_testbed::sockets::{LIMIT, patient};

/// Where clients connect.
pub(crate) const PORT: u16 = 2500;
/// Ports of the backends that require a header, in the order of their numbers.
pub(crate) const BACKEND_PORTS: [u16; 3] = [12500, 12501, 12502];

/// The namespaces, shared by all trials of a group.
#[derive(Debug)]
pub(crate) struct Testbed {
    pub(crate) topology: Topology,
    pub(crate) bpffs: BpfFs,
}

impl Testbed {
    pub(crate) fn new(group: &str) -> anyhow::Result<Self> {
        let topology = Topology::named(group)?;
        // All public addresses must exist for inline, too.
        Ok(Self { topology, bpffs: BpfFs::mount()? })
    }

    pub(crate) fn start(&self, config: &str) -> anyhow::Result<Injector> {
        Injector::start(&self.topology.edge, config)
    }

    /// A server on a backend's port.
    pub(crate) fn backend(&self, number: usize) -> anyhow::Result<Server> {
        Server::start(&self.topology.mail, BACKEND_PORTS[number], number, true)
    }

    /// A server without PROXY.
    pub(crate) fn standard(&self, port: u16) -> anyhow::Result<Server> {
        Server::start(&self.topology.mail, port, 9, false)
    }

    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        self.client_at(PORT)
    }

    pub(crate) fn client_at(&self, port: u16) -> anyhow::Result<Client> {
        self.connect(SocketAddr::new(VIP_SPLICE.of(Family::V4), port))
    }

    pub(crate) fn connect(&self, address: SocketAddr) -> anyhow::Result<Client> {
        let stream = self.topology.client.run(|| TcpStream::connect_timeout(&address, LIMIT))??;
        Client::new(stream)
    }

    /// Which backend greets a new client, which then closes.
    pub(crate) fn who_answers(&self) -> anyhow::Result<usize> {
        let mut client = self.client()?;
        let number = client.greeted()?;
        client.quit()?;
        Ok(number)
    }
}

/// A configuration: the engine, the lines of its one listener `test`, and other tables.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) engine: String,
    pub(crate) bind: Vec<u16>,
    pub(crate) backends: String,
    /// Lines and tables of the listener.
    pub(crate) listener: String,
    /// Tables before the listener.
    pub(crate) top: String,
}

impl Config {
    pub(crate) fn new(engine: &str) -> Self {
        Self {
            engine: engine.to_owned(),
            bind: vec![PORT],
            backends: format!("\"{}\"", backend_name(0)),
            listener: String::new(),
            top: String::new(),
        }
    }

    pub(crate) fn text(&self) -> String {
        let Self { engine, bind, backends, listener, top } = self;
        let mut text = format!("[metrics]\nlisten = \"127.0.0.1:9145\"\n\n{ADMIN}\n{EAGER}\n{top}\n");
        let bind: Vec<_> = bind.iter().map(|port| format!("\"{}:{port}\"", VIP_SPLICE.v4)).collect();
        text += &another("test", engine, &bind.join(", "), backends);
        let _ = writeln!(text, "{listener}");
        text
    }
}

/// One more listener.
pub(crate) fn another(name: &str, engine: &str, bind: &str, backends: &str) -> String {
    format!(
        "\n[[listener]]\nname = \"{name}\"\nbind = [{bind}]\nprotocol = \"smtp\"\nengine = \"{engine}\"\n\
         backends = [{backends}]\n"
    )
}

pub(crate) fn bind_of(port: u16) -> String {
    format!("\"{}:{port}\"", VIP_SPLICE.v4)
}

/// A backend as configurations name it.
pub(crate) fn backend_name(number: usize) -> String {
    format!("{}:{}", MAIL.v4, BACKEND_PORTS[number])
}

/// A server that greets with its number, accepts every command, and responds to QUIT.
#[derive(Debug)]
pub(crate) struct Server {
    ended: Arc<AtomicBool>,
    accepting: Option<thread::JoinHandle<()>>,
    pub(crate) sessions: Arc<AtomicUsize>,
    /// Sessions that did not end by QUIT and its reply.
    pub(crate) broken: Arc<AtomicUsize>,
}

impl Server {
    fn start(netns: &Netns, port: u16, number: usize, header: bool) -> anyhow::Result<Self> {
        let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
        let listener = netns.listen(address)?;
        listener.set_nonblocking(true)?;
        let ended = Arc::new(AtomicBool::new(false));
        let (sessions, broken) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (stop, count, failures) = (Arc::clone(&ended), Arc::clone(&sessions), Arc::clone(&broken));
        let accepting = thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let Ok((stream, _)) = listener.accept() else {
                    thread::sleep(Duration::from_millis(2));
                    continue;
                };
                count.fetch_add(1, Ordering::Relaxed);
                let failures = Arc::clone(&failures);
                thread::spawn(move || {
                    if serve(stream, number, header).is_err() {
                        failures.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        Ok(Self { ended, accepting: Some(accepting), sessions, broken })
    }

    pub(crate) fn seen(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    /// Stops accepting and releases the port; sessions continue.
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn serve(stream: TcpStream, number: usize, header: bool) -> anyhow::Result<()> {
    stream.set_nonblocking(false)?;
    patient(&stream)?;
    let mut reader = BufReader::new(stream);
    if header {
        // Version 2 with IPv4: 16 bytes, and 12 more; with LOCAL none.
        let mut fixed = [0; 16];
        reader.read_exact(&mut fixed)?;
        let mut rest = vec![0; usize::from(u16::from_be_bytes([fixed[14], fixed[15]]))];
        reader.read_exact(&mut rest)?;
        ensure!(fixed.starts_with(b"\r\n\r\n\0\r\nQUIT\n"), "no header");
    }
    reader.get_mut().write_all(format!("220 {number}\r\n").as_bytes())?;
    loop {
        let mut line = String::new();
        ensure!(reader.read_line(&mut line)? > 0, "hung up");
        if line.starts_with("QUIT") {
            reader.get_mut().write_all(b"221 bye\r\n")?;
            reader.get_mut().shutdown(Shutdown::Write)?;
            let mut rest = Vec::new();
            reader.read_to_end(&mut rest)?;
            return Ok(());
        }
        reader.get_mut().write_all(b"250 ok\r\n")?;
    }
}

/// A connected client.
#[derive(Debug)]
pub(crate) struct Client(BufReader<TcpStream>);

impl Client {
    pub(crate) fn new(stream: TcpStream) -> anyhow::Result<Self> {
        patient(&stream)?;
        Ok(Self(BufReader::new(stream)))
    }

    pub(crate) fn address(&self) -> anyhow::Result<SocketAddr> {
        Ok(self.0.get_ref().local_addr()?)
    }

    pub(crate) fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    /// Reads the greeting; returns the number of the backend.
    pub(crate) fn greeted(&mut self) -> anyhow::Result<usize> {
        let line = self.line()?;
        let number = line.strip_prefix("220 ").and_then(|number| number.parse().ok());
        number.with_context(|| format!("greeted with {line:?}"))
    }

    /// Sends a command that the server accepts.
    pub(crate) fn talk(&mut self) -> anyhow::Result<()> {
        self.0.get_mut().write_all(b"NOOP\r\n")?;
        let line = self.line()?;
        ensure!(line == "250 ok", "{line:?} to NOOP");
        Ok(())
    }

    pub(crate) fn quit(mut self) -> anyhow::Result<()> {
        self.0.get_mut().write_all(b"QUIT\r\n")?;
        let line = self.line()?;
        ensure!(line == "221 bye", "{line:?} to QUIT");
        Ok(())
    }

    /// Checks that the connection ends: by a reset if the kernel forwards it, otherwise with a
    /// message of the protocol.
    pub(crate) fn ends(mut self, engine: &str) -> anyhow::Result<()> {
        let mut rest = Vec::new();
        let _ = self.0.read_to_end(&mut rest);
        let rest = String::from_utf8_lossy(&rest);
        let expected = match engine {
            "splice" => rest.is_empty(),
            _ => rest.starts_with("421 4.3.2 ") && rest.ends_with("\r\n"),
        };
        ensure!(expected, "{rest:?} before the end");
        Ok(())
    }
}
