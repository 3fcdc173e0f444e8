//! HAProxy with `send-proxy-v2` on the edge: the reference. If it fails too, the testbed is at
//! fault.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use tempfile::TempDir;

use crate::forward::Forward;
use crate::netns::{self, Netns};
use crate::process::Process;
use crate::sockets::LIMIT;

/// A running HAProxy; stopped on drop.
#[derive(Debug)]
pub struct HaProxy {
    // Before the directory: fields are dropped in this order.
    _process: Process,
    log: PathBuf,
    _dir: TempDir,
}

impl HaProxy {
    /// Starts it and waits until it listens.
    ///
    /// # Errors
    /// When HAProxy is not installed, refuses its configuration or does not listen within ten
    /// seconds.
    pub fn start(netns: &Netns, forwards: &[Forward]) -> anyhow::Result<Self> {
        let dir = netns::scratch_dir("haproxy")?;
        let config = dir.path().join("haproxy.cfg");
        fs::write(&config, configuration(forwards))?;
        let log = dir.path().join("haproxy.log");
        let mut command = netns.command("haproxy");
        command.arg("-db").arg("-f").arg(&config);
        let mut process = Process::start("haproxy", netns, command, &log).context("(install haproxy)")?;
        let sockets: Vec<_> = forwards.iter().map(|forward| forward.bind).collect();
        process
            .wait_listening(netns, &sockets, LIMIT)
            .with_context(|| format!("HAProxy printed:\n{}", fs::read_to_string(&log).unwrap_or_default()))?;
        Ok(Self { _process: process, log, _dir: dir })
    }

    /// Its output, which includes one line per finished connection.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

fn configuration(forwards: &[Forward]) -> String {
    let mut text = "global
    log stdout format raw daemon
defaults
    mode tcp
    log global
    option tcplog
    timeout connect 5s
    timeout client 60s
    timeout server 60s
"
    .to_owned();
    for Forward { name, bind, backend, .. } in forwards {
        // Writing to a String cannot fail.
        let _ = write!(text, "listen {name}\n    bind {bind}\n    server mail {backend} send-proxy-v2\n");
    }
    text
}
