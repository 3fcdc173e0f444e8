//! The load generator's processes: how they are started, asked and ended.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::IpAddr;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use injector_load::order::{Counts, Order, Outcome};
use injector_load::{client, server};

use injector_testbed::netns::{CLIENT, MAIL, Netns};

/// The first argument with which the calling program runs itself as one of the ends.
pub const ARGUMENT: &str = "load-end";

/// How long the server may take to start or to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How much longer than its work a client may take.
const SLACK: Duration = Duration::from_secs(30);

/// Runs as one of the ends, told which by the arguments after [`ARGUMENT`].
///
/// # Errors
/// When the arguments make no sense, or the end fails.
pub fn run(arguments: &[String]) -> anyhow::Result<()> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["server", address, client] => server::run(address.parse()?, client.parse()?),
        ["client", order] => client::run(order),
        _ => bail!("not an end: {arguments:?}"),
    }
}

/// A process that speaks in lines; killed on drop.
#[derive(Debug)]
struct Speaker {
    what: &'static str,
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Speaker {
    fn start(what: &'static str, netns: &Netns, arguments: &[&str]) -> anyhow::Result<Self> {
        // By pid: this program's file may have been replaced by a build since it was started.
        let mut command = netns.command(format!("/proc/{}/exe", std::process::id()));
        command.arg(ARGUMENT).arg(what).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = netns.spawn(command)?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("no standard output")?;
        let (said, lines) = mpsc::channel();
        // Ends with the process, whose output it reads.
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if said.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { what, child, input, lines })
    }

    fn say(&mut self, line: &str) -> anyhow::Result<()> {
        let input = self.input.as_mut().context("standard input is closed")?;
        writeln!(input, "{line}")?;
        Ok(input.flush()?)
    }

    fn hear(&mut self, limit: Duration) -> anyhow::Result<String> {
        self.lines.recv_timeout(limit).with_context(|| match self.child.try_wait() {
            Ok(Some(status)) => format!("the load generator's {} ended: {status}", self.what),
            _ => format!("the load generator's {} says nothing for {limit:?}", self.what),
        })
    }
}

impl Drop for Speaker {
    fn drop(&mut self) {
        // Both fail only for a process that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The server, in the mail namespace.
#[derive(Debug)]
pub struct Server(Speaker);

impl Server {
    /// # Errors
    /// When a port is taken.
    pub fn start(mail: &Netns) -> anyhow::Result<Self> {
        let (address, client) = (IpAddr::V4(MAIL.v4).to_string(), IpAddr::V4(CLIENT.v4).to_string());
        let mut speaker = Speaker::start("server", mail, &[&address, &client])?;
        let line = speaker.hear(PATIENCE)?;
        ensure!(line == server::READY, "the server said {line}");
        Ok(Self(speaker))
    }

    /// What it has counted since the last time.
    ///
    /// # Errors
    /// When it is gone.
    pub fn take(&mut self) -> anyhow::Result<Counts> {
        self.0.say("take")?;
        Ok(serde_json::from_str(&self.0.hear(PATIENCE)?)?)
    }
}

/// A client at work, in the client's namespace.
#[derive(Debug)]
pub struct Client {
    speaker: Speaker,
    limit: Duration,
}

impl Client {
    /// # Errors
    /// When it cannot be started.
    pub fn start(netns: &Netns, order: &Order) -> anyhow::Result<Self> {
        let line = serde_json::to_string(order)?;
        let limit = Duration::from_secs_f64(order.seconds) + SLACK;
        Ok(Self { speaker: Speaker::start("client", netns, &[&line])?, limit })
    }

    /// Waits until all idle connections are open.
    ///
    /// # Errors
    /// When it ends first, or takes too long.
    pub fn wait_open(&mut self) -> anyhow::Result<()> {
        let line = self.speaker.hear(self.limit)?;
        ensure!(line == client::OPEN, "the client said {line}");
        Ok(())
    }

    /// Has it close its idle connections.
    ///
    /// # Errors
    /// When it is gone.
    pub fn close(&mut self) -> anyhow::Result<()> {
        self.speaker.say("close")
    }

    /// Waits for the end of its work.
    ///
    /// # Errors
    /// When it could not do it, or takes too long; it is killed then.
    pub fn outcome(mut self) -> anyhow::Result<Outcome> {
        Ok(serde_json::from_str(&self.speaker.hear(self.limit)?)?)
    }
}
