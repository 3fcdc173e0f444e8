//! The testbed of the live run: an injector with all three engines, mail servers, Prometheus and
//! its exporters, and clients of every kind that the panels distinguish. No packet leaves the
//! namespaces.

use std::{
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Output},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use injector_testbed::{
    bpffs::BpfFs,
    certificate::MAIL_NAME,
    daemon::{self, EAGER, Injector},
    dovecot::PASSWORD,
    mail_client::{self, Server},
    mail_host::MailHost,
    message::{DOMAIN, Message},
    netns::{
        self, Family, HostAddresses, MAIL, Netns, Topology, VIP_HAPROXY, VIP_INLINE, VIP_RELAY, VIP_SPLICE,
    },
    process::Process,
    service::{IMAPS, SMTP, SUBMISSION, Service},
};
use tempfile::TempDir;
use tokio::net::TcpSocket;

use super::{
    feeds::{self, Feeds},
    prometheus::Api,
};
use crate::cargo;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const METRICS: SocketAddr = SocketAddr::new(LOOPBACK, 9145);
const PROMETHEUS: SocketAddr = SocketAddr::new(LOOPBACK, 9090);
const PUSHGATEWAY: SocketAddr = SocketAddr::new(LOOPBACK, 9091);
const NODE_EXPORTER: SocketAddr = SocketAddr::new(LOOPBACK, 9100);

/// Ports of listeners whose backends misbehave.
const DEAD: u16 = 8025;
const MUTE: u16 = 8026;
const SLOW: u16 = 8027;

/// How long a program may take to open its ports.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Everything that runs. Fields are dropped in this order, so programs end before their namespaces.
pub(super) struct Testbed {
    _watchers: Vec<Process>,
    injector: Injector,
    _feeds: Feeds,
    host: MailHost,
    folder: TempDir,
    _bpffs: BpfFs,
    topology: Topology,
    /// Users have numbers as names, because each message gets its own mailbox.
    next: AtomicU64,
}

impl Testbed {
    pub(super) fn new() -> Result<Self> {
        let topology = Topology::new().context("cannot create the network namespaces")?;
        let host = MailHost::start(&topology.mail)?;
        let bpffs = BpfFs::mount()?;
        let folder = netns::scratch_dir("observe")?;
        let feeds = Feeds::start(&topology.edge, folder.path())?;
        let injector = Injector::start(&topology.edge, &configuration(bpffs.path(), folder.path()))?;
        topology.client.ip(&["address", "add", &format!("{}/32", feeds::BANNED), "dev", "eth0"])?;
        let watchers = watchers(&topology.edge, folder.path())?;
        fs::write(folder.path().join("ca.pem"), &host.certificate.authority_pem)?;
        Ok(Self {
            _watchers: watchers,
            injector,
            _feeds: feeds,
            host,
            folder,
            _bpffs: bpffs,
            topology,
            next: AtomicU64::new(0),
        })
    }

    /// The API of the Prometheus that scrapes the injector.
    pub(super) fn api(&self) -> Api {
        Api::new(self.topology.edge.handle(), PROMETHEUS)
    }

    /// Runs clients of every kind while `meanwhile` runs.
    pub(super) fn with_traffic<T>(&self, meanwhile: impl FnOnce() -> Result<T>) -> Result<T> {
        let mute = self.topology.mail.run(|| TcpListener::bind((MAIL.v4, MUTE)))??;
        let slow = self.topology.mail.run(|| TcpListener::bind((MAIL.v4, SLOW)))??;
        mute.set_nonblocking(true)?;
        slow.set_nonblocking(true)?;
        let over = AtomicBool::new(false);
        let run = Running(&over);
        thread::scope(|scope| {
            let _end = End(&over);
            scope.spawn(|| hang_up(&mute, run));
            scope.spawn(|| read_slowly(&slow, run));
            for port in [DEAD, MUTE] {
                scope.spawn(move || self.knock(port, run));
            }
            scope.spawn(|| self.forge(run));
            scope.spawn(|| self.try_banned(run));
            scope.spawn(|| self.flood(run));
            let mail = [(VIP_SPLICE, SMTP), (VIP_RELAY, SUBMISSION), (VIP_INLINE, SMTP), (VIP_HAPROXY, SMTP)];
            let mail = mail.map(|(vip, service)| scope.spawn(move || self.mail(vip, service, run)));
            let outcome = meanwhile();
            over.store(true, Ordering::Relaxed);
            for client in mail {
                match client.join() {
                    Ok(sent) => sent.with_context(|| {
                        format!("mail failed; the injector logged\n{}", self.injector.log())
                    })?,
                    Err(_) => anyhow::bail!("a mail client panicked"),
                }
            }
            outcome
        })
    }

