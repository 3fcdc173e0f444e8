//! The service, installed by `cargo xtask install` and run by a systemd, between a client and real
//! mail servers.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use injector_testbed::daemon;
use injector_testbed::forward::Forward;
use injector_testbed::mail_client::{self, Server};
use injector_testbed::mail_host::MailHost;
use injector_testbed::message::Message;
use injector_testbed::metrics;
use injector_testbed::netns::{CLIENT, Family, HostAddresses, Topology, VIP_INLINE, VIP_RELAY, VIP_SPLICE};
use injector_testbed::service::SMTP;

use crate::booted_systemd::BootedSystemd;
use crate::files::workspace;

const UNIT: &str = "injector.service";
const CONFIG: &str = "/etc/injector/injector.toml";
const PROGRAM: &str = "/usr/local/bin/injector";
const METRICS: &str = "127.0.0.1:9145";

/// How long a server's log line or a delivery may take.
const LIMIT: Duration = Duration::from_secs(30);

/// One listener of each engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Engine {
    pub(crate) name: &'static str,
    vip: HostAddresses,
}

pub(crate) const ENGINES: [Engine; 3] = [
    Engine { name: "splice", vip: VIP_SPLICE },
    Engine { name: "inline", vip: VIP_INLINE },
    Engine { name: "relay", vip: VIP_RELAY },
];

/// What all trials share; created when the first of them runs.
#[derive(Default)]
pub(crate) struct Shared(OnceLock<Result<Testbed, String>>);

impl Shared {
    pub(crate) fn testbed(&self) -> Result<&Testbed, String> {
        let made = self.0.get_or_init(|| Testbed::new().map_err(|error| format!("no testbed: {error:#}")));
        made.as_ref().map_err(Clone::clone)
    }
}

/// Fields are dropped in this order.
#[derive(Debug)]
pub(crate) struct Testbed {
    systemd: BootedSystemd,
    host: MailHost,
    topology: Topology,
    xtask: PathBuf,
    binary: PathBuf,
}

impl Testbed {
    fn new() -> anyhow::Result<Self> {
        let binary = daemon::binary()?.canonicalize()?;
        let xtask = xtask()?;
        let topology = Topology::new().context("no namespaces")?;
        let host = MailHost::start(&topology.mail)?;
        let workspace = workspace();
        let folders = [&workspace, &binary, &xtask].map(|path| path.parent().unwrap_or(path));
        let systemd = BootedSystemd::boot(&topology.edge, &[&workspace, folders[1], folders[2]])?;
        let testbed = Self { systemd, host, topology, xtask, binary };
        testbed.install()?;
        testbed.write_config(&testbed.configuration())?;
        Ok(testbed)
    }

    pub(crate) fn journal(&self) -> String {
        self.systemd.journal(UNIT)
    }

    /// The project's own installer, run inside.
    fn install(&self) -> anyhow::Result<String> {
        self.xtask(&["install", "--binary", &self.binary.to_string_lossy()])
    }

    fn xtask(&self, words: &[&str]) -> anyhow::Result<String> {
        let xtask = self.xtask.to_string_lossy();
        self.systemd.must(&[&[xtask.as_ref()], words].concat())
    }

    /// A listener for each engine and family.
    fn configuration(&self) -> String {
        let mut text = format!(
            "[admin]\nsocket = \"/run/injector/admin.sock\"\n[metrics]\nlisten = \"{METRICS}\"\n\
             [log]\nformat = \"json\"\n"
        );
        for engine in ENGINES {
            for family in Family::ALL {
                let Forward { bind, backend, protocol, .. } = Forward::to_mail(engine.vip, SMTP, family);
                let name = format!("{}-{}", engine.name, family.name());
                // Writing to a String cannot fail.
                let _ = write!(
                    text,
                    "[[listener]]\nname = \"{name}\"\nprotocol = \"{protocol}\"\nbind = [\"{bind}\"]\n\
                     backends = [\"{backend}\"]\nengine = \"{}\"\n",
                    engine.name
                );
            }
        }
        text
    }

