//! Engine selection: when `engine = "auto"` selects inline, the reasons when it does not, and when
//! `engine = "inline"` fails to start.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::{ADMIN, BPF_EVENTS, Injector, binary};
use injector_testbed::netns::{EDGE_INSIDE, Netns, VIP_SPLICE};
use injector_testbed::wait::wait_until;

use crate::startup::{WITHOUT_RIGHTS, fails, selftest};
use crate::testbed::{BACKEND_PORT, PORT, Testbed, accept, accept_with_header, config, pass};

type Run = fn(&Testbed) -> anyhow::Result<()>;

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("inline/the programs pass the self-test", programs),
    ("inline/selftest, log and metrics agree", reports_agree),
    ("inline/selftest without capabilities", selftest_without_capabilities),
    ("inline/a second daemon with the same pins names the first", same_pins),
    ("auto/inline in front of splice", auto_routed),
    ("auto/splice for a backend on the host", auto_local),
    ("auto/splice where pinning is impossible", auto_without_pins),
    ("auto/splice with a CRC-32C TLV", auto_crc32c),
    ("auto/inline where the host forwards nothing", auto_not_forwarded),
    ("auto/inline and splice in one daemon", auto_both),
    ("auto/back to sockets after a restart", back_to_sockets),
    ("auto/back to sockets and to inline by reload", reloaded),
];

/// A BPF file system for pins; detached on drop.
struct Pins<'a> {
    edge: &'a Netns,
    bpffs: BpfFs,
}

impl<'a> Pins<'a> {
    fn new(testbed: &'a Testbed) -> anyhow::Result<Self> {
        Ok(Self { edge: &testbed.topology.edge, bpffs: BpfFs::mount()? })
    }

    /// The table `[inline]`, for the end of a file.
    fn table(&self) -> String {
        format!("[inline]\npin = \"{}\"\n", self.bpffs.path().display())
    }

    /// A configuration with that table.
    fn config(&self, engine: &str, extra: &str) -> String {
        config(engine, "smtp", &format!("{extra}\n\n{}", self.table()))
    }

    fn start(&self, engine: &str, extra: &str) -> anyhow::Result<Injector> {
        Injector::start(self.edge, &self.config(engine, extra))
    }

    fn detach(&self) -> anyhow::Result<()> {
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(self.config("inline", "").as_bytes())?;
        let mut command = self.edge.command(binary()?);
        let output = command.args(["inline", "detach", "--config"]).arg(file.path()).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

impl Drop for Pins<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            eprintln!("detaching: {error:#}");
        }
    }
}

/// While this exists, the edge does not forward IPv4.
struct ForwardingDisabled<'a>(&'a Netns);

impl<'a> ForwardingDisabled<'a> {
    fn new(edge: &'a Netns) -> anyhow::Result<Self> {
        edge.sysctl("net/ipv4/ip_forward", "0")?;
        Ok(Self(edge))
    }
}

impl Drop for ForwardingDisabled<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.sysctl("net/ipv4/ip_forward", "1") {
            eprintln!("{error:#}");
        }
    }
}

/// The programs alone: [`injector_user::engine::inline::selftest`] is their unit test as well.
fn programs(_: &Testbed) -> anyhow::Result<()> {
    const EXPECTED: [&str; 8] = [
        "load",
        "header_added",
        "header_waits",
        "shifted",
        "header_retransmitted",
        "fail_closed",
        "left_to_sockets",
        "sweep",
    ];
    // The processor may be busy, but not every time.
    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        let (checks, programs) = injector_user::engine::inline::selftest::run();
        ensure!(checks.iter().map(|check| check.name).eq(EXPECTED), "{checks:#?}");
        ensure!(checks.iter().all(|check| check.result.is_ok()), "{checks:#?}");
        ensure!(programs.len() == 3, "{programs:?}");
        fastest = fastest.min(checks.iter().map(|check| check.took).sum());
    }
    println!("  {fastest:?}");
    ensure!(fastest < Duration::from_secs(2), "took {fastest:?}");
    Ok(())
}

