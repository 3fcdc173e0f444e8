//! The rules of layout 5, by nft(8).

use std::{
    io::{self, Write as _},
    process::{Command, Stdio},
    thread,
};

use caps::{CapSet, Capability};
use thiserror::Error;

/// The first of these that exists; services are often started without the sbin folders in PATH.
const PROGRAMS: [&str; 3] = ["nft", "/usr/sbin/nft", "/sbin/nft"];

/// The comment of a rule that every table of layout 5 has.
const MARK: &str = "keeps_connections_tracked";

/// Why the rules could not be read or changed.
#[derive(Debug, Error)]
pub enum NatError {
    /// No such program.
    #[error("the program nft is neither in PATH nor in /usr/sbin: install the package nftables")]
    Missing,
    /// It failed.
    #[error("nft: {0}")]
    Refused(String),
    /// It could not be run.
    #[error("cannot run nft: {0}")]
    Run(io::Error),
}

/// Removes the rules of all tables of layout 5. Established connections are translated as before:
/// by the tables' chains, and the one rule that has connections tracked.
pub(super) fn flush() -> Result<(), NatError> {
    for table in tables()? {
        run(
            &["-f", "-"],
            &format!(
                "flush chain inet {table} prerouting\nflush chain inet {table} postrouting\n\
                 add rule inet {table} prerouting ct state established accept comment \"{MARK}\"\n"
            ),
        )?;
    }
    Ok(())
}

/// Deletes all tables of layout 5, and returns their names.
pub(super) fn delete() -> Result<Vec<String>, NatError> {
    let tables = match tables() {
        // Where nft is missing, there is no table.
        Err(NatError::Missing) => return Ok(Vec::new()),
        tables => tables?,
    };
    for table in &tables {
        run(&["delete", "table", "inet", table], "")?;
    }
    Ok(tables)
}

fn tables() -> Result<Vec<String>, NatError> {
    let all = run(&["list", "tables", "inet"], "")?;
    let names = all.lines().filter_map(|line| line.strip_prefix("table inet "));
    let mut found = Vec::new();
    for name in names {
        // A table that is gone by now is not ours.
        if run(&["list", "table", "inet", name], "").is_ok_and(|rules| rules.contains(MARK)) {
            found.push(name.to_owned());
        }
    }
    Ok(found)
}

/// Runs nft on a thread of its own, which hands CAP_NET_ADMIN on: a daemon that is not root has it
/// as a capability that would otherwise be lost at exec(2).
fn run(args: &[&str], input: &str) -> Result<String, NatError> {
    let inside = || {
        // Fails if the daemon lacks the capability; nft then reports it.
        let _ = caps::raise(None, CapSet::Inheritable, Capability::CAP_NET_ADMIN)
            .and_then(|()| caps::raise(None, CapSet::Ambient, Capability::CAP_NET_ADMIN));
        start(args, input)
    };
    thread::scope(|scope| scope.spawn(inside).join())
        .unwrap_or_else(|_| Err(NatError::Run(io::Error::other("the thread that ran it panicked"))))
}

fn start(args: &[&str], input: &str) -> Result<String, NatError> {
    for program in PROGRAMS {
        let mut command = Command::new(program);
        command.args(args).env("LC_ALL", "C");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            child => child.map_err(NatError::Run)?,
        };
        let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output().map_err(NatError::Run)?;
        if !output.status.success() {
            return Err(NatError::Refused(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        written.map_err(NatError::Run)?;
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(NatError::Missing)
}