    fn write_config(&self, text: &str) -> anyhow::Result<()> {
        fs::write(self.systemd.path(CONFIG), text).context("cannot write the configuration")
    }

    fn drop_in(&self, text: &str) -> anyhow::Result<()> {
        let folder = self.systemd.path("/etc/systemd/system/injector.service.d");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("test.conf"), text)?;
        self.systemd.must(&["systemctl", "daemon-reload"]).map(drop)
    }

    /// Starts the service, and returns its main pid in systemd's PID namespace.
    fn start(&self) -> anyhow::Result<String> {
        self.systemd.must(&["systemctl", "start", UNIT])?;
        self.wait_ready()?;
        self.systemd.property(UNIT, "MainPID")
    }

    fn wait_ready(&self) -> anyhow::Result<()> {
        let address: SocketAddr = METRICS.parse()?;
        let deadline = Instant::now() + LIMIT * 3;
        loop {
            let answer = self.topology.edge.run(|| metrics::get(address, "/readyz"))?;
            if matches!(answer, Ok((200, _))) {
                return Ok(());
            }
            let state = self.systemd.property(UNIT, "ActiveState")?;
            ensure!(state == "active", "not ready, but {state}");
            ensure!(Instant::now() < deadline, "not ready: /readyz gives {answer:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// `cargo xtask`, which cargo builds beside the tests.
fn xtask() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let path = own.parent().and_then(Path::parent).map(|profile| profile.join("xtask"));
    path.filter(|path| path.is_file()).context("no xtask beside the tests: run `cargo build -p xtask`")
}

/// A message goes from the client through the service to Postfix, which logs the client.
pub(crate) fn mail(testbed: &Testbed, engine: Engine, family: Family) -> anyhow::Result<()> {
    testbed.start()?;
    send(testbed, engine, family)
}

fn send(testbed: &Testbed, engine: Engine, family: Family) -> anyhow::Result<()> {
    let user = format!("{}-{}", engine.name, family.name());
    let message = Message::new(&user, &user);
    let postfix = &testbed.host.postfix;
    let mark = postfix.log().mark();
    let server = Server {
        address: SocketAddr::new(engine.vip.of(family), SMTP.standard),
        authority_pem: &testbed.host.certificate.authority_pem,
    };
    let queue_id = mail_client::send(&testbed.topology.client, server, SMTP.security, &user, &message)
        .with_context(|| postfix.log().since(mark))?;
    let sender = postfix.client_of(mark, &queue_id, SMTP.proxied, LIMIT)?;
    ensure!(sender.ip() == CLIENT.of(family), "Postfix saw {sender}, the client is {}", CLIENT.of(family));
    postfix.wait_delivered(mark, &queue_id, LIMIT)?;
    println!("{}: Postfix saw {sender}", engine.name);
    Ok(())
}

pub(crate) fn installing_twice(testbed: &Testbed) -> anyhow::Result<()> {
    let printed = testbed.install()?;
    let changes = ["write ", "replace ", "create ", "remove "];
    let changed: Vec<_> =
        printed.lines().filter(|line| changes.iter().any(|change| line.starts_with(change))).collect();
    ensure!(changed.is_empty(), "{printed}");
    ensure!(printed.contains(&format!("keep           {CONFIG}")), "{printed}");
    testbed.systemd.must(&["id", "injector"])?;
    let pins = testbed.systemd.must(&["stat", "--format", "%U %a", "/sys/fs/bpf/injector"])?;
    ensure!(pins.trim() == "injector 700", "/sys/fs/bpf/injector is {pins}");
    Ok(())
}

/// Read from the process, not from the unit.
pub(crate) fn capabilities(testbed: &Testbed) -> anyhow::Result<()> {
    let pid = testbed.start()?;
    let status = testbed.systemd.must(&["cat", &format!("/proc/{pid}/status")])?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":"));
        line.map(str::trim).with_context(|| format!("no {name} in\n{status}"))
    };
    let user = testbed.systemd.must(&["id", "--user", "injector"])?;
    ensure!(field("Uid")?.split_whitespace().all(|uid| uid == user.trim()), "runs as {}", field("Uid")?);
    // CAP_NET_BIND_SERVICE is 10, CAP_NET_ADMIN 12, CAP_PERFMON 38, CAP_BPF 39 (linux/capability.h).
    let (serving, loading) = (1 << 10 | 1 << 12 | 1 << 39, 1 << 38);
    for (set, most) in [
        ("CapBnd", serving | loading),
        ("CapPrm", serving),
        ("CapEff", serving),
        ("CapInh", serving),
        ("CapAmb", serving),
    ] {
        let have = u64::from_str_radix(field(set)?, 16)?;
        ensure!(have & !most == 0, "{set} has {have:x}");
        println!("{set} {have:016x}");
    }
    ensure!(field("NoNewPrivs")? == "1" && field("Seccomp")? == "2", "{status}");
    let shown = testbed.systemd.must(&["systemctl", "status", "--no-pager", "--lines=0", UNIT])?;
    println!("{shown}");
    Ok(())
}

