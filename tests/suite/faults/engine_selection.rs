//! Engine selection: when `engine = "auto"` selects inline, the reasons when it does not, and when
//! `engine = "inline"` fails to start.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use injector_testbed::bpffs::BpfFs;
use injector_testbed::daemon::{BPF_EVENTS, Injector, binary};
use injector_testbed::netns::{EDGE_INSIDE, Netns, VIP_SPLICE};

use crate::startup::{WITHOUT_RIGHTS, fails, selftest};
use crate::testbed::{BACKEND_PORT, PORT, Testbed, accept, accept_with_header, config, pass};

type Run = fn(&Testbed) -> anyhow::Result<()>;

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("inline/the programs pass the self-test", programs),
    ("inline/selftest, log and metrics agree", reports_agree),
    ("inline/selftest without capabilities", selftest_without_capabilities),
    ("auto/inline where the backend is reached by forwarding", auto_routed),
    ("auto/splice where the backend is on the host", auto_local),
    ("auto/splice without a table [inline]", auto_without_table),
    ("auto/splice with a CRC-32C TLV", auto_crc32c),
    ("auto/splice where nothing is forwarded", auto_not_forwarded),
    ("auto/inline and splice in one daemon", auto_both),
    ("auto/back to sockets, with the NAT rules removed", back_to_sockets),
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
        format!("[inline]\ntable = \"injector-faults\"\npin = \"{}\"\n", self.bpffs.path().display())
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
    const EXPECTED: [&str; 7] =
        ["load", "header_added", "header_waits", "shifted", "header_retransmitted", "fail_closed", "swept"];
    // The processor may be busy, but not every time.
    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        let (checks, programs) = injector_user::engine::inline::selftest::run();
        ensure!(checks.iter().map(|check| check.name).eq(EXPECTED), "{checks:#?}");
        ensure!(checks.iter().all(|check| check.result.is_ok()), "{checks:#?}");
        ensure!(programs.len() == 7, "{programs:?}");
        fastest = fastest.min(checks.iter().map(|check| check.took).sum());
    }
    println!("  {fastest:?}");
    ensure!(fastest < Duration::from_millis(500), "took {fastest:?}");
    Ok(())
}

fn reports_agree(testbed: &Testbed) -> anyhow::Result<()> {
    let found = selftest(testbed, &["sh", "-c"])?;
    let checks = found["inline"]["checks"].as_array().context("no checks")?;
    ensure!(checks.len() == 7 && checks.iter().all(|check| check["passed"] == true), "{found:#}");
    let pinned = Pins::new(testbed)?;
    let injector = pinned.start("inline", "")?;
    let (log, metrics) = (injector.log(), injector.metrics()?);
    for name in checks.iter().filter_map(|check| check["name"].as_str()) {
        let labels = [("engine", "inline"), ("check", name)];
        ensure!(log.contains(&format!("\"check\":\"{name}\",\"passed\":true")), "{name} is not in {log}");
        ensure!((metrics.sum("injector_selftest_check", &labels) - 1.0).abs() < 0.5, "{name} is not 1");
        ensure!(metrics.sum("injector_selftest_check_seconds", &labels) > 0.0, "{name} took no time");
    }
    // Splice was not requested: its checks are not reported.
    for (engine, available) in [("inline", 1.0), ("splice", 0.0), ("relay", 1.0)] {
        let seen = metrics.sum("injector_engine_available", &[("engine", engine)]);
        ensure!((seen - available).abs() < 0.5, "{engine} is {seen}");
    }
    ensure!(!log.contains("\"engine\":\"splice\""), "{log}");
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
    chosen(&injector, "inline", "auto: all checks of inline passed")?;
    let log = injector.log();
    ensure!(log.contains("does not enforce listener.max_connections"), "{log}");
    ensure!(!log.contains("\"check\":\"slow_reader\""), "splice was tried as well: {log}");
    // The listen socket would be unused.
    let output = testbed.topology.edge.command("ss").args(["-Hltn", "sport", "=", ":2500"]).output()?;
    ensure!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    serves(testbed, &injector, "inline")
}

fn auto_local(testbed: &Testbed) -> anyhow::Result<()> {
    let pinned = Pins::new(testbed)?;
    let backend = format!("backends = [\"{}:{BACKEND_PORT}\"]\n", EDGE_INSIDE.v4);
    let injector = pinned.start("auto", &backend)?;
    chosen(&injector, "splice", "not inline: 10.25.0.1 is an address of this host")?;
    // The backend is reachable there.
    let listen = || std::net::TcpListener::bind((EDGE_INSIDE.v4, BACKEND_PORT));
    let backend = testbed.topology.edge.run(listen)??;
    let _client = testbed.client()?;
    accept(&backend)?;
    Ok(())
}

fn auto_without_table(testbed: &Testbed) -> anyhow::Result<()> {
    let injector = testbed.injector("auto", "smtp", "")?;
    chosen(&injector, "splice", "not inline: no [inline] table in the configuration")?;
    ensure!(!injector.log().contains("\"check\":\"header_added\""), "inline was tried: {}", injector.log());
    serves(testbed, &injector, "splice")
}

