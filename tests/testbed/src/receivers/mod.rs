//! Receivers other than Postfix and Dovecot, each with the settings of `docs/receivers.md`.

pub mod aiosmtpd;
pub mod exim;
pub mod haproxy;
pub mod nginx;
pub mod opensmtpd;
mod overlay;

use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use tempfile::TempDir;

use crate::documentation;
use crate::log_file::{LogFile, Mark};
use crate::netns::{self, Family, MAIL, Netns};
use crate::process::Process;
use crate::sockets::LIMIT;

/// A running receiver; stopped on drop.
#[derive(Debug)]
pub struct Receiver {
    // Before the directory: fields are dropped in this order.
    _process: Process,
    log: LogFile,
    _dir: TempDir,
}

impl Receiver {
    /// Its log.
    #[must_use]
    pub fn log(&self) -> &LogFile {
        &self.log
    }

    /// Starts the command and waits until it listens on all `ports`, in both families. It prints to
    /// `output` in `dir`, and logs to `log` there, which may be the same file.
    fn start(
        name: &'static str,
        netns: &Netns,
        dir: TempDir,
        command: Command,
        log: &str,
        ports: &[u16],
    ) -> anyhow::Result<Self> {
        let output = LogFile::new(dir.path().join(OUTPUT));
        let log = LogFile::new(dir.path().join(log));
        let mut process = Process::start(name, netns, command, output.path())?;
        let sockets = Family::ALL.map(|family| ports.iter().map(move |port| (MAIL.of(family), *port).into()));
        let sockets: Vec<SocketAddr> = sockets.into_iter().flatten().collect();
        process.wait_listening(netns, &sockets, LIMIT).with_context(|| {
            format!("{name} printed:\n{}{}", output.since(Mark::default()), log.since(Mark::default()))
        })?;
        Ok(Self { _process: process, log, _dir: dir })
    }
}

/// What a receiver prints.
const OUTPUT: &str = "output";

/// A directory for a receiver's files, which its unprivileged processes can enter.
fn directory(name: &str) -> anyhow::Result<TempDir> {
    let dir = netns::scratch_dir(name)?;
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755))?;
    Ok(dir)
}

/// The settings that `docs/receivers.md` has for this server.
///
/// # Errors
/// When the page has none.
pub fn documented(server: &str) -> anyhow::Result<String> {
    documentation::example("docs/receivers.md", server, 0)
}

/// Writes a configuration file.
fn write(dir: &Path, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = dir.join(name);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