pub(crate) fn stop(testbed: &Testbed) -> anyhow::Result<()> {
    testbed.start()?;
    testbed.systemd.must(&["systemctl", "stop", UNIT])?;
    let result = testbed.systemd.property(UNIT, "Result")?;
    ensure!(result == "success", "the stop was a {result}");
    ensure!(testbed.systemd.property(UNIT, "ActiveState")? == "inactive", "it still runs");
    ensure!(!testbed.systemd.path("/run/injector").exists(), "/run/injector is left");
    // The pinned inline programs keep working while the daemon is stopped.
    let pins = testbed.systemd.must(&["ls", "/sys/fs/bpf/injector"])?;
    ensure!(!pins.trim().is_empty(), "nothing is pinned");
    ensure!(testbed.journal().contains("stopped: "), "the journal has no line about the shutdown");
    Ok(())
}

pub(crate) fn mistake(testbed: &Testbed) -> anyhow::Result<()> {
    testbed.systemd.must(&["systemctl", "stop", UNIT])?;
    testbed.write_config(&(testbed.configuration() + "[stopp]\ndeadline = \"1s\"\n"))?;
    let outcome = testbed.systemd.run(&["systemctl", "start", UNIT]);
    testbed.systemd.must(&["systemctl", "stop", UNIT])?;
    testbed.write_config(&testbed.configuration())?;
    ensure!(!outcome?.status.success(), "it started");
    ensure!(testbed.journal().contains("stopp"), "the journal does not name the mistake");
    testbed.start().map(drop)
}

pub(crate) fn reload(testbed: &Testbed) -> anyhow::Result<()> {
    let before = testbed.start()?;
    let one_more = "[[listener]]\nname = \"added\"\nprotocol = \"smtp\"\nbind = [\"127.0.0.1:2500\"]\n\
                    backends = [\"10.25.0.2:2525\"]\nengine = \"relay\"\n";
    testbed.write_config(&(testbed.configuration() + one_more))?;
    testbed.systemd.must(&["systemctl", "reload", UNIT])?;
    let connect = || std::net::TcpStream::connect("127.0.0.1:2500").map(drop);
    testbed.topology.edge.run(connect)?.context("the listener that the reload added")?;

    testbed.write_config("[[listener]]\n")?;
    let refused = testbed.systemd.run(&["systemctl", "reload", UNIT])?;
    testbed.write_config(&testbed.configuration())?;
    ensure!(!refused.status.success(), "a reload of a file with a mistake succeeded");
    testbed.topology.edge.run(connect)?.context("a refused reload closed the listener")?;
    testbed.systemd.must(&["systemctl", "reload", UNIT])?;
    ensure!(testbed.systemd.property(UNIT, "MainPID")? == before, "a reload must not restart the daemon");
    ensure!(testbed.systemd.property(UNIT, "ActiveState")? == "active", "not active after a reload");
    Ok(())
}

