//! The injector under test, run as users run it: a binary, a configuration file, a log, metrics
//! over HTTP.
//!
//! The daemon's names of metrics and log fields are constants here, and nowhere else in the
//! testbed.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::forward::Forward;
use crate::log_file::{LogFile, Mark};
use crate::metrics::{self, Metrics};
use crate::netns::{self, Netns, NetnsHandle};
use crate::process::{POLL, Process};
use crate::sockets::LIMIT;

/// Payload bytes, by [`DIRECTION`] and [`PLANE`].
pub const BYTES: &str = "injector_bytes_total";
/// Label: the direction of bytes.
pub const DIRECTION: &str = "direction";
/// From the client to the backend.
pub const TO_BACKEND: &str = "client_to_backend";
/// From the backend to the client.
pub const TO_CLIENT: &str = "backend_to_client";
/// Label: the data path.
pub const PLANE: &str = "plane";
/// Data path: the kernel.
pub const SPLICED: &str = "spliced";
/// Data path: user space, by a buffer.
pub const RELAYED: &str = "relayed";
/// Data path: user space, by a pipe.
pub const PIPED: &str = "piped";
/// Headers sent.
pub const HEADERS_SENT: &str = "injector_headers_sent_total";
/// Connections reset because their header could not be sent.
pub const HEADERS_FAILED: &str = "injector_headers_failed_total";
/// Events of the programs, by `program` and `event`.
pub const BPF_EVENTS: &str = "injector_bpf_events_total";
/// Bans in force, by origin.
pub const GUARD_BANS: &str = "injector_guard_bans";
/// Packets of banned sources that programs dropped, by hook.
pub const GUARD_DROPPED_PACKETS: &str = "injector_guard_dropped_packets_total";
/// The message of the log line of a finished connection.
pub const CONNECTION_CLOSED: &str = "connection closed";

/// Path of the binary under test; by default the one beside this test's own binary.
const BINARY_VARIABLE: &str = "INJECTOR_BIN";

/// The daemon that a running one is upgraded to.
const NEXT_BINARY_VARIABLE: &str = "INJECTOR_NEXT_BIN";

/// How long the daemon may take to become ready.
const START_LIMIT: Duration = LIMIT;

/// How long the daemon may take to exit; this covers its own drain deadline.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// Makes the splice engine enrol directions as soon as possible; by default it waits until that
/// pays off.
pub const EAGER: &str = "[splice]\nenrol_after_messages = 1\n";

/// A configuration for one engine, with these forwards, and metrics at an address of the namespace;
/// splice enrols at once.
#[must_use]
pub fn configuration(forwards: &[Forward], engine: &str, metrics: SocketAddr) -> String {
    let eager = if engine == "splice" { EAGER } else { "" };
    let mut text = format!("[metrics]\nlisten = \"{metrics}\"\n\n{eager}");
    for Forward { name, protocol, bind, backend } in forwards {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "\n[[listener]]\nname = \"{name}\"\nbind = [\"{bind}\"]\nprotocol = \"{protocol}\"\n\
             engine = \"{engine}\"\nbackends = [\"{backend}\"]\n"
        );
    }
    text
}

/// A running injector; killed on drop.
#[derive(Debug)]
pub struct Injector {
    // Before the directory: fields are dropped in this order.
    process: Process,
    netns: NetnsHandle,
    metrics: SocketAddr,
    log: LogFile,
    dir: TempDir,
}

/// In a configuration, a placeholder for the daemon's own scratch directory.
pub const OWN_DIRECTORY: &str = "@DIRECTORY@";
/// Enables commands ([`Injector::command`]).
pub const ADMIN: &str = "[admin]\nsocket = \"@DIRECTORY@/admin.sock\"\n";

impl Injector {
    /// Starts `injector run` with a configuration (TOML, with `metrics.listen`) and waits until
    /// `/readyz` reports ready.
    ///
    /// # Errors
    /// When there is no binary, or the daemon exits or is not ready within ten seconds; the error
    /// has its log.
    pub fn start(netns: &Netns, config: &str) -> anyhow::Result<Self> {
        Self::start_by(netns, &[], config)
    }

