//! Publishes the metrics: to a file for node_exporter, or to a Pushgateway.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::report::{Report, last_success};

/// How long a Pushgateway may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Replaces the file by one rename: node_exporter may read at any moment, and must not see half a
/// file.
pub(super) fn to_file(report: &Report, file: &Path) -> Result<()> {
    let before = match fs::read_to_string(file) {
        Ok(text) => last_success(&text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    };
    let temporary = temporary_path(file)?;
    let written = write(&temporary, &report.metrics(before)).and_then(|()| fs::rename(&temporary, file));
    if written.is_err() {
        // The file may not exist.
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(|| format!("cannot write the metrics to {}", file.display()))
}

/// A name in the same folder, so that a rename works. It does not end in `.prom`, so node_exporter
/// ignores it.
fn temporary_path(file: &Path) -> Result<PathBuf> {
    let name = file.file_name().with_context(|| format!("{} is not a file name", file.display()))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}", process::id()));
    Ok(file.with_file_name(temporary))
}

fn write(file: &Path, text: &str) -> io::Result<()> {
    let mut file = File::create(file)?;
    // Readable with any umask: node_exporter runs as another user, and hardened units have a strict
    // umask.
    file.set_permissions(Permissions::from_mode(0o644))?;
    file.write_all(text.as_bytes())?;
    // Otherwise a crash may leave an empty file under the final name.
    file.sync_all()
}

/// Pushes the metrics to a Pushgateway. A success replaces the whole group (PUT). A failure
/// replaces only the metrics that it names (POST), so the time of the last success stays.
pub(super) fn to_gateway(report: &Report, url: &str) -> Result<()> {
    let agent = ureq::Agent::config_builder()
        .timeout_global(Some(TIMEOUT))
        .http_status_as_error(false)
        .max_redirects(0)
        .build()
        .new_agent();
    let group = format!("{url}/metrics/job/injector_probe/probe/{}", report.probe);
    let request = if report.failure.is_none() { agent.put(&group) } else { agent.post(&group) };
    let answer = request.content_type("text/plain; version=0.0.4").send(report.metrics(None));
    let mut answer = answer.with_context(|| format!("cannot push the metrics to {url}"))?;
    if answer.status().is_success() {
        return Ok(());
    }
    let said = answer.body_mut().read_to_string().unwrap_or_default();
    ensure!(!said.trim().is_empty(), "{url} rejected the metrics with status {}", answer.status());
    bail!("{url} rejected the metrics with status {}: {}", answer.status(), said.trim());
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::probe::step::{Failure, Step};

    fn report(at: u64, passed: bool) -> Report {
        Report {
            probe: "mail".to_owned(),
            id: String::new(),
            ended: UNIX_EPOCH + Duration::from_secs(at),
            took: Duration::ZERO,
            steps: Vec::new(),
            failure: (!passed).then(|| Failure { step: Step::Arrival, error: String::new() }),
            proxy_ports: Vec::new(),
            leftovers: 0,
        }
    }

    #[test]
    fn the_last_success_survives_failures_and_no_temporary_file_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("probe.prom");
        let success = |text: &str| last_success(text).map(|at| at.to_string());
        for (at, passed, expected) in
            [(1, false, None), (2, true, Some("2")), (3, false, Some("2")), (4, true, Some("4"))]
        {
            to_file(&report(at, passed), &file).unwrap();
            assert_eq!(success(&fs::read_to_string(&file).unwrap()).as_deref(), expected, "{at}");
        }
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);
        let names: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["probe.prom"]);
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let error = to_file(&report(1, true), Path::new("/no/such/folder/probe.prom")).unwrap_err();
        assert!(format!("{error:#}").contains("/no/such/folder/probe.prom"), "{error:#}");
    }
}
