//! Debian's CrowdSec with nothing but its LAPI: no logs, no hub, no Central API.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use tempfile::TempDir;

use crate::certificate::Certificate;
use crate::netns::{self, Netns, NetnsHandle};
use crate::process::Process;
use crate::tools;

/// Where it listens, in the namespace that it runs in.
pub const LAPI: &str = "127.0.0.1:8080";

/// How long it may take to listen: it creates its database first.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A LAPI with its database. It runs until [`CrowdSec::kill`] or drop.
#[derive(Debug)]
pub struct CrowdSec {
    // Before the directory: fields are dropped in this order.
    process: Option<Process>,
    netns: NetnsHandle,
    tree: PathBuf,
    dir: TempDir,
}

impl CrowdSec {
    /// Starts it, with TLS if there is a certificate.
    ///
    /// # Errors
    /// When the package was not unpacked, or it does not start.
    pub fn start(netns: &Netns, tls: Option<&Certificate>) -> anyhow::Result<Self> {
        let tree = tools::folder()?.join(tools::receiver("crowdsec"));
        ensure!(tree.is_dir(), "crowdsec is missing: run `cargo xtask setup --only mail`");
        let dir = netns::scratch_dir("crowdsec")?;
        configure(dir.path(), tls)?;
        let mut crowdsec = Self { process: None, netns: netns.handle(), tree, dir };
        // Registers it with its own database, which needs no LAPI.
        let credentials = crowdsec.dir.path().join("credentials.yaml");
        let scheme = if tls.is_some() { "https" } else { "http" };
        let credentials = credentials.display().to_string();
        crowdsec.cscli(&[
            "machines",
            "add",
            "-a",
            "-f",
            &credentials,
            "-u",
            &format!("{scheme}://{LAPI}/"),
        ])?;
        crowdsec.run(netns)?;
        Ok(crowdsec)
    }

    /// Starts it again.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn run(&mut self, netns: &Netns) -> anyhow::Result<()> {
        let mut command = netns.command(self.tree.join("usr/bin/crowdsec"));
        command.arg("-c").arg(self.config()).arg("-no-cs");
        let output = self.dir.path().join("output");
        let mut process = Process::start("crowdsec", netns, command, &output)?;
        let address: SocketAddr = LAPI.parse()?;
        process.wait_listening(netns, &[address], START_LIMIT).with_context(|| {
            format!("crowdsec printed:\n{}", fs::read_to_string(&output).unwrap_or_default())
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Kills it. The database stays.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Runs `cscli WORDS…` and returns what it prints.
    ///
    /// # Errors
    /// When it fails.
    pub fn cscli(&self, words: &[&str]) -> anyhow::Result<String> {
        let mut command = self.netns.command(self.tree.join("usr/bin/cscli"));
        let output = command.arg("-c").arg(self.config()).args(words).output()?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "cscli {}: {}\n{printed}{error}", words.join(" "), output.status);
        Ok(printed)
    }

    /// A new API key.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn add_bouncer(&self, name: &str) -> anyhow::Result<String> {
        Ok(self.cscli(&["bouncers", "add", name, "-o", "raw"])?.trim().to_owned())
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("config.yaml")
    }
}

fn configure(dir: &Path, tls: Option<&Certificate>) -> anyhow::Result<()> {
    for folder in ["data", "hub", "notifications", "plugins"] {
        fs::create_dir(dir.join(folder))?;
    }
    let at = dir.display();
    let mut config = format!(
        "common:\n  daemonize: false\n  log_media: stdout\n  log_level: info\n  working_dir: {at}\n\
         config_paths:\n  config_dir: {at}\n  data_dir: {at}/data\n  simulation_path: {at}/simulation.yaml\n  \
         hub_dir: {at}/hub\n  index_path: {at}/hub/.index.json\n  notification_dir: {at}/notifications\n  \
         plugin_dir: {at}/plugins\n\
         crowdsec_service:\n  enable: false\n  acquisition_path: {at}/acquis.yaml\n\
         cscli:\n  output: human\n\
         db_config:\n  type: sqlite\n  db_path: {at}/data/crowdsec.db\n  use_wal: true\n\
         prometheus:\n  enabled: false\n\
         api:\n  client:\n    insecure_skip_verify: {}\n    credentials_path: {at}/credentials.yaml\n  \
         server:\n    log_level: info\n    listen_uri: {LAPI}\n    profiles_path: {at}/profiles.yaml\n    \
         console_path: {at}/console.yaml\n",
        // Of cscli.
        tls.is_some(),
    );
    if let Some(Certificate { chain, key, .. }) = tls {
        write!(
            config,
            "    tls:\n      cert_file: {}\n      key_file: {}\n",
            chain.display(),
            key.display()
        )?;
    }
    let profile =
        "name: none\nfilters:\n - Alert.Remediation == true\ndecisions:\n - type: ban\n   duration: 4h\n";
    for (name, text) in [
        ("config.yaml", config.as_str()),
        ("profiles.yaml", profile),
        ("simulation.yaml", "simulation: false\n"),
        ("console.yaml", "share_manual_decisions: false\n"),
        ("acquis.yaml", "filenames: []\n"),
        ("hub/.index.json", "{}\n"),
        ("credentials.yaml", ""),
    ] {
        fs::write(dir.join(name), text).with_context(|| format!("cannot write {name}"))?;
    }
    Ok(())
}