pub(crate) fn watchdog(testbed: &Testbed) -> anyhow::Result<()> {
    testbed.drop_in("[Service]\nWatchdogSec=3s\nRestartSec=100ms\n")?;
    testbed.systemd.must(&["systemctl", "restart", UNIT])?;
    let before = testbed.start()?;
    // Longer than the watchdog: a daemon that notifies it is not restarted.
    thread::sleep(Duration::from_secs(5));
    ensure!(testbed.systemd.property(UNIT, "MainPID")? == before, "replaced while it worked");
    testbed.systemd.must(&["kill", "-STOP", &before])?;
    let deadline = Instant::now() + LIMIT * 3;
    loop {
        let state = testbed.systemd.property(UNIT, "ActiveState")?;
        let pid = testbed.systemd.property(UNIT, "MainPID")?;
        if state == "active" && pid != before && pid != "0" {
            break;
        }
        ensure!(Instant::now() < deadline, "{state}, process {pid} (it was {before})");
        thread::sleep(Duration::from_millis(100));
    }
    testbed.wait_ready()?;
    let restarts = testbed.systemd.property(UNIT, "NRestarts")?;
    ensure!(restarts == "1", "{restarts} restarts");
    testbed.drop_in("")
}

/// systemd keeps the port open: a client that connects while no daemon runs starts one, and is
/// served.
pub(crate) fn activated(testbed: &Testbed) -> anyhow::Result<()> {
    const SOCKET: &str = "injector.socket";
    let [_, _, relay] = ENGINES;
    testbed.systemd.must(&["systemctl", "stop", UNIT])?;
    let folder = testbed.systemd.path("/etc/systemd/system/injector.socket.d");
    fs::create_dir_all(&folder)?;
    let address = SocketAddr::new(relay.vip.of(Family::V4), SMTP.standard);
    fs::write(folder.join("test.conf"), format!("[Socket]\nListenStream=\nListenStream={address}\n"))?;
    testbed.systemd.must(&["systemctl", "daemon-reload"])?;
    testbed.systemd.must(&["systemctl", "start", SOCKET])?;
    let state = testbed.systemd.property(UNIT, "ActiveState")?;
    ensure!(state == "inactive", "{state} before anybody has come");
    send(testbed, relay, Family::V4)?;
    let before = testbed.systemd.property(UNIT, "MainPID")?;
    // Clients that connect during a restart wait for the next daemon.
    testbed.systemd.must(&["systemctl", "restart", "--no-block", UNIT])?;
    send(testbed, relay, Family::V4)?;
    testbed.wait_ready()?;
    ensure!(testbed.systemd.property(UNIT, "MainPID")? != before, "it was not replaced");
    // The daemon opens the addresses that systemd does not hold.
    send(testbed, relay, Family::V6)?;
    testbed.systemd.must(&["systemctl", "stop", SOCKET, UNIT])?;
    fs::remove_dir_all(&folder)?;
    testbed.systemd.must(&["systemctl", "daemon-reload"]).map(drop)
}

pub(crate) fn uninstall(testbed: &Testbed) -> anyhow::Result<()> {
    testbed.start()?;
    let printed = testbed.xtask(&["uninstall"])?;
    for path in [PROGRAM, "/usr/local/lib/systemd/system/injector.service", "/usr/local/share/injector"] {
        ensure!(!testbed.systemd.path(path).exists(), "{path} is left:\n{printed}");
    }
    ensure!(testbed.systemd.path(CONFIG).exists(), "the configuration is gone");
    ensure!(testbed.systemd.property(UNIT, "ActiveState")? == "inactive", "it still runs");
    // The kernel state of inline.
    ensure!(!testbed.systemd.path("/sys/fs/bpf/injector").exists(), "pins are left:\n{printed}");
    Ok(())
}
