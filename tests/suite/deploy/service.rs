//! The service, installed by `cargo xtask install` and run by a systemd, between a client and real mail servers.

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
use injector_testbed::netns::{CLIENT, Family, Place, Topology, VIP_INLINE, VIP_RELAY, VIP_SPLICE};
use injector_testbed::service::SMTP;

use crate::booted_systemd::Booted;
use crate::files::workspace;

const UNIT: &str = "injector.service";
const CONFIG: &str = "/etc/injector/injector.toml";
const PROGRAM: &str = "/usr/local/bin/injector";
const METRICS: &str = "127.0.0.1:9145";

/// How long a server's log line or a delivery may take to show.
const LIMIT: Duration = Duration::from_secs(10);

/// One listener of each engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Engine {
    pub(crate) name: &'static str,
    vip: Place,
}

pub(crate) const ENGINES: [Engine; 3] = [
    Engine { name: "splice", vip: VIP_SPLICE },
    Engine { name: "inline", vip: VIP_INLINE },
    Engine { name: "relay", vip: VIP_RELAY },
];

/// What all trials share; made when the first of them runs.
#[derive(Default)]
pub(crate) struct Shared(OnceLock<Result<Lab, String>>);

impl Shared {
    pub(crate) fn lab(&self) -> Result<&Lab, String> {
        let made = self.0.get_or_init(|| Lab::new().map_err(|error| format!("no testbed: {error:#}")));
        made.as_ref().map_err(Clone::clone)
    }
}

/// Fields are dropped in this order.
#[derive(Debug)]
pub(crate) struct Lab {
    systemd: Booted,
    host: MailHost,
    topology: Topology,
    xtask: PathBuf,
    binary: PathBuf,
}

impl Lab {
    fn new() -> anyhow::Result<Self> {
        let binary = daemon::binary()?.canonicalize()?;
        let xtask = xtask()?;
        let topology = Topology::new().context("no namespaces")?;
        let host = MailHost::start(&topology.mail)?;
        let workspace = workspace();
        let folders = [&workspace, &binary, &xtask].map(|path| path.parent().unwrap_or(path));
        let systemd = Booted::boot(&topology.edge, &[&workspace, folders[1], folders[2]])?;
        let lab = Self { systemd, host, topology, xtask, binary };
        lab.install()?;
        lab.write_config(&lab.configuration())?;
        Ok(lab)
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

    /// A listener for each engine and family, the inline engine with its own NAT.
    fn configuration(&self) -> String {
        let mut text = format!(
            "[admin]\nsocket = \"/run/injector/admin.sock\"\n[metrics]\nlisten = \"{METRICS}\"\n[inline]\n\
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

    /// Has the service run, and returns its process as systemd numbers it.
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

/// `cargo xtask`, as cargo left it beside the tests.
fn xtask() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let path = own.parent().and_then(Path::parent).map(|profile| profile.join("xtask"));
    path.filter(|path| path.is_file()).context("no xtask beside the tests: run `cargo build -p xtask`")
}

/// A message goes from the client through the service to Postfix, which sees the client.
pub(crate) fn mail(lab: &Lab, engine: Engine, family: Family) -> anyhow::Result<()> {
    lab.start()?;
    send(lab, engine, family)
}

fn send(lab: &Lab, engine: Engine, family: Family) -> anyhow::Result<()> {
    let user = format!("{}-{}", engine.name, family.name());
    let message = Message::new(&user, &user);
    let postfix = &lab.host.postfix;
    let mark = postfix.log().mark();
    let server = Server {
        address: SocketAddr::new(engine.vip.of(family), SMTP.stock),
        authority_pem: &lab.host.certificate.authority_pem,
    };
    let queue_id = mail_client::send(&lab.topology.client, server, SMTP.security, &user, &message)
        .with_context(|| postfix.log().since(mark))?;
    let sender = postfix.client_of(mark, &queue_id, SMTP.proxied, LIMIT)?;
    ensure!(sender.ip() == CLIENT.of(family), "Postfix saw {sender}, the client is {}", CLIENT.of(family));
    postfix.wait_delivered(mark, &queue_id, LIMIT)?;
    println!("{}: Postfix saw {sender}", engine.name);
    Ok(())
}

pub(crate) fn installing_twice(lab: &Lab) -> anyhow::Result<()> {
    let said = lab.install()?;
    let changes = ["write ", "replace ", "create ", "remove "];
    let changed: Vec<_> =
        said.lines().filter(|line| changes.iter().any(|change| line.starts_with(change))).collect();
    ensure!(changed.is_empty(), "{said}");
    ensure!(said.contains(&format!("keep           {CONFIG}")), "{said}");
    lab.systemd.must(&["id", "injector"])?;
    let pins = lab.systemd.must(&["stat", "--format", "%U %a", "/sys/fs/bpf/injector"])?;
    ensure!(pins.trim() == "injector 700", "/sys/fs/bpf/injector is {pins}");
    Ok(())
}

/// Read from the process, not from the unit.
pub(crate) fn rights(lab: &Lab) -> anyhow::Result<()> {
    let pid = lab.start()?;
    let status = lab.systemd.must(&["cat", &format!("/proc/{pid}/status")])?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":"));
        line.map(str::trim).with_context(|| format!("no {name} in\n{status}"))
    };
    let user = lab.systemd.must(&["id", "--user", "injector"])?;
    ensure!(field("Uid")?.split_whitespace().all(|uid| uid == user.trim()), "runs as {}", field("Uid")?);
    // CAP_NET_BIND_SERVICE is 10, CAP_NET_ADMIN 12, CAP_BPF 39 (linux/capability.h).
    let most = 1 << 10 | 1 << 12 | 1 << 39;
    for set in ["CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"] {
        let have = u64::from_str_radix(field(set)?, 16)?;
        ensure!(have & !most == 0, "{set} has {have:x}");
        println!("{set} {have:016x}");
    }
    ensure!(field("NoNewPrivs")? == "1" && field("Seccomp")? == "2", "{status}");
    let shown = lab.systemd.must(&["systemctl", "status", "--no-pager", "--lines=0", UNIT])?;
    println!("{shown}");
    Ok(())
}