    /// As [`Self::start`], by a command that passes its last argument to a shell: `capsh … -- -c`.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_by(netns: &Netns, by: &[&str], config: &str) -> anyhow::Result<Self> {
        let binary = binary()?;
        let Some((program, arguments)) = by.split_first() else {
            return Self::start_under(netns, &[], &binary, config);
        };
        Self::start_command(netns, config, |file| {
            let mut command = netns.command(program);
            command.args(arguments);
            command.arg(format!("exec {} run --config {}", binary.display(), file.display()));
            command
        })
    }

    /// As [`Self::start`], with this binary, by a command that takes the daemon's command line as
    /// its last arguments (`valgrind …`), or directly.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_under(netns: &Netns, under: &[&str], binary: &Path, config: &str) -> anyhow::Result<Self> {
        Self::start_command(netns, config, |file| {
            let mut command = match under.split_first() {
                None => netns.command(binary),
                Some((program, arguments)) => {
                    let mut command = netns.command(program);
                    command.args(arguments).arg(binary);
                    command
                }
            };
            command.arg("run").arg("--config").arg(file);
            command
        })
    }

    /// As [`Self::start`], with the daemon that `INJECTOR_NEXT_BIN` names, to upgrade to; without
    /// it the same daemon.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_next(netns: &Netns, config: &str) -> anyhow::Result<Self> {
        let next = std::env::var_os(NEXT_BINARY_VARIABLE).map_or_else(binary, |next| Ok(next.into()))?;
        Self::start_under(netns, &[], &next, config)
    }

    /// Starts the command that `command` makes for the configuration file.
    fn start_command(
        netns: &Netns,
        config: &str,
        command: impl FnOnce(&Path) -> Command,
    ) -> anyhow::Result<Self> {
        let metrics = metrics_address(config)?;
        let dir = netns::scratch_dir("injector")?;
        let file = write_config(dir.path(), config)?;
        let log = LogFile::new(dir.path().join("injector.log"));
        let mut command = command(&file);
        forget_settings(&mut command);
        command.env("INJECTOR_LOG_FORMAT", "json");
        let process = Process::start("injector", netns, command, log.path())?;
        let mut injector = Self { process, netns: netns.handle(), metrics, log, dir };
        match injector.wait_ready() {
            Ok(()) => Ok(injector),
            Err(error) => Err(error.context(format!("the injector logged:\n{}", injector.log()))),
        }
    }

    /// One scrape of its metrics.
    ///
    /// # Errors
    /// When it does not respond.
    pub fn metrics(&self) -> anyhow::Result<Metrics> {
        self.netns.run(|| Metrics::scrape(self.metrics))?.context("cannot read the injector's metrics")
    }

    /// The log line of every connection that has ended so far, in that order.
    ///
    /// # Errors
    /// When the log has a line that is not JSON.
    pub fn sessions(&self) -> anyhow::Result<Vec<Session>> {
        parse_sessions(&self.log())
    }

    /// The same, once there are `count`.
    ///
    /// # Errors
    /// As [`Self::sessions`], and when there are fewer after ten seconds, or more.
    pub fn sessions_within(&self, count: usize) -> anyhow::Result<Vec<Session>> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let sessions = self.sessions()?;
            if sessions.len() >= count {
                ensure!(sessions.len() == count, "{} lines for {count} connections", sessions.len());
                return Ok(sessions);
            }
            let ended = sessions.len();
            ensure!(
                Instant::now() < deadline,
                "{ended} of {count} connections ended; logged:\n{}",
                self.log()
            );
            thread::sleep(POLL);
        }
    }

    /// Its whole log.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.since(Mark::default())
    }

    /// Its control socket, with [`ADMIN`] in its configuration.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        self.dir.path().join("admin.sock")
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Replaces the configuration file that it was started with, without a reload.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn rewrite(&self, config: &str) -> anyhow::Result<()> {
        write_config(self.dir.path(), config).map(drop)
    }

    /// Runs `injector WORDS…` against it, which needs [`ADMIN`] in its configuration. Returns the
    /// exit status and the output.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn try_command(&self, words: &[&str]) -> anyhow::Result<(ExitStatus, String)> {
        let mut command = Command::new(binary()?);
        forget_settings(&mut command);
        command.args(words).env("INJECTOR_SOCKET", self.admin_socket());
        let output = command.output()?;
        let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        Ok((output.status, printed))
    }

    /// The same, and requires success.
    ///
    /// # Errors
    /// When the command fails.
    pub fn command(&self, words: &[&str]) -> anyhow::Result<String> {
        let (status, printed) = self.try_command(words)?;
        ensure!(status.success(), "injector {}: {status}: {printed}", words.join(" "));
        Ok(printed)
    }

    /// Starts `injector reload --watch` on its configuration file.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn watching(&self) -> anyhow::Result<Child> {
        let mut command = Command::new(binary()?);
        forget_settings(&mut command);
        command.args(["reload", "--watch"]).arg(self.dir.path().join("injector.toml"));
        command.env("INJECTOR_SOCKET", self.admin_socket());
        Ok(command.stdout(Stdio::piped()).spawn()?)
    }

    /// The output of `injector status --json`.
    ///
    /// # Errors
    /// As [`Self::command`].
    pub fn status(&self) -> anyhow::Result<Value> {
        let answer: Value = serde_json::from_str(&self.command(&["status", "--json"])?)?;
        answer.get("status").cloned().context("no status in the answer")
    }

    /// The response of `/readyz`.
    ///
    /// # Errors
    /// When it does not respond.
    pub fn readiness(&self) -> anyhow::Result<(u16, String)> {
        self.get(self.metrics, "/readyz")
    }

    /// The response of a path at one of its addresses.
    ///
    /// # Errors
    /// When it does not respond.
    pub fn get(&self, address: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
        self.netns.run(|| metrics::get(address, path))?
    }

    /// The response of `/readyz?backends`.
    ///
    /// # Errors
    /// When it does not respond.
    pub fn readiness_with_backends(&self) -> anyhow::Result<(u16, String)> {
        self.get(self.metrics, "/readyz?backends")
    }

    /// Sends SIGHUP.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn hang_up(&mut self) -> anyhow::Result<()> {
        self.process.signal(libc::SIGHUP)
    }

    /// Sends SIGTERM.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn ask_to_stop(&mut self) -> anyhow::Result<()> {
        self.process.signal(libc::SIGTERM)
    }

    /// Waits for the exit after [`Self::ask_to_stop`]; returns the exit status and the whole log.
    ///
    /// # Errors
    /// When it has not exited after a minute.
    pub fn wait_stopped(self) -> anyhow::Result<(ExitStatus, String)> {
        let Self { process, log, dir: _dir, .. } = self;
        let status = process.wait(STOP_LIMIT);
        let log = log.since(Mark::default());
        let status = status.with_context(|| format!("the injector logged:\n{log}"))?;
        Ok((status, log))
    }

    /// Sends SIGTERM, waits, and returns the exit status and the whole log.
    ///
    /// # Errors
    /// As [`Self::wait_stopped`].
    pub fn stop(mut self) -> anyhow::Result<(ExitStatus, String)> {
        self.ask_to_stop()?;
        self.wait_stopped()
    }

    fn wait_ready(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let answer = self.netns.run(|| metrics::get(self.metrics, "/readyz"))?;
            if matches!(answer, Ok((200, _))) {
                return Ok(());
            }
            self.process.ensure_running()?;
            ensure!(Instant::now() < deadline, "not ready after {START_LIMIT:?}: /readyz gives {answer:?}");
            thread::sleep(POLL);
        }
    }
}