fn reports_agree(testbed: &Testbed) -> anyhow::Result<()> {
    let found = selftest(testbed, &["sh", "-c"])?;
    let checks = found["inline"]["checks"].as_array().context("no checks")?;
    ensure!(checks.len() == 8 && checks.iter().all(|check| check["passed"] == true), "{found:#}");
    let pinned = Pins::new(testbed)?;
    let injector = pinned.start("inline", "")?;
    let (log, metrics) = (injector.log(), injector.metrics()?);
    for name in checks.iter().filter_map(|check| check["name"].as_str()) {
        let labels = [("engine", "inline"), ("check", name)];
        ensure!(log.contains(&format!("\"check\":\"{name}\",\"passed\":true")), "{name} is not in {log}");
        ensure!((metrics.sum("injector_selftest_check", &labels) - 1.0).abs() < 0.5, "{name} is not 1");
        ensure!(metrics.sum("injector_selftest_check_seconds", &labels) > 0.0, "{name} took no time");
    }
    // Splice serves what inline does not take.
    for engine in ["inline", "splice", "relay"] {
        let seen = metrics.sum("injector_engine_available", &[("engine", engine)]);
        ensure!((seen - 1.0).abs() < 0.5, "{engine} is {seen}");
    }
    Ok(())
}

fn selftest_without_capabilities(testbed: &Testbed) -> anyhow::Result<()> {
    let found = selftest(testbed, &WITHOUT_RIGHTS)?;
    let fault = found["inline"]["failure"].as_str().context("no fault")?;
    ensure!(fault.contains("CAP_BPF and CAP_NET_ADMIN"), "{fault}");
    Ok(())
}

/// Checks that the daemon selected this engine, and logged the reason.
fn chosen(injector: &Injector, engine: &str, reason: &str) -> anyhow::Result<()> {
    let log = injector.log();
    let line = log.lines().find(|line| line.contains("\"engine selected\"")).context("no engine selected")?;
    ensure!(line.contains(&format!("\"engine\":\"{engine}\"")), "{log}");
    ensure!(line.contains(reason), "no {reason:?} in {line}");
    Ok(())
}

/// A connection works: with inline the header is added to a packet, with sockets the daemon sends
/// it.
fn serves(testbed: &Testbed, injector: &Injector, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let mut client = testbed.client()?;
    let (mut server, header, _) = accept_with_header(&backend)?;
    ensure!(header.source == client.local_addr()?, "{header:?}");
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    pass(&mut client, &mut server, b"QUIT\r\n")?;
    drop((client, server));
    let session = injector.sessions_within(1)?.remove(0);
    ensure!(session.field("engine").as_deref() == Some(engine), "{session:?}");
    Ok(())
}

fn auto_routed(testbed: &Testbed) -> anyhow::Result<()> {
    let pinned = Pins::new(testbed)?;
    let injector = pinned.start("auto", "max_connections = 5\n")?;
    chosen(&injector, "inline+splice", "auto: all checks of inline and splice passed")?;
    serves(testbed, &injector, "inline")
}

/// The program sees that the backend is an address of the host, and leaves the connection to the
/// socket.
fn auto_local(testbed: &Testbed) -> anyhow::Result<()> {
    let pinned = Pins::new(testbed)?;
    let backend = format!("backends = [\"{}:{BACKEND_PORT}\"]\n", EDGE_INSIDE.v4);
    let injector = pinned.start("auto", &backend)?;
    chosen(&injector, "inline+splice", "auto")?;
    // The backend is reachable there.
    let listen = || std::net::TcpListener::bind((EDGE_INSIDE.v4, BACKEND_PORT));
    let backend = testbed.topology.edge.run(listen)??;
    let _client = testbed.client()?;
    accept(&backend)?;
    Ok(())
}

