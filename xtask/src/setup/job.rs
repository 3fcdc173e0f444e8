//! Runs a long command: its output goes to a log, and an interruption ends it, so that setup can
//! clean up.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cargo,
    interruption::{Signals, is_interrupted},
};

/// How many of a failed command's last lines are shown.
const SHOWN: usize = 25;

/// Runs a command, its output appended to a log.
///
/// # Errors
/// When it can't be started, is interrupted or fails: with the last lines of the log.
pub(super) fn run(command: &mut Command, log: &Path) -> Result<()> {
    let _signals = Signals::take();
    let name = cargo::line(command);
    let mut output = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot write the log {}", log.display()))?;
    writeln!(output, "$ {name}").context("writing the log")?;
    let child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone().context("opening the log twice")?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot start `{name}`"))?;
    let status = wait(child).with_context(|| format!("waiting for `{name}`"))?;
    if is_interrupted() {
        bail!("interrupted; unfinished changes were undone");
    }
    if !status.success() {
        bail!("`{name}` failed ({status}); the end of {}:\n{}", log.display(), tail(log));
    }
    Ok(())
}

fn wait(mut child: Child) -> Result<ExitStatus> {
    let mut terminated = false;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if is_interrupted() && !terminated {
            terminated = true;
            terminate(&child);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Passes a signal on that only this process received. A terminal sends it to the whole group
/// anyway.
fn terminate(child: &Child) {
    if let Ok(pid) = libc::pid_t::try_from(child.id()) {
        // SAFETY: kill(2) touches no memory; the child has not been waited for, so the number is
        // still its own.
        unsafe { libc::kill(pid, libc::SIGTERM) };
    }
}

fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let lines = &lines[lines.len().saturating_sub(SHOWN)..];
    lines.iter().map(|line| format!("  | {line}")).collect::<Vec<_>>().join("\n")
}

/// Creates an empty log.
pub(super) fn fresh(log: PathBuf) -> Result<PathBuf> {
    File::create(&log).with_context(|| format!("cannot write the log {}", log.display()))?;
    Ok(log)
}

/// The output of `--version`; `None` if the program does not run.
pub(super) fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    let healthy = output.status.success() && output.status.signal().is_none();
    healthy.then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_shows_the_end_of_its_log() {
        let folder = tempfile::tempdir().unwrap();
        let log = fresh(folder.path().join("job.log")).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "seq 1 100; echo broken >&2; exit 3"]);
        let error = run(&mut command, &log).unwrap_err().to_string();
        assert!(
            error.contains("exit status: 3") && error.contains("| 100\n") && error.contains("| broken"),
            "{error}"
        );
        assert!(!error.contains("| 50\n"), "{error}");
    }

    #[test]
    fn a_success_is_silent_and_logged() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("job.log");
        run(Command::new("echo").arg("done"), &log).unwrap();
        assert_eq!(fs::read_to_string(&log).unwrap(), "$ echo done\ndone\n");
    }

    #[test]
    fn a_tool_that_does_not_run_has_no_version() {
        assert!(version(Path::new("/no/such/tool")).is_none());
        assert!(version(Path::new("/bin/false")).is_none());
        assert!(version(Path::new("/bin/ls")).is_some());
    }
}