    /// Runs the probe in the client's namespace.
    pub(super) fn probe(&self, name: &str, password: &str, publish: &[&str]) -> Result<Output> {
        let secret = self.folder.path().join(format!("{name}.password"));
        fs::write(&secret, password)?;
        let server = |port| SocketAddr::new(VIP_SPLICE.of(Family::V4), port).to_string();
        // The probe runs on the edge, where the Pushgateway and the folder for text files are.
        let mut command: Command = self.topology.edge.command(daemon::binary()?);
        command.args(["probe", "--name", name, "--smtp", &server(25), "--imap", &server(993)]);
        command.args(["--from", "probe@client.example.test", "--to", &format!("probe-{name}@{DOMAIN}")]);
        command.args([
            "--user",
            &format!("probe-{name}"),
            "--tls-name",
            MAIL_NAME,
            "--hello",
            "client.example.test",
        ]);
        command
            .arg("--password-file")
            .arg(&secret)
            .arg("--ca")
            .arg(self.folder.path().join("ca.pem"))
            .args(publish);
        command.output().context("cannot run the probe")
    }

    /// Where node_exporter looks for text files.
    pub(super) fn textfile(&self, name: &str) -> String {
        self.folder.path().join("textfile").join(format!("{name}.prom")).display().to_string()
    }

    pub(super) fn gateway() -> String {
        format!("http://{PUSHGATEWAY}")
    }

    pub(super) fn password() -> &'static str {
        PASSWORD
    }

    /// Sends and fetches messages, one after another.
    fn mail(&self, vip: HostAddresses, service: Service, run: Running<'_>) -> Result<()> {
        while run.on() {
            let user = format!("observe-{}", self.next.fetch_add(1, Ordering::Relaxed));
            let message = Message::new(&user, &user);
            let client = &self.topology.client;
            mail_client::send(client, self.server(vip, service.standard), service.security, &user, &message)?;
            mail_client::read_inbox(client, self.server(VIP_SPLICE, IMAPS.standard), &user, &[])?;
            run.pause(Duration::from_millis(500));
        }
        Ok(())
    }

    fn server(&self, vip: HostAddresses, port: u16) -> Server<'_> {
        let authority_pem = &self.host.certificate.authority_pem;
        Server { address: SocketAddr::new(vip.of(Family::V4), port), authority_pem }
    }

    /// A client that is rejected.
    fn knock(&self, port: u16, run: Running<'_>) {
        while run.on() {
            let _ =
                self.topology.client.run(|| talk(SocketAddr::new(VIP_SPLICE.v4.into(), port), b"EHLO x\r\n"));
            run.pause(Duration::from_millis(400));
        }
    }

    /// A client that sends its own PROXY header.
    fn forge(&self, run: Running<'_>) {
        const SIGNATURE: &[u8] =
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x01\x02\x03\x04\x05\x06\x07\x08\0\x09\0\x0a";
        while run.on() {
            let smtp = SocketAddr::new(VIP_SPLICE.v4.into(), SMTP.standard);
            let _ = self.topology.client.run(|| talk(smtp, SIGNATURE));
            run.pause(Duration::from_secs(2));
        }
    }

    /// A client that is banned.
    fn try_banned(&self, run: Running<'_>) {
        while run.on() {
            let _ = self.topology.client.run(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(async {
                    let socket = TcpSocket::new_v4()?;
                    socket.bind((feeds::BANNED, 0).into())?;
                    let smtp = SocketAddr::new(VIP_SPLICE.v4.into(), SMTP.standard);
                    let connect = socket.connect(smtp);
                    tokio::time::timeout(Duration::from_millis(500), connect).await??;
                    anyhow::Ok(())
                })
            });
            run.pause(Duration::from_millis(500));
        }
    }

    /// A client that sends faster than its backend reads, so that the kernel's backlog grows and
    /// the direction is paused.
    fn flood(&self, run: Running<'_>) {
        let slow = SocketAddr::new(VIP_SPLICE.v4.into(), SLOW);
        let _ = self.topology.client.run(|| -> Result<()> {
            let mut stream = TcpStream::connect(slow)?;
            stream.set_write_timeout(Some(Duration::from_millis(500)))?;
            while run.on() {
                // A full send buffer is the purpose.
                let _ = stream.write(&[b'x'; 8192]);
                thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        });
    }
}

/// Whether the clients continue.
#[derive(Clone, Copy)]
struct Running<'a>(&'a AtomicBool);

impl Running<'_> {
    fn on(self) -> bool {
        !self.0.load(Ordering::Relaxed)
    }

    fn pause(self, time: Duration) {
        const SLICE: Duration = Duration::from_millis(50);
        let mut left = time;
        while self.on() && !left.is_zero() {
            thread::sleep(left.min(SLICE));
            left = left.saturating_sub(SLICE);
        }
    }
}

/// Stops the clients when the scope is left, also by an error.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends something and reads until the end; the daemon counts the outcome.
fn talk(address: SocketAddr, words: &[u8]) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    stream.write_all(words)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// A backend that rejects the header.
fn hang_up(listener: &TcpListener, run: Running<'_>) {
    while run.on() {
        if let Ok((mut stream, _)) = listener.accept() {
            // Without reading the whole header, closing would reset the connection.
            let _ = stream.set_nonblocking(false);
            let _ = stream.set_read_timeout(Some(Duration::from_millis(100)));
            let _ = stream.read(&mut [0; 536]);
        }
        run.pause(Duration::from_millis(20));
    }
}