fn auto_without_pins(testbed: &Testbed) -> anyhow::Result<()> {
    const NOT_THERE: &str = "/run/injector-faults";
    let config = config("auto", "smtp", &format!("\n\n[inline]\npin = \"{NOT_THERE}\"\n"));
    let injector = Injector::start(&testbed.topology.edge, &config)?;
    chosen(&injector, "splice", "inline.pin must be in a BPF file system")?;
    ensure!(!std::path::Path::new(NOT_THERE).exists(), "{NOT_THERE} was made");
    serves(testbed, &injector, "splice")
}

fn auto_crc32c(testbed: &Testbed) -> anyhow::Result<()> {
    let pinned = Pins::new(testbed)?;
    let injector = pinned.start("auto", "\n\n[listener.receiver]\ncrc32c = true\n")?;
    chosen(
        &injector,
        "splice",
        "not inline: cannot make the header for each connection, which receiver.crc32c needs",
    )
}

fn auto_not_forwarded(testbed: &Testbed) -> anyhow::Result<()> {
    let pinned = Pins::new(testbed)?;
    let _not = ForwardingDisabled::new(&testbed.topology.edge)?;
    let injector = pinned.start("auto", "")?;
    chosen(&injector, "inline+splice", "auto")?;
    serves(testbed, &injector, "inline")
}

/// One listener uses inline, one splice, in one daemon.
fn auto_both(testbed: &Testbed) -> anyhow::Result<()> {
    const OTHER_PORT: u16 = PORT + 1;
    let pinned = Pins::new(testbed)?;
    let here = (EDGE_INSIDE.v4, BACKEND_PORT);
    let other = format!(
        "\n\n[[listener]]\nname = \"local\"\nbind = [\"{}:{OTHER_PORT}\"]\nprotocol = \"smtp\"\n\
         engine = \"splice\"\nbackends = [\"{}:{BACKEND_PORT}\"]\n",
        VIP_SPLICE.v4, here.0
    );
    let injector = pinned.start("auto", &other)?;
    let log = injector.log();
    for (listener, engine) in [("test", "inline+splice"), ("local", "splice")] {
        let chosen = |line: &&str| line.contains("\"engine selected\"") && line.contains(listener);
        let line = log.lines().find(chosen).with_context(|| format!("nothing of {listener} in {log}"))?;
        ensure!(line.contains(&format!("\"engine\":\"{engine}\"")), "{line}");
    }
    serves(testbed, &injector, "inline")?;
    let backend = testbed.topology.edge.run(|| std::net::TcpListener::bind(here))??;
    let connect = || std::net::TcpStream::connect((VIP_SPLICE.v4, OTHER_PORT));
    let mut client = testbed.topology.client.run(connect)??;
    let (mut server, header, _) = accept_with_header(&backend)?;
    ensure!(header.source == client.local_addr()?, "{header:?}");
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    let metrics = injector.metrics()?;
    for (program, event) in [("inline", "appended"), ("inject", "header_alone")] {
        let count = metrics.sum(BPF_EVENTS, &[("program", program), ("event", event)]);
        ensure!(count > 0.5, "{program} has counted no {event}");
    }
    Ok(())
}

/// Pinned programs of an earlier run would take every new connection before the sockets.
fn back_to_sockets(testbed: &Testbed) -> anyhow::Result<()> {
    let pinned = Pins::new(testbed)?;
    let injector = pinned.start("auto", "")?;
    chosen(&injector, "inline+splice", "auto")?;
    // An existing inline connection continues.
    let backend = testbed.backend()?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    drop(backend);
    injector.stop()?;
    let injector = pinned.start("splice", "")?;
    serves(testbed, &injector, "splice")?;
    pass(&mut client, &mut server, b"QUIT\r\n")?;
    pass(&mut server, &mut client, b"221 bye\r\n")
}

/// Of two daemons with the same pins, the second starts nothing and names the first.
fn same_pins(testbed: &Testbed) -> anyhow::Result<()> {
    let pinned = Pins::new(testbed)?;
    let injector = pinned.start("inline", "")?;
    let other = pinned.config("inline", "").replace(":2500", ":2600").replace(":9145", ":9146");
    let process = format!("another injector (process {}) runs engine \"inline\"", injector.pid());
    fails(testbed, &[], &other, &[&process, "stop it first"])?;
    serves(testbed, &injector, "inline")
}

