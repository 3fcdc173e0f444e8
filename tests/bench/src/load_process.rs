//! The load generator's processes: starting, querying and ending them.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::IpAddr;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use injector_load::flood::{self, Flood, FloodOutcome};
use injector_load::job::{Job, JobOutcome, ServerCounts};
use injector_load::{client, server};

use injector_testbed::netns::{CLIENT, MAIL, Netns};

/// The first argument with which the calling program runs itself as client or server.
pub const ARGUMENT: &str = "load-end";

/// How long server and attacker may take to start or to answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How much longer than its job a client may take.
const SLACK: Duration = Duration::from_secs(30);

/// Runs as client, server or attacker, according to the arguments after [`ARGUMENT`].
///
/// # Errors
/// When the arguments are invalid, or the process fails.
pub fn run(arguments: &[String]) -> anyhow::Result<()> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["server", address, client] => server::run(address.parse()?, client.parse()?),
        ["client", job] => client::run(job),
        ["flood", flood] => flood::run(flood),
        _ => bail!("not a client, server or attacker: {arguments:?}"),
    }
}

/// A process that exchanges lines; killed on drop.
#[derive(Debug)]
struct ChildProcess {
    what: &'static str,
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl ChildProcess {
    fn start(what: &'static str, netns: &Netns, arguments: &[&str]) -> anyhow::Result<Self> {
        // By pid: a build may have replaced this program's file since it was started.
        let mut command = netns.command(format!("/proc/{}/exe", std::process::id()));
        command.arg(ARGUMENT).arg(what).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = netns.spawn(command)?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("no standard output")?;
        let (sender, lines) = mpsc::channel();
        // This thread ends with the process whose output it reads.
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { what, child, input, lines })
    }

    fn send(&mut self, line: &str) -> anyhow::Result<()> {
        let input = self.input.as_mut().context("standard input is closed")?;
        writeln!(input, "{line}")?;
        Ok(input.flush()?)
    }

    fn receive(&mut self, limit: Duration) -> anyhow::Result<String> {
        self.lines.recv_timeout(limit).with_context(|| match self.child.try_wait() {
            Ok(Some(status)) => format!("the load generator's {} ended: {status}", self.what),
            _ => format!("the load generator's {} printed nothing for {limit:?}", self.what),
        })
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        // Both fail only if the process has already exited.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The server, in the mail namespace.
#[derive(Debug)]
pub struct LoadServer(ChildProcess);

impl LoadServer {
    /// # Errors
    /// When a port is taken.
    pub fn start(mail: &Netns) -> anyhow::Result<Self> {
        let (address, client) = (IpAddr::V4(MAIL.v4).to_string(), IpAddr::V4(CLIENT.v4).to_string());
        let mut process = ChildProcess::start("server", mail, &[&address, &client])?;
        let line = process.receive(TIMEOUT)?;
        ensure!(line == server::READY, "the server printed {line}");
        Ok(Self(process))
    }

    /// The counts since the last call.
    ///
    /// # Errors
    /// When the server has exited.
    pub fn take_counts(&mut self) -> anyhow::Result<ServerCounts> {
        self.0.send("take")?;
        Ok(serde_json::from_str(&self.0.receive(TIMEOUT)?)?)
    }
}

/// A flood, from the attacker's namespace; ends on drop.
#[derive(Debug)]
pub struct FloodProcess(ChildProcess);

impl FloodProcess {
    /// # Errors
    /// When it cannot be started.
    pub fn start(netns: &Netns, flood: &Flood) -> anyhow::Result<Self> {
        let line = serde_json::to_string(flood)?;
        Ok(Self(ChildProcess::start("flood", netns, &[&line])?))
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it could not send, or does not answer.
    pub fn end(mut self) -> anyhow::Result<FloodOutcome> {
        // If it has ended by itself, its outcome can be read all the same.
        let _ = self.0.send("end");
        Ok(serde_json::from_str(&self.0.receive(TIMEOUT)?)?)
    }
}

/// A client that executes a job, in the client's namespace.
#[derive(Debug)]
pub struct LoadClient {
    process: ChildProcess,
    limit: Duration,
}

impl LoadClient {
    /// # Errors
    /// When it cannot be started.
    pub fn start(netns: &Netns, job: &Job) -> anyhow::Result<Self> {
        let line = serde_json::to_string(job)?;
        let limit = Duration::from_secs_f64(job.seconds) + SLACK;
        Ok(Self { process: ChildProcess::start("client", netns, &[&line])?, limit })
    }

    /// Waits until all idle connections are open.
    ///
    /// # Errors
    /// When it exits first, or takes too long.
    pub fn wait_open(&mut self) -> anyhow::Result<()> {
        let line = self.process.receive(self.limit)?;
        ensure!(line == client::OPEN, "the client printed {line}");
        Ok(())
    }

    /// Stops all its threads (SIGSTOP), or lets them go on (SIGCONT).
    ///
    /// # Errors
    /// When it has exited.
    pub fn stop(&self, stop: bool) -> anyhow::Result<()> {
        let pid = i32::try_from(self.process.child.id())?;
        let signal = if stop { libc::SIGSTOP } else { libc::SIGCONT };
        // SAFETY: kill touches no memory; the child is not waited for yet, so its pid is its own.
        let result = unsafe { libc::kill(pid, signal) };
        ensure!(result == 0, "cannot stop the client: {}", std::io::Error::last_os_error());
        Ok(())
    }

    /// Makes the client close its idle connections.
    ///
    /// # Errors
    /// When it has exited.
    pub fn close(&mut self) -> anyhow::Result<()> {
        self.process.send("close")
    }

    /// Waits for the end of the job.
    ///
    /// # Errors
    /// When the client cannot execute the job, or takes too long; it is killed then.
    pub fn outcome(mut self) -> anyhow::Result<JobOutcome> {
        Ok(serde_json::from_str(&self.process.receive(self.limit)?)?)
    }
}