pub(crate) fn stop(lab: &Lab) -> anyhow::Result<()> {
    lab.start()?;
    lab.systemd.must(&["systemctl", "stop", UNIT])?;
    let result = lab.systemd.property(UNIT, "Result")?;
    ensure!(result == "success", "the stop was a {result}");
    ensure!(lab.systemd.property(UNIT, "ActiveState")? == "inactive", "it still runs");
    ensure!(!lab.systemd.path("/run/injector").exists(), "/run/injector is left");
    // What the inline engine pins serves on while the daemon is away.
    let pins = lab.systemd.must(&["ls", "/sys/fs/bpf/injector"])?;
    ensure!(!pins.trim().is_empty(), "nothing is pinned");
    ensure!(lab.journal().contains("stopped: "), "the journal has no line about the shutdown");
    Ok(())
}

pub(crate) fn mistake(lab: &Lab) -> anyhow::Result<()> {
    lab.systemd.must(&["systemctl", "stop", UNIT])?;
    lab.write_config(&(lab.configuration() + "[stopp]\ndeadline = \"1s\"\n"))?;
    let outcome = lab.systemd.run(&["systemctl", "start", UNIT]);
    lab.systemd.must(&["systemctl", "stop", UNIT])?;
    lab.write_config(&lab.configuration())?;
    ensure!(!outcome?.status.success(), "it started");
    ensure!(lab.journal().contains("stopp"), "the journal does not name the mistake");
    lab.start().map(drop)
}

pub(crate) fn reload(lab: &Lab) -> anyhow::Result<()> {
    let before = lab.start()?;
    let one_more = "[[listener]]\nname = \"added\"\nprotocol = \"smtp\"\nbind = [\"127.0.0.1:2500\"]\n\
                    backends = [\"10.25.0.2:2525\"]\nengine = \"relay\"\n";
    lab.write_config(&(lab.configuration() + one_more))?;
    lab.systemd.must(&["systemctl", "reload", UNIT])?;
    let connect = || std::net::TcpStream::connect("127.0.0.1:2500").map(drop);
    lab.topology.edge.run(connect)?.context("the listener that the reload added")?;

    lab.write_config("[[listener]]\n")?;
    let refused = lab.systemd.run(&["systemctl", "reload", UNIT])?;
    lab.write_config(&lab.configuration())?;
    ensure!(!refused.status.success(), "a reload of a file with a mistake succeeded");
    lab.topology.edge.run(connect)?.context("a refused reload closed the listener")?;
    lab.systemd.must(&["systemctl", "reload", UNIT])?;
    ensure!(lab.systemd.property(UNIT, "MainPID")? == before, "a reload is no restart");
    ensure!(lab.systemd.property(UNIT, "ActiveState")? == "active", "not active after a reload");
    Ok(())
}