fn write_config(dir: &Path, config: &str) -> anyhow::Result<PathBuf> {
    let file = dir.join("injector.toml");
    let own = dir.to_str().context("the scratch directory is not UTF-8")?;
    fs::write(&file, config.replace(OWN_DIRECTORY, own))?;
    Ok(file)
}

/// The log line of one finished connection.
#[derive(Clone, Debug)]
pub struct Session(Value);

impl Session {
    /// A field as text; numbers and booleans as JSON writes them.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<String> {
        match field(&self.0, name)? {
            Value::String(text) => Some(text.clone()),
            Value::Null => None,
            other => Some(other.to_string()),
        }
    }

    /// A field as a number.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<u64> {
        field(&self.0, name)?.as_u64()
    }

    /// The client's address.
    #[must_use]
    pub fn client(&self) -> Option<SocketAddr> {
        self.field("client")?.parse().ok()
    }
}

/// Selects the log lines of finished connections.
///
/// # Errors
/// When a line is not JSON.
pub fn parse_sessions(log: &str) -> anyhow::Result<Vec<Session>> {
    let parse = |line| {
        serde_json::from_str::<Value>(line)
            .with_context(|| format!("the log has a line that is not JSON: {line}"))
    };
    let lines = log.lines().map(parse).collect::<anyhow::Result<Vec<_>>>()?;
    let closed = |line: &Value| field(line, "message").is_some_and(|message| message == CONNECTION_CLOSED);
    Ok(lines.into_iter().filter(closed).map(Session).collect())
}