fn auto_crc32c(testbed: &Testbed) -> anyhow::Result<()> {
    let pinned = Pins::new(testbed)?;
    let injector = pinned.start("auto", "\n\n[listener.receiver]\ncrc32c = true\n")?;
    chosen(&injector, "splice", "not inline: receiver.crc32c needs to be made for each connection")
}

fn auto_not_forwarded(testbed: &Testbed) -> anyhow::Result<()> {
    let pinned = Pins::new(testbed)?;
    let _not = ForwardingDisabled::new(&testbed.topology.edge)?;
    let injector = pinned.start("auto", "")?;
    chosen(&injector, "splice", "not inline: IPv4 is not forwarded")?;
    serves(testbed, &injector, "splice")
}

/// One listener uses inline, one splice, in one daemon.
fn auto_both(testbed: &Testbed) -> anyhow::Result<()> {
    const OTHER_PORT: u16 = PORT + 1;
    let pinned = Pins::new(testbed)?;
    let here = (EDGE_INSIDE.v4, BACKEND_PORT);
    let other = format!(
        "\n\n[[listener]]\nname = \"local\"\nbind = [\"{}:{OTHER_PORT}\"]\nprotocol = \"smtp\"\n\
         backends = [\"{}:{BACKEND_PORT}\"]\n",
        VIP_SPLICE.v4, here.0
    );
    let injector = pinned.start("auto", &other)?;
    let log = injector.log();
    for (listener, engine) in [("test", "inline"), ("local", "splice")] {
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
    for (program, event) in [("backend_out", "appended"), ("inject", "header_alone")] {
        let count = metrics.sum(BPF_EVENTS, &[("program", program), ("event", event)]);
        ensure!(count > 0.5, "{program} has counted no {event}");
    }
    Ok(())
}

/// Rules of an earlier run would send every new connection past the sockets.
fn back_to_sockets(testbed: &Testbed) -> anyhow::Result<()> {
    let pinned = Pins::new(testbed)?;
    let injector = pinned.start("auto", "")?;
    chosen(&injector, "inline", "auto")?;
    // An existing inline connection continues.
    let backend = testbed.backend()?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    drop(backend);
    injector.stop()?;
    let injector = pinned.start("splice", "")?;
    ensure!(injector.log().contains("no inline listener"), "{}", injector.log());
    serves(testbed, &injector, "splice")?;
    pass(&mut client, &mut server, b"QUIT\r\n")?;
    pass(&mut server, &mut client, b"221 bye\r\n")
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
    forwards: bool,
    /// Words of the error.
    words: &'static [&'static str],
}

const PLAIN: InvalidStart =
    InvalidStart { name: "", prefix: &[], extra: "", pin: None, forwards: true, words: &[] };

pub(crate) const INVALID_STARTS: &[InvalidStart] = &[
    InvalidStart {
        name: "the name of a backend",
        extra: "backends = [\"mail.internal:2525\"]\n",
        words: &["listener \"test\"", "needs the backend's address in place of the name \"mail.internal\""],
        ..PLAIN
    },
    InvalidStart {
        name: "a header with a CRC-32C TLV",
        extra: "\n\n[listener.receiver]\ncrc32c = true\n",
        words: &["listener \"test\"", "receiver.crc32c", "use splice or relay"],
        ..PLAIN
    },
    InvalidStart {
        name: "nothing is forwarded",
        forwards: false,
        words: &[
            "IPv4 is not forwarded",
            "set net.ipv4.conf.",
            "forwarding = 1",
            "inline.set_sysctls = true",
        ],
        ..PLAIN
    },
    InvalidStart {
        name: "a backend on the host",
        extra: "backends = [\"10.25.0.1:12500\"]\n",
        words: &["10.25.0.1 is an address of this host", "use engine = \"splice\""],
        ..PLAIN
    },
    InvalidStart {
        name: "no nft",
        // nft is searched there, independent of PATH.
        prefix: &["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /usr/sbin && exec \"$0\" \"$@\""],
        words: &["install the package nftables, or use nat = \"external\""],
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
    let _not = if case.forwards { None } else { Some(ForwardingDisabled::new(&testbed.topology.edge)?) };
    let mut text = pinned.config("inline", case.extra);
    if let Some(pin) = case.pin {
        text = text.replace(&pinned.bpffs.path().display().to_string(), pin);
    }
    fails(testbed, case.prefix, &text, case.words)?;
    if let Some(pin) = case.pin {
        ensure!(!std::path::Path::new(pin).exists(), "{pin} was made");
    }
    let output = testbed.topology.edge.command("nft").args(["list", "tables"]).output()?;
    let tables = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(!tables.contains("injector-faults"), "{tables}");
    // The file system has files of its own; the directory of the daemon is named after the
    // version of the layout.
    for entry in std::fs::read_dir(pinned.bpffs.path())? {
        let path = entry?.path();
        let is_version = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('v'));
        ensure!(!is_version, "{} was made", path.display());
    }
    Ok(())
}
