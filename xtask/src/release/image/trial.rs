//! Runs the image under runc between a client and real mail servers, each in a network namespace,
//! and sends a message through each engine.

use std::{
    fmt::Write as _,
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use injector_testbed::{
    bpffs::BpfFs,
    daemon,
    forward::Forward,
    mail_client::{self, Server},
    mail_host::MailHost,
    message::Message,
    metrics,
    netns::{CLIENT, Family, HostAddresses, Topology, VIP_INLINE, VIP_RELAY, VIP_SPLICE},
    service::SMTP,
};
use serde_json::Value;

use super::{
    bundle::{self, Parts, Privileges},
    command::quietly,
    layout::TAG,
};
use crate::setup;

/// How long a start, a delivery or a shutdown may take.
const LIMIT: Duration = Duration::from_secs(30);

/// The daemon's metrics, in the edge's namespace.
const METRICS: &str = "127.0.0.1:9145";

struct Case {
    engine: &'static str,
    vip: HostAddresses,
    privileges: Privileges,
}

const CASES: [Case; 4] = [
    Case { engine: "splice", vip: VIP_SPLICE, privileges: Privileges::DaemonSet },
    Case { engine: "inline", vip: VIP_INLINE, privileges: Privileges::DaemonSet },
    Case { engine: "relay", vip: VIP_RELAY, privileges: Privileges::DaemonSet },
    Case { engine: "relay", vip: VIP_RELAY, privileges: Privileges::Unprivileged },
];

/// Runs every case; the first failure ends it.
///
/// # Errors
/// When a container does not start, or Postfix logs another address than the client's.
pub(super) fn run(image: &Path, scratch: &Path) -> Result<()> {
    let bundle = scratch.join("bundle");
    let name = format!("{}:{TAG}", image.display());
    quietly(Command::new("umoci").args(["unpack", "--image", &name]).arg(&bundle))?;
    let profile = fs::read(setup::SECCOMP_PROFILE).context(setup::SECCOMP_PROFILE)?;
    let profile: Value = serde_json::from_slice(&profile).context(setup::SECCOMP_PROFILE)?;
    let topology = Topology::new()?;
    // For the container without the capability to bind ports below 1024.
    topology.edge.sysctl("net/ipv4/ip_unprivileged_port_start", "25")?;
    let host = MailHost::start(&topology.mail)?;
    for case in &CASES {
        let outcome = try_out(case, &bundle, scratch, &profile, &topology, &host);
        outcome.with_context(|| format!("engine {}", case.engine))?;
    }
    Ok(())
}

fn try_out(
    case: &Case,
    bundle: &Path,
    scratch: &Path,
    profile: &Value,
    topology: &Topology,
    host: &MailHost,
) -> Result<()> {
    let file = scratch.join("injector.toml");
    let forwards = Family::ALL.map(|family| Forward::to_mail(case.vip, SMTP, family));
    let text = daemon::configuration(&forwards, case.engine, METRICS.parse()?);
    let bpffs = (case.engine == "inline").then(BpfFs::mount).transpose()?;
    fs::write(&file, text)?;
    let network = Path::new("/run/netns").join(topology.edge.name());
    let parts = Parts {
        privileges: case.privileges,
        network: &network,
        config: &file,
        bpffs: bpffs.as_ref().map(BpfFs::path),
        seccomp: profile,
    };
    fs::write(bundle.join("config.json"), format!("{:#}", bundle::config(parts)))?;
    let mut container = Container::start(bundle, scratch)?;
    let outcome = container.wait_ready(topology).and_then(|()| {
        let held = container.privileges()?;
        println!("\n{} under runc: {held}", case.engine);
        Family::ALL.iter().try_for_each(|family| mail(case, *family, topology, host))
    });
    let ended = container.stop();
    let logged = fs::read_to_string(scratch.join("container.log")).unwrap_or_default();
    outcome.and(ended).with_context(|| format!("the container logged:\n{logged}"))
}

/// Sends a message from the client; prints the log line in which Postfix names the client.
fn mail(case: &Case, family: Family, topology: &Topology, host: &MailHost) -> Result<()> {
    let user = format!("{}-{}-{:?}", case.engine, family.name(), case.privileges).to_lowercase();
    let message = Message::new(&user, &user);
    let postfix = &host.postfix;
    let mark = postfix.log().mark();
    let server = Server {
        address: SocketAddr::new(case.vip.of(family), SMTP.standard),
        authority_pem: &host.certificate.authority_pem,
    };
    let queue_id = mail_client::send(&topology.client, server, SMTP.security, &user, &message)
        .with_context(|| format!("Postfix logged:\n{}", postfix.log().since(mark)))?;
    let sender = postfix.client_of(mark, &queue_id, SMTP.proxied, LIMIT)?;
    ensure!(sender.ip() == CLIENT.of(family), "Postfix saw {sender}, the client is {}", CLIENT.of(family));
    postfix.wait_delivered(mark, &queue_id, LIMIT)?;
    let line = postfix.log().wait_for(mark, &[&queue_id, "client="], LIMIT)?;
    println!("  {line}");
    Ok(())
}

/// A running container; deleted on drop.
struct Container {
    runc: Child,
    id: String,
    state: PathBuf,
}

impl Container {
    fn start(bundle: &Path, scratch: &Path) -> Result<Self> {
        let id = format!("inj-{}-image", std::process::id());
        let state = scratch.join("runc");
        let log = File::create(scratch.join("container.log"))?;
        let runc = Command::new("runc")
            .arg("--root")
            .arg(&state)
            .args(["run", "--bundle"])
            .arg(bundle)
            .arg(&id)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start runc")?;
        Ok(Self { runc, id, state })
    }

    fn wait_ready(&mut self, topology: &Topology) -> Result<()> {
        let address: SocketAddr = METRICS.parse()?;
        let deadline = Instant::now() + LIMIT;
        loop {
            if matches!(topology.edge.run(|| metrics::get(address, "/readyz"))?, Ok((200, _))) {
                return Ok(());
            }
            if let Some(status) = self.runc.try_wait()? {
                bail!("the container exited: {status}");
            }
            ensure!(Instant::now() < deadline, "not ready after {LIMIT:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// The daemon's user and capabilities in the kernel, after it has dropped those that it does
    /// not need.
    fn privileges(&self) -> Result<String> {
        let output = self.runc().args(["state", &self.id]).output()?;
        let state: Value = serde_json::from_slice(&output.stdout).context("runc state")?;
        let pid = state["pid"].as_u64().context("runc state has no pid")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let mut printed = String::new();
        for field in ["Uid", "CapBnd", "CapPrm", "CapEff", "NoNewPrivs", "Seccomp"] {
            let prefix = format!("{field}:");
            let value = status.lines().find_map(|line| line.strip_prefix(&prefix)).unwrap_or_default();
            // Writing to a String cannot fail.
            let _ = write!(printed, "{field} {}  ", value.split_whitespace().next().unwrap_or_default());
        }
        Ok(printed)
    }

    /// Stops it like Kubernetes does, and checks the exit status.
    fn stop(mut self) -> Result<()> {
        quietly(self.runc().args(["kill", &self.id, "TERM"]))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.runc.try_wait()? {
                ensure!(status.success(), "the daemon exited: {status}");
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "still running {LIMIT:?} after SIGTERM");
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn runc(&self) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(&self.state);
        command
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Removes leftover processes, mounts and cgroups; there may be none.
        let _ = self
            .runc()
            .args(["delete", "--force", &self.id])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        let _ = self.runc.kill();
        let _ = self.runc.wait();
    }
}