/// A field at the top level or, in tracing's default JSON format, under `fields`.
fn field<'a>(line: &'a Value, name: &str) -> Option<&'a Value> {
    line.get("fields").and_then(|fields| fields.get(name)).or_else(|| line.get(name))
}

/// The binary under test.
///
/// # Errors
/// When there is none.
pub fn binary() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os(BINARY_VARIABLE) {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "{BINARY_VARIABLE} is {}, which is not a file", path.display());
        return Ok(path);
    }
    // target/PROFILE/deps/TEST-HASH, and target/PROFILE/injector.
    let own = std::env::current_exe()?;
    match own.parent().and_then(Path::parent).map(|profile| profile.join("injector")) {
        Some(path) if path.is_file() => Ok(path),
        _ => bail!("no injector to test: run `cargo build -p injector-user`, or set {BINARY_VARIABLE}"),
    }
}

/// Removes the daemon's settings from the environment: a test's outcome must not depend on the
/// developer's shell.
fn forget_settings(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("INJECTOR_")) {
            command.env_remove(&name);
        }
    }
}

fn metrics_address(config: &str) -> anyhow::Result<SocketAddr> {
    let config: toml::Table = config.parse().context("the configuration is not TOML")?;
    let listen =
        config.get("metrics").and_then(|metrics| metrics.get("listen")).and_then(toml::Value::as_str);
    listen
        .context("the configuration has no metrics.listen")?
        .parse()
        .context("metrics.listen is not an address")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::{Family, VIP_RELAY};
    use crate::service::SMTP;

    #[test]
    fn sessions_are_found_with_fields_flat_or_nested() {
        let log = "{\"message\":\"connection closed\",\"client\":\"[2001:db8:c::7]:9\",\"bytes\":7}\n\
                   {\"fields\":{\"message\":\"listening\"}}\n\
                   {\"fields\":{\"message\":\"connection closed\",\"client\":\"198.51.100.7:9\"}}\n";
        let sessions = parse_sessions(log).unwrap();
        let clients: Vec<_> =
            sessions.iter().filter_map(Session::client).map(|client| client.to_string()).collect();
        assert_eq!(clients, ["[2001:db8:c::7]:9", "198.51.100.7:9"]);
        assert_eq!(sessions[0].number("bytes"), Some(7));
        assert!(parse_sessions("thread 'main' panicked\n").is_err());
    }

    #[test]
    fn the_metrics_address_is_read_back_from_the_configuration() {
        let address = "127.0.0.1:9145".parse().unwrap();
        let forward = Forward::to_mail(VIP_RELAY, SMTP, Family::V6);
        let config = configuration(&[forward], "relay", address);
        assert_eq!(metrics_address(&config).unwrap(), address);
        assert!(config.contains("bind = [\"[2001:db8:a::11]:25\"]"), "{config}");
        assert!(config.contains("backends = [\"[fd25::2]:2525\"]"), "{config}");
    }
}
