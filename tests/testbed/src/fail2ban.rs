//! Debian's fail2ban, with its files in a directory of its own.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use tempfile::TempDir;

use crate::log_file::{LogFile, Mark};
use crate::netns::{self, Netns, NetnsHandle};
use crate::process::Process;
use crate::tools;

/// How long it may take to start and to end.
const LIMIT: Duration = Duration::from_secs(20);

/// A running fail2ban.
#[derive(Debug)]
pub struct Fail2Ban {
    // Before the directory: fields are dropped in this order.
    process: Option<Process>,
    netns: NetnsHandle,
    tree: PathBuf,
    log: LogFile,
    dir: TempDir,
}

impl Fail2Ban {
    /// Starts it with this `jail.local` and this action, whose file has the action's name.
    ///
    /// # Errors
    /// When the package was not unpacked, or it does not start.
    pub fn start(netns: &Netns, jail: &str, action: &Path) -> anyhow::Result<Self> {
        let tree = tools::folder()?.join(tools::receiver("fail2ban"));
        ensure!(tree.is_dir(), "fail2ban is missing: run `cargo xtask setup --only mail`");
        let dir = netns::scratch_dir("fail2ban")?;
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("action.d"))?;
        symlink(tree.join("etc/fail2ban/filter.d"), at("filter.d"))?;
        let name = action.file_name().context("the action has no file name")?;
        fs::copy(action, at("action.d").join(name)).with_context(|| format!("{}", action.display()))?;
        let log = LogFile::new(at("log"));
        fs::write(log.path(), "")?;
        let settings = format!(
            "[Definition]\nloglevel = INFO\nlogtarget = {}\nsyslogsocket = auto\nsocket = {}\npidfile = {}\n\
             dbfile = {}\ndbpurgeage = 1d\n",
            log.path().display(),
            at("socket").display(),
            at("pid").display(),
            at("database").display(),
        );
        fs::write(at("fail2ban.conf"), settings)?;
        fs::write(at("jail.conf"), "[DEFAULT]\nbackend = polling\n")?;
        fs::write(at("jail.local"), jail)?;
        let mut fail2ban = Self { process: None, netns: netns.handle(), tree, log, dir };
        let mut command = netns.command("/usr/bin/python3");
        command
            .arg(fail2ban.tree.join("usr/bin/fail2ban-server"))
            .args(["-f", "-c"])
            .arg(fail2ban.dir.path());
        command.env("PYTHONPATH", fail2ban.tree.join("usr/lib/python3/dist-packages"));
        let output = fail2ban.dir.path().join("output");
        fail2ban.process = Some(Process::start("fail2ban", netns, command, &output)?);
        fail2ban.log.wait_for(Mark::default(), &["Jail ", " started"], LIMIT).with_context(|| {
            let printed = fs::read_to_string(&output).unwrap_or_default();
            format!("fail2ban printed:\n{printed}and logged:\n{}", fail2ban.log.since(Mark::default()))
        })?;
        Ok(fail2ban)
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> &LogFile {
        &self.log
    }

    /// Runs `fail2ban-client WORDS…` and returns what it prints.
    ///
    /// # Errors
    /// When it fails.
    pub fn client(&self, words: &[&str]) -> anyhow::Result<String> {
        let mut command = self.netns.command("/usr/bin/python3");
        command.arg(self.tree.join("usr/bin/fail2ban-client")).arg("-c").arg(self.dir.path()).args(words);
        command.env("PYTHONPATH", self.tree.join("usr/lib/python3/dist-packages"));
        let output = command.output()?;
        let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(output.status.success(), "fail2ban-client {}: {}: {printed}", words.join(" "), output.status);
        Ok(printed)
    }

    /// Stops it, as a service manager does.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(mut self) -> anyhow::Result<()> {
        if let Some(mut process) = self.process.take() {
            process.signal(libc::SIGTERM)?;
            process.wait(LIMIT)?;
        }
        Ok(())
    }
}