pub(crate) fn watchdog(lab: &Lab) -> anyhow::Result<()> {
    lab.drop_in("[Service]\nWatchdogSec=3s\nRestartSec=100ms\n")?;
    lab.systemd.must(&["systemctl", "restart", UNIT])?;
    let before = lab.start()?;
    // Longer than the watchdog: a daemon that tells it that it lives is left alone.
    thread::sleep(Duration::from_secs(5));
    ensure!(lab.systemd.property(UNIT, "MainPID")? == before, "replaced while it worked");
    lab.systemd.must(&["kill", "-STOP", &before])?;
    let deadline = Instant::now() + LIMIT * 3;
    loop {
        let state = lab.systemd.property(UNIT, "ActiveState")?;
        let pid = lab.systemd.property(UNIT, "MainPID")?;
        if state == "active" && pid != before && pid != "0" {
            break;
        }
        ensure!(Instant::now() < deadline, "{state}, process {pid} (it was {before})");
        thread::sleep(Duration::from_millis(100));
    }
    lab.wait_ready()?;
    let restarts = lab.systemd.property(UNIT, "NRestarts")?;
    ensure!(restarts == "1", "{restarts} restarts");
    lab.drop_in("")
}

/// systemd holds the port: who comes while there is no daemon has one started, and is served by it.
pub(crate) fn activated(lab: &Lab) -> anyhow::Result<()> {
    const SOCKET: &str = "injector.socket";
    let [_, _, relay] = ENGINES;
    lab.systemd.must(&["systemctl", "stop", UNIT])?;
    let folder = lab.systemd.path("/etc/systemd/system/injector.socket.d");
    fs::create_dir_all(&folder)?;
    let address = SocketAddr::new(relay.vip.of(Family::V4), SMTP.stock);
    fs::write(folder.join("test.conf"), format!("[Socket]\nListenStream=\nListenStream={address}\n"))?;
    lab.systemd.must(&["systemctl", "daemon-reload"])?;
    lab.systemd.must(&["systemctl", "start", SOCKET])?;
    let state = lab.systemd.property(UNIT, "ActiveState")?;
    ensure!(state == "inactive", "{state} before anybody has come");
    send(lab, relay, Family::V4)?;
    let before = lab.systemd.property(UNIT, "MainPID")?;
    // And whoever comes during a restart waits for the next one.
    lab.systemd.must(&["systemctl", "restart", "--no-block", UNIT])?;
    send(lab, relay, Family::V4)?;
    lab.wait_ready()?;
    ensure!(lab.systemd.property(UNIT, "MainPID")? != before, "it was not replaced");
    // The addresses that systemd does not hold are the daemon's own.
    send(lab, relay, Family::V6)?;
    lab.systemd.must(&["systemctl", "stop", SOCKET, UNIT])?;
    fs::remove_dir_all(&folder)?;
    lab.systemd.must(&["systemctl", "daemon-reload"]).map(drop)
}

pub(crate) fn uninstall(lab: &Lab) -> anyhow::Result<()> {
    lab.start()?;
    let said = lab.xtask(&["uninstall"])?;
    for path in [PROGRAM, "/usr/local/lib/systemd/system/injector.service", "/usr/local/share/injector"] {
        ensure!(!lab.systemd.path(path).exists(), "{path} is left:\n{said}");
    }
    ensure!(lab.systemd.path(CONFIG).exists(), "the configuration is gone");
    ensure!(lab.systemd.property(UNIT, "ActiveState")? == "inactive", "it still runs");
    // What inline had in the kernel: pins, and its NAT table.
    ensure!(!lab.systemd.path("/sys/fs/bpf/injector").exists(), "pins are left:\n{said}");
    let tables = lab.systemd.must(&["nft", "list", "tables"])?;
    ensure!(tables.trim().is_empty(), "NAT is left: {tables}");
    Ok(())
}