/// A listener leaves inline and comes back, while a connection of inline continues.
fn reloaded(testbed: &Testbed) -> anyhow::Result<()> {
    let pinned = Pins::new(testbed)?;
    let admin = format!("\n\n{ADMIN}");
    let injector = pinned.start("auto", &admin)?;
    let backend = testbed.backend()?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    for (engine, label) in [("splice", "splice"), ("auto", "inline+splice")] {
        injector.rewrite(&pinned.config(engine, &admin))?;
        injector.command(&["reload"])?;
        // The programs follow a reload within a moment.
        std::thread::sleep(Duration::from_millis(500));
        let shown = injector.command(&["status"])?;
        ensure!(
            shown.contains(&format!("engine {label})")) && shown.contains("1 active (1 inline)"),
            "{shown}"
        );
        let mut other = testbed.client()?;
        let (mut other_server, ..) = accept_with_header(&backend)?;
        pass(&mut other_server, &mut other, b"220 hello\r\n")?;
        let shown = injector.command(&["status"])?;
        let active = if engine == "auto" { "2 active (2 inline)" } else { "2 active (1 inline)" };
        ensure!(shown.contains(active), "{engine}: {shown}");
        drop((other, other_server));
        let status = || injector.command(&["status"]);
        wait_until("the other's end", status, |shown| shown.contains("1 active (1 inline)"))?;
    }
    pass(&mut client, &mut server, b"QUIT\r\n")
}

/// A configuration with which the daemon does not start.
pub(crate) struct InvalidStart {
    pub(crate) name: &'static str,
    /// The command that runs the daemon.
    prefix: &'static [&'static str],
    /// Lines of the listener, and tables after it.
    extra: &'static str,
    /// Replaces the BPF file system.
    pin: Option<&'static str>,
    /// Words of the error.
    words: &'static [&'static str],
}

const PLAIN: InvalidStart = InvalidStart { name: "", prefix: &[], extra: "", pin: None, words: &[] };

pub(crate) const INVALID_STARTS: &[InvalidStart] = &[
    InvalidStart {
        name: "a header with a CRC-32C TLV",
        extra: "\n\n[listener.receiver]\ncrc32c = true\n",
        words: &["listener \"test\"", "receiver.crc32c", "use engine splice"],
        ..PLAIN
    },
    InvalidStart {
        name: "pinning is impossible",
        pin: Some("/run/injector-faults"),
        words: &[
            "/run/injector-faults",
            "inline.pin must be in a BPF file system (mount -t bpf bpf /sys/fs/bpf)",
        ],
        ..PLAIN
    },
    InvalidStart {
        name: "no capabilities",
        prefix: &["setpriv", "--bounding-set=-all", "--inh-caps=-all"],
        words: &[
            "listener \"test\"",
            "engine \"inline\" cannot run here",
            "CAP_BPF and CAP_NET_ADMIN",
            "injector selftest",
        ],
        ..PLAIN
    },
];

/// Checks the error, and that nothing is left behind.
pub(crate) fn check_rejected(testbed: &Testbed, case: &InvalidStart) -> anyhow::Result<()> {
    let pinned = Pins::new(testbed)?;
    let mut text = pinned.config("inline", case.extra);
    if let Some(pin) = case.pin {
        text = text.replace(&pinned.bpffs.path().display().to_string(), pin);
    }
    fails(testbed, case.prefix, &text, case.words)?;
    if let Some(pin) = case.pin {
        ensure!(!std::path::Path::new(pin).exists(), "{pin} was made");
    }
    // The file system has files of its own; the directory of the daemon is named after the
    // version of the layout.
    for entry in std::fs::read_dir(pinned.bpffs.path())? {
        let path = entry?.path();
        let is_version = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('v'));
        ensure!(!is_version, "{} was made", path.display());
    }
    Ok(())
}
