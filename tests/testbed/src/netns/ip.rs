//! Names of namespaces, and `ip`.

use std::process::Command;

use anyhow::{Context, ensure};

/// Prefix of the names of namespaces and of scratch directories.
pub(super) const PREFIX: &str = "inj-";

/// Where iproute2 keeps the names of namespaces.
pub(super) const NETNS_DIR: &str = "/run/netns";

/// Runs `ip ARGS…`; its error output becomes the error.
pub(super) fn ip(args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(args).output().context("cannot run ip (install iproute2)")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", args.join(" "), complaint.trim());
    Ok(())
}
