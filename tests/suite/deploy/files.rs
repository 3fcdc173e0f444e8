//! Units and configuration, without starting a service.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use injector_testbed::daemon;
use tempfile::TempDir;

/// The maximum exposure that `systemd-analyze security` may report, of 100; lower is better. The
/// rest is the network, netlink for NAT, and the three capabilities.
const EXPOSURE: u32 = 19;

/// The workspace's folder.
pub(crate) fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_path_buf()
}

/// A file of `deploy/`.
pub(crate) fn deploy(path: &str) -> anyhow::Result<String> {
    let path = workspace().join("deploy").join(path);
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// A root with the units, the files they refer to, and systemd's own units.
fn root() -> anyhow::Result<TempDir> {
    let root = tempfile::tempdir()?;
    let units = root.path().join("usr/lib/systemd/system");
    fs::create_dir_all(units.parent().context("a parent")?)?;
    let own = if Path::new("/usr/lib/systemd/system").is_dir() { "/usr/lib" } else { "/lib" };
    let status = Command::new("cp").args(["-a", &format!("{own}/systemd/system")]).arg(&units).status()?;
    ensure!(status.success(), "cannot copy systemd's own units");
    for unit in ["injector.service", "injector.socket"] {
        fs::write(units.join(unit), deploy(&format!("systemd/{unit}"))?)?;
    }
    let program = root.path().join("usr/bin/injector");
    fs::create_dir_all(root.path().join("usr/bin"))?;
    fs::write(&program, "")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(root)
}

fn analyze(root: &TempDir, words: &[&str]) -> anyhow::Result<(bool, String)> {
    let mut command = Command::new("systemd-analyze");
    command.args(words).arg(format!("--root={}", root.path().display())).arg("--no-pager");
    let output = command.output().context("cannot run systemd-analyze")?;
    let printed = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&printed).into_owned()))
}

pub(crate) fn units_are_sound() -> anyhow::Result<()> {
    let root = root()?;
    let verify = || analyze(&root, &["verify", "--man=no", "injector.service", "injector.socket"]);
    let (sound, printed) = verify()?;
    // Some of systemd's own units refer to programs that this root lacks.
    let complaints: Vec<_> = printed.lines().filter(|line| line.contains("injector")).collect();
    ensure!(sound && complaints.is_empty(), "{printed}");
    // It would have reported an error:
    fs::remove_file(root.path().join("usr/bin/injector"))?;
    let (sound, printed) = verify()?;
    ensure!(
        !sound && printed.contains("/usr/bin/injector"),
        "no complaint about a missing program: {printed}"
    );
    Ok(())
}

pub(crate) fn unit_is_hardened() -> anyhow::Result<()> {
    let root = root()?;
    let threshold = format!("--threshold={EXPOSURE}");
    let (passed, printed) = analyze(&root, &["security", "--offline=true", &threshold, "injector.service"])?;
    let score = printed.lines().find(|line| line.contains("Overall exposure")).unwrap_or(&printed);
    println!("{}", score.trim());
    ensure!(passed, "more exposed than {EXPOSURE} of 100:\n{printed}");
    Ok(())
}

/// The daemon accepts the installed file.
pub(crate) fn configuration_is_valid() -> anyhow::Result<()> {
    let file = workspace().join("deploy/injector.toml");
    let output = Command::new(daemon::binary()?).args(["check", "--config"]).arg(&file).output()?;
    let printed = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && complaints.is_empty(), "{complaints}");
    ensure!(!printed.to_lowercase().contains("warning"), "{printed}");
    for listener in ["smtp", "submissions", "submission", "imaps"] {
        ensure!(printed.contains(listener), "no listener {listener} in\n{printed}");
    }
    // ExecReload= of the unit uses the admin socket.
    let config: toml::Table = deploy("injector.toml")?.parse()?;
    ensure!(config.contains_key("admin"), "the installed configuration has no [admin]");
    Ok(())
}

/// systemd must not kill the daemon while sessions may still finish.
pub(crate) fn a_stop_has_its_time() -> anyhow::Result<()> {
    let config: toml::Table = deploy("injector.toml")?.parse()?;
    let deadline = config.get("stop").and_then(|stop| stop.get("deadline")).and_then(toml::Value::as_str);
    let deadline = seconds(deadline.context("no stop.deadline")?)?;
    let unit = deploy("systemd/injector.service")?;
    let timeout = unit.lines().find_map(|line| line.strip_prefix("TimeoutStopSec="));
    let timeout = seconds(timeout.context("no TimeoutStopSec=")?)?;
    ensure!(timeout > deadline + 10, "TimeoutStopSec= is {timeout} s, stop.deadline {deadline} s");
    Ok(())
}

/// `30s`, `2m`, `5min`.
fn seconds(text: &str) -> anyhow::Result<u64> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).context("no unit")?);
    let factor = match unit {
        "s" => 1,
        "m" | "min" => 60,
        _ => anyhow::bail!("unit {unit:?}"),
    };
    Ok(number.parse::<u64>()? * factor)
}
