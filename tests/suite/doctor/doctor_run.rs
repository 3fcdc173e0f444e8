//! One run of `injector doctor`.

use std::fmt::Write as _;
use std::fs;
use std::process::Output;

use anyhow::{Context as _, ensure};
use injector_testbed::daemon;
use injector_testbed::netns::{self, Netns, VIP_RELAY};
use serde_json::Value;

/// A listener of the configuration.
#[derive(Clone, Debug)]
pub(crate) struct Listener {
    pub(crate) name: &'static str,
    pub(crate) protocol: &'static str,
    pub(crate) backends: Vec<String>,
    /// More lines, or tables.
    pub(crate) more: &'static str,
    /// Whether it has an IPv6 address.
    pub(crate) ipv6: bool,
}

/// A listener for clients of both families.
pub(crate) fn listener(name: &'static str, protocol: &'static str, backends: &[String]) -> Listener {
    Listener { name, protocol, backends: backends.to_vec(), more: "", ipv6: true }
}

/// The result.
#[derive(Debug)]
pub(crate) struct DoctorRun {
    pub(crate) code: Option<i32>,
    json: Value,
}

/// Runs the doctor in a namespace.
pub(crate) fn run_json(netns: &Netns, listeners: &[Listener], flags: &[&str]) -> anyhow::Result<DoctorRun> {
    let output = run(netns, &configuration(listeners), &[&["--json"], flags].concat())?;
    let json = serde_json::from_slice(&output.stdout);
    let json =
        json.with_context(|| format!("no JSON; it printed {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok(DoctorRun { code: output.status.code(), json })
}

/// The same with text output.
pub(crate) fn run(netns: &Netns, config: &str, flags: &[&str]) -> anyhow::Result<Output> {
    let dir = netns::scratch_dir("doctor")?;
    let file = dir.path().join("injector.toml");
    fs::write(&file, config)?;
    let mut command = netns.command(daemon::binary()?);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("INJECTOR_") {
            command.env_remove(name);
        }
    }
    command.arg("doctor").arg("--config").arg(&file).args(flags).output().context("cannot run the doctor")
}

pub(crate) fn configuration(listeners: &[Listener]) -> String {
    let mut text = String::new();
    for (number, Listener { name, protocol, backends, more, ipv6 }) in listeners.iter().enumerate() {
        let port = 3000 + number;
        let ipv6 = if *ipv6 { format!(", \"[{}]:{port}\"", VIP_RELAY.v6) } else { String::new() };
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "[[listener]]\nname = \"{name}\"\nbind = [\"{}:{port}\"{ipv6}]\nprotocol = \"{protocol}\"\n\
             backends = {backends:?}\n{more}\n",
            VIP_RELAY.v4
        );
    }
    text
}

impl DoctorRun {
    /// All findings, as `listener/address verdict`, notes with the word before.
    pub(crate) fn findings(&self) -> Vec<String> {
        let mut all = Vec::new();
        for listener in list(&self.json, "listeners") {
            let name = text(listener, "name");
            all.extend(list(listener, "findings").map(|one| found(&name, one)));
            for backend in list(listener, "backends") {
                let own = format!("{name}/{}", text(backend, "backend"));
                all.extend(list(backend, "findings").map(|one| found(&own, one)));
                for address in list(backend, "addresses") {
                    let own = format!("{name}/{}", text(address, "address"));
                    all.extend(list(address, "findings").map(|one| found(&own, one)));
                }
            }
        }
        all
    }

    /// The suggested lines of all findings at addresses.
    pub(crate) fn lines(&self) -> Vec<String> {
        let addresses = self.addresses();
        let findings = addresses.iter().flat_map(|address| list(address, "findings"));
        let changes = findings.flat_map(|finding| list(finding, "changes"));
        let lines = changes.flat_map(|change| list(change, "lines"));
        lines.filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// What kind of server was detected.
    pub(crate) fn servers(&self) -> Vec<String> {
        self.addresses().iter().map(|address| text(address, "server")).collect()
    }

    /// The servers' replies to a foreign recipient, in order.
    pub(crate) fn relay_answers(&self) -> Vec<String> {
        let addresses = self.addresses();
        let observations = addresses.iter().flat_map(|address| list(address, "observations"));
        observations
            .filter_map(|one| one.get("relay").filter(|relay| !relay.is_null()))
            .map(|relay| text(relay, "answer"))
            .collect()
    }

    /// The number of connections it made.
    pub(crate) fn connections(&self) -> usize {
        self.addresses().iter().map(|address| list(address, "observations").count()).sum()
    }

    /// # Errors
    /// When the findings differ, or the exit code does not match them.
    pub(crate) fn expect(&self, findings: &[&str]) -> anyhow::Result<()> {
        ensure!(
            self.findings() == findings,
            "expected {findings:?}, got {:?}\n{:#}",
            self.findings(),
            self.json
        );
        let fine = findings.iter().all(|finding| finding.contains(" note "));
        let code = i32::from(!fine);
        ensure!(self.code == Some(code), "exit code {:?}, expected {code}", self.code);
        ensure!(self.json.get("ok").and_then(Value::as_bool) == Some(fine), "`ok` is not {fine}");
        Ok(())
    }

    /// # Errors
    /// When the advice lacks the line.
    pub(crate) fn advises(&self, line: &str) -> anyhow::Result<()> {
        let lines = self.lines();
        ensure!(lines.iter().any(|given| given.trim() == line), "no line {line:?} in {lines:#?}");
        Ok(())
    }

    fn addresses(&self) -> Vec<&Value> {
        let backends = list(&self.json, "listeners").flat_map(|listener| list(listener, "backends"));
        backends.flat_map(|backend| list(backend, "addresses")).collect()
    }
}

fn found(at: &str, finding: &Value) -> String {
    let fault = finding.get("fault").and_then(Value::as_bool).unwrap_or_default();
    format!("{at} {}{}", if fault { "" } else { "note " }, text(finding, "verdict"))
}

fn list<'a>(value: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    value.get(name).and_then(Value::as_array).into_iter().flatten()
}

fn text(value: &Value, name: &str) -> String {
    value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}