/// A backend that reads 400 KB each second.
fn read_slowly(listener: &TcpListener, run: Running<'_>) {
    let mut streams = Vec::new();
    let mut buffer = [0; 20_000];
    while run.on() {
        if let Ok((stream, _)) = listener.accept() {
            let _ = stream.set_nonblocking(true);
            streams.push(stream);
        }
        for stream in &mut streams {
            let _ = stream.read(&mut buffer);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// The configuration: all three engines in one daemon, and what it follows.
fn configuration(pin: &Path, folder: &Path) -> String {
    let other = |port: u16| format!("\"{}\"", SocketAddr::new(MAIL.v4.into(), port));
    let mail = |service: Service| other(service.proxied);
    let service = format!("{{ service = \"{}\", port = \"smtp\" }}", feeds::SERVICE);
    let listeners = [
        ("smtp", "smtp", "splice", VIP_SPLICE, SMTP.standard, mail(SMTP)),
        ("imaps", "imaps", "splice", VIP_SPLICE, IMAPS.standard, mail(IMAPS)),
        ("submission", "submission", "relay", VIP_RELAY, SUBMISSION.standard, mail(SUBMISSION)),
        ("smtp-inline", "smtp", "inline", VIP_INLINE, SMTP.standard, mail(SMTP)),
        ("smtp-pods", "smtp", "splice", VIP_HAPROXY, SMTP.standard, service),
        // No server listens there.
        ("dead", "smtp", "splice", VIP_SPLICE, DEAD, other(DEAD)),
        ("mute", "smtp", "splice", VIP_SPLICE, MUTE, other(MUTE)),
        ("slow", "plain", "splice", VIP_SPLICE, SLOW, other(SLOW)),
    ];
    let mut text = format!(
        "[metrics]\nlisten = \"{METRICS}\"\n\n{EAGER}\n[inline]\npin = \"{}/inline\"\n",
        pin.display()
    );
    text.push_str(&feeds::tables(folder, pin));
    for (name, protocol, engine, vip, port, backend) in listeners {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "\n[[listener]]\nname = \"{name}\"\nbind = [\"{}:{port}\"]\nprotocol = \"{protocol}\"\n\
             engine = \"{engine}\"\nbackends = [{backend}]\n",
            vip.v4
        );
    }
    text
}

/// node_exporter, a Pushgateway, and Prometheus with the example's configuration.
fn watchers(edge: &Netns, folder: &Path) -> Result<Vec<Process>> {
    let textfiles = folder.join("textfile");
    fs::create_dir(&textfiles)?;
    let config = folder.join("prometheus.yml");
    fs::write(&config, scrape_configuration()?)?;
    fs::copy(
        cargo::workspace().join("deploy/prometheus/injector.rules.yml"),
        folder.join("injector.rules.yml"),
    )?;
    let flag = |name: &str, value: &dyn std::fmt::Display| format!("--{name}={value}");
    let programs: [(&'static str, SocketAddr, Vec<String>); 3] = [
        (
            "prometheus-node-exporter",
            NODE_EXPORTER,
            vec![
                "--collector.disable-defaults".to_owned(),
                "--collector.textfile".to_owned(),
                flag("collector.textfile.directory", &textfiles.display()),
                flag("web.listen-address", &NODE_EXPORTER),
            ],
        ),
        ("prometheus-pushgateway", PUSHGATEWAY, vec![flag("web.listen-address", &PUSHGATEWAY)]),
        (
            "prometheus",
            PROMETHEUS,
            vec![
                flag("config.file", &config.display()),
                flag("storage.tsdb.path", &folder.join("tsdb").display()),
                flag("web.listen-address", &PROMETHEUS),
            ],
        ),
    ];
    let mut started = Vec::new();
    for (name, address, flags) in programs {
        let mut command = edge.command(name);
        command.args(flags);
        let output = folder.join(format!("{name}.out"));
        let mut process = Process::start(name, edge, command, &output)?;
        process.wait_listening(edge, &[address], START_LIMIT).with_context(|| {
            format!("{name} printed\n{}", fs::read_to_string(&output).unwrap_or_default())
        })?;
        started.push(process);
    }
    Ok(started)
}

/// The example in `deploy`, with this run's addresses, and intervals that show something within a
/// minute.
fn scrape_configuration() -> Result<String> {
    let file = cargo::workspace().join("deploy/prometheus/scrape.yml");
    let mut text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    for (from, to) in [
        ("edge1.example.org:9145", METRICS.to_string()),
        ("edge1.example.org:9100", NODE_EXPORTER.to_string()),
        ("pushgateway.example.org:9091", PUSHGATEWAY.to_string()),
        ("scrape_interval: 30s", "scrape_interval: 1s".to_owned()),
        ("evaluation_interval: 30s", "evaluation_interval: 1s".to_owned()),
    ] {
        ensure!(text.contains(from), "{} has no {from:?} any more", file.display());
        text = text.replace(from, &to);
    }
    Ok(text)
}
