//! The daemon of the demo: starts it, reads its log and metrics, stops it.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use injector_testbed::daemon::{CONNECTION_CLOSED, configuration};
use injector_testbed::demo_backend::Backend;
use injector_testbed::forward::Forward;
use injector_testbed::metrics::Metrics;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::engine::Engine;
use super::service::{IMAP, SMTP, Service};
use super::testbed::Testbed;

/// How long the daemon may take to load its programs, run its self-test and listen; debug builds
/// are slow.
const START_LIMIT: Duration = Duration::from_secs(20);

/// How long it may take to exit; no session is left to drain by then.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Interval between two checks of a condition.
const POLL: Duration = Duration::from_millis(20);

/// A running `injector run`; killed on drop.
pub(super) struct Injector {
    child: Child,
    files: Files,
}

/// Its configuration and log, removed on drop unless they are to be kept.
struct Files {
    dir: PathBuf,
    config: PathBuf,
    log: PathBuf,
    remover: Option<TempDir>,
}

impl Injector {
    /// Starts the daemon on the edge, with this configuration of inline, and waits until it reports
    /// that it is ready.
    pub(super) async fn start(
        testbed: &Testbed,
        backend: &Backend,
        engine: Engine,
        inline: &str,
        binary: &Path,
    ) -> Result<Self> {
        let files = Files::new()?;
        fs::write(&files.config, config(testbed, backend, engine) + inline)?;
        let child = spawn(testbed, binary, &files)?;
        let mut injector = Self { child, files };
        if let Err(error) = injector.wait_ready(testbed).await {
            bail!("the injector does not start: {error:#}; it logged:\n{}", injector.log());
        }
        Ok(injector)
    }

    /// Everything it has logged.
    pub(super) fn log(&self) -> String {
        fs::read_to_string(&self.files.log).unwrap_or_default()
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// One scrape, from the edge host itself.
    pub(super) async fn metrics(&self, testbed: &Testbed) -> Result<Metrics> {
        let (status, body) = get(testbed, "/metrics").await.context("cannot read the injector's metrics")?;
        ensure!(status == 200, "/metrics answered {status}: {body}");
        Metrics::parse(&body)
    }

    /// The access log line of a client's connection, which is written when the connection closes.
    pub(super) async fn access_log_line(&mut self, client: SocketAddr) -> Result<Value> {
        let wait = async {
            loop {
                if let Some(line) = access_log_lines(&self.log(), client).pop() {
                    return line;
                }
                sleep(POLL).await;
            }
        };
        match timeout(Duration::from_secs(5), wait).await {
            Ok(line) => Ok(line),
            Err(_) => bail!("the injector wrote no access log line for the connection from {client}"),
        }
    }

    /// Sends SIGTERM and waits for the exit.
    pub(super) async fn stop(&mut self) -> Result<ExitStatus> {
        let pid = libc::pid_t::try_from(self.child.id())?;
        if self.child.try_wait()?.is_none() {
            // SAFETY: kill touches no memory, and the child has not been waited for, so the pid is
            // still its own.
            let result = unsafe { libc::kill(pid, libc::SIGTERM) };
            ensure!(result == 0, "cannot stop the injector: {}", std::io::Error::last_os_error());
        }
        let ended = async {
            loop {
                if let Some(status) = self.child.try_wait()? {
                    return Ok(status);
                }
                sleep(POLL).await;
            }
        };
        timeout(STOP_LIMIT, ended).await.context("the injector still runs ten seconds after SIGTERM")?
    }

    /// Leaves configuration and log where they are; returns the directory.
    pub(super) fn keep_files(&mut self) -> PathBuf {
        if let Some(remover) = self.files.remover.take() {
            let _path = remover.keep();
        }
        self.files.dir.clone()
    }

    async fn wait_ready(&mut self, testbed: &Testbed) -> Result<()> {
        let ready = async {
            loop {
                if let Some(status) = self.child.try_wait()? {
                    bail!("it exited ({status})");
                }
                if get(testbed, "/readyz").await.is_ok_and(|(status, _)| status == 200) {
                    return Ok(());
                }
                sleep(POLL).await;
            }
        };
        timeout(START_LIMIT, ready).await.context("not ready after twenty seconds")?
    }
}

impl Drop for Injector {
    fn drop(&mut self) {
        // Both fail only for a child that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Files {
    fn new() -> Result<Self> {
        let remover = tempfile::Builder::new().prefix("injector-demo-").tempdir()?;
        let dir = remover.path().to_path_buf();
        Ok(Self {
            config: dir.join("injector.toml"),
            log: dir.join("injector.log"),
            dir,
            remover: Some(remover),
        })
    }
}

/// One listener for each service and family, each to the backend of its own family.
fn config(testbed: &Testbed, backend: &Backend, engine: Engine) -> String {
    let services = [(SMTP, backend.smtp()), (IMAP, backend.imap())];
    let forward = |(service, addresses): (Service, &[SocketAddr])| {
        // The backend has its addresses in the order in which the testbed named the families.
        let pairs = testbed.families.iter().copied().zip(addresses.to_vec());
        pairs.map(move |(family, backend)| Forward {
            name: service.listener_name(family),
            protocol: service.name,
            bind: testbed.listener(service, family),
            backend,
        })
    };
    let forwards: Vec<_> = services.into_iter().flat_map(forward).collect();
    configuration(&forwards, engine.name(), testbed.metrics())
}

fn spawn(testbed: &Testbed, binary: &Path, files: &Files) -> Result<Child> {
    let mut command = match testbed.edge_netns() {
        Some(netns) => netns.command(binary),
        None => Command::new(binary),
    };
    // Settings in the operator's environment must not change the demo.
    command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    command.args(["run", "--log-format", "json", "--config"]).arg(&files.config);
    let log = File::create(&files.log)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    match testbed.edge_netns() {
        Some(netns) => netns.spawn(command),
        None => command.spawn().with_context(|| format!("cannot start {}", binary.display())),
    }
}

/// Requests one page from the daemon; returns status and body.
async fn get(testbed: &Testbed, path: &'static str) -> Result<(u16, String)> {
    let address = testbed.metrics();
    let request = async move {
        let mut stream = TcpStream::connect(address).await?;
        // HTTP/1.0: the answer is not chunked and ends with the connection.
        let accept = "application/openmetrics-text; version=1.0.0";
        let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nAccept: {accept}\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        anyhow::Ok(answer)
    };
    let answer = testbed.edge.run(timeout(Duration::from_secs(5), request)).await???;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.with_context(|| format!("no HTTP status in: {head}"))?, body.to_owned()))
}

/// Access log lines of this client, oldest first; ignores lines that are not JSON.
fn access_log_lines(log: &str, client: SocketAddr) -> Vec<Value> {
    let client = client.to_string();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["message"] == CONNECTION_CLOSED && line["client"] == client.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_closing_line_of_that_client_counts() {
        let log = "{\"message\":\"listening\"}\nwarning: not JSON\n\
            {\"message\":\"connection closed\",\"client\":\"198.51.100.7:4\"}\n\
            {\"message\":\"connection closed\",\"client\":\"198.51.100.7:40\",\"reason\":\"idle\"}\n";
        let found = access_log_lines(log, "198.51.100.7:40".parse().unwrap());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0]["reason"], "idle");
    }
}
