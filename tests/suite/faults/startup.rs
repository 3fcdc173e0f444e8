//! A daemon that cannot start, or not as configured: one clear error, and the next engine where
//! there is one.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, ensure};
use injector_testbed::daemon::{ADMIN, OWN_DIRECTORY, binary};
use injector_testbed::netns::scratch_dir;

use crate::testbed::{Testbed, accept_with_header, config, pass, public_address};

type Start = fn(&Testbed) -> anyhow::Result<()>;

pub(crate) const TRIALS: &[(&str, Start)] = &[
    ("an error in the file is reported with its line", mistake),
    ("a port in use", port_in_use),
    ("a second daemon names the first", second_daemon),
    ("an address of another machine", foreign_address),
    ("without capabilities: auto selects relay, and mail passes", auto_without_capabilities),
    ("without capabilities: splice reports what is missing", splice_without_capabilities),
    ("too few descriptors", few_descriptors),
    ("selftest as root", selftest_as_root),
    ("selftest with CAP_BPF and CAP_NET_ADMIN alone", selftest_with_two_capabilities),
    ("selftest without capabilities", selftest_without_capabilities),
    ("capabilities are dropped", capabilities_dropped),
    ("files elsewhere are out of reach", files_elsewhere),
];

/// Runs a command on the edge until it exits.
fn run(testbed: &Testbed, line: &[&str]) -> anyhow::Result<Output> {
    let (program, arguments) = line.split_first().context("nothing to run")?;
    let mut command: Command = testbed.topology.edge.command(program);
    Ok(command.args(arguments).output()?)
}

fn own_binary() -> anyhow::Result<String> {
    Ok(binary()?.display().to_string())
}

/// A file with this configuration.
fn file(text: &str) -> anyhow::Result<tempfile::NamedTempFile> {
    let file = tempfile::Builder::new().prefix("inj-faults-").suffix(".toml").tempfile()?;
    std::fs::write(file.path(), text)?;
    Ok(file)
}

/// Checks that the daemon does not start with this configuration, and that its error has all these
/// words.
pub(crate) fn fails(testbed: &Testbed, prefix: &[&str], text: &str, words: &[&str]) -> anyhow::Result<()> {
    let file = file(text)?;
    let (binary, path) = (own_binary()?, file.path().display().to_string());
    let output = run(testbed, &[prefix, &[&binary, "run", "--config", &path]].concat())?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "started: {error}");
    for word in words {
        ensure!(error.contains(word), "no {word:?} in: {error}");
    }
    Ok(())
}

fn mistake(testbed: &Testbed) -> anyhow::Result<()> {
    let text = config("splice", "smtp", "").replace("protocol = \"smtp\"", "protocol = \"smpt\"");
    fails(testbed, &[], &text, &[".toml:7:", "listener \"test\"", "did you mean \"smtp\"?"])
}

fn port_in_use(testbed: &Testbed) -> anyhow::Result<()> {
    let _taken = testbed.topology.edge.run(|| std::net::TcpListener::bind(public_address()))??;
    fails(
        testbed,
        &[],
        &config("relay", "smtp", ""),
        &[
            "listener \"test\"",
            "192.0.2.10:2500",
            "another program listens there: ",
            &format!("(process {})", std::process::id()),
        ],
    )
}

/// A second daemon names the first one, and disturbs nothing of it.
fn second_daemon(testbed: &Testbed) -> anyhow::Result<()> {
    let admin = format!("\n\n{ADMIN}");
    let injector = testbed.injector("relay", "smtp", &admin)?;
    let process = format!("(process {})", injector.pid());
    let own = injector.admin_socket();
    let own = own.parent().and_then(Path::to_str).context("no directory")?;
    let same = config("relay", "smtp", &admin).replace(OWN_DIRECTORY, own);
    fails(
        testbed,
        &[],
        &same,
        &["another injector ", &process, "runs with this admin.socket: stop it first"],
    )?;
    // Without commands, it is the address that both want.
    let elsewhere = config("relay", "smtp", "");
    fails(testbed, &[], &elsewhere, &["192.0.2.10:2500", "another injector listens there ", &process])?;
    injector.status()?;
    let backend = testbed.backend()?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut client, b"220 hello\r\n")
}

fn foreign_address(testbed: &Testbed) -> anyhow::Result<()> {
    let text = config("relay", "smtp", "").replace("192.0.2.10", "192.0.2.99");
    fails(testbed, &[], &text, &["192.0.2.99:2500", "no interface of this machine has the address"])
}

pub(crate) const WITHOUT_RIGHTS: [&str; 4] = ["capsh", "--drop=all", "--", "-c"];

fn auto_without_capabilities(testbed: &Testbed) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector_by(&WITHOUT_RIGHTS, &config("auto", "smtp", ""))?;
    let mut client = testbed.client()?;
    let (mut server, header, _) = accept_with_header(&backend)?;
    ensure!(header.source == client.local_addr()?, "{header:?}");
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    let log = injector.log();
    ensure!(log.contains("the splice engine cannot run here") && log.contains("CAP_BPF"), "{log}");
    ensure!(log.contains("\"engine\":\"relay\""), "{log}");
    Ok(())
}

fn splice_without_capabilities(testbed: &Testbed) -> anyhow::Result<()> {
    let file = file(&config("splice", "smtp", ""))?;
    let line = format!("{} run --config {}", own_binary()?, file.path().display());
    let output = run(testbed, &[&WITHOUT_RIGHTS[..], &[&line]].concat())?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "started: {error}");
    for word in [
        "listener \"test\"",
        "engine \"splice\" cannot run here",
        "CAP_BPF and CAP_NET_ADMIN",
        "injector selftest",
    ] {
        ensure!(error.contains(word), "no {word:?} in: {error}");
    }
    Ok(())
}

/// So that the descriptors of the workers do not depend on the machine.
const ONE_WORKER: &str = "\n\n[limits]\nworkers = 1";

fn few_descriptors(testbed: &Testbed) -> anyhow::Result<()> {
    fails(
        testbed,
        &["prlimit", "--nofile=100:100"],
        &config("relay", "smtp", ""),
        &["open-file limit (100)", "LimitNOFILE"],
    )?;
    // 220 descriptors allow two connections; the third is rejected.
    let backend = testbed.backend()?;
    let injector = testbed
        .injector_by(&["prlimit", "--nofile=220:220", "sh", "-c"], &config("relay", "smtp", ONE_WORKER))?;
    ensure!(injector.log().contains("allows fewer connections"), "{}", injector.log());
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut client = testbed.client()?;
        let (mut server, ..) = accept_with_header(&backend)?;
        pass(&mut server, &mut client, b"220 hello\r\n")?;
        open.push((client, server));
    }
    let mut third = testbed.client()?;
    crate::testbed::expect(&mut third, b"421 4.3.2 Too many connections, try again later\r\n")?;
    crate::testbed::counted(
        &injector,
        "injector_connections_rejected_total",
        &[("reason", "no_descriptors")],
        1.0,
    )
}

/// The results of the self-test, run by a command that takes one more argument.
pub(crate) fn selftest(testbed: &Testbed, prefix: &[&str]) -> anyhow::Result<serde_json::Value> {
    let line = format!("{} selftest --json", own_binary()?);
    let output = run(testbed, &[prefix, &[&line]].concat())?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn selftest_as_root(testbed: &Testbed) -> anyhow::Result<()> {
    let found = selftest(testbed, &["sh", "-c"])?;
    ensure!(found["auto"] == "splice", "{found:#}");
    let checks = found["splice"]["checks"].as_array().context("no checks")?;
    ensure!(checks.iter().any(|check| check["name"] == "slow_reader"), "{found:#}");
    ensure!(checks.len() >= 7 && checks.iter().all(|check| check["passed"] == true), "{found:#}");
    let seconds: f64 = checks.iter().filter_map(|check| check["seconds"].as_f64()).sum();
    println!("  {seconds} s");
    ensure!(seconds < 2.0, "took {seconds} s");
    // The daemon reports the same: in its log, and as metrics.
    let injector = testbed.injector("splice", "smtp", "")?;
    let (log, metrics) = (injector.log(), injector.metrics()?);
    for name in checks.iter().filter_map(|check| check["name"].as_str()) {
        let labels = [("engine", "splice"), ("check", name)];
        ensure!(log.contains(&format!("\"check\":\"{name}\",\"passed\":true")), "{name} is not in {log}");
        ensure!((metrics.sum("injector_selftest_check", &labels) - 1.0).abs() < 0.5, "{name} is not 1");
        ensure!(metrics.sum("injector_selftest_check_seconds", &labels) > 0.0, "{name} took no time");
    }
    Ok(())
}

fn selftest_with_two_capabilities(testbed: &Testbed) -> anyhow::Result<()> {
    // By the bounding set: a program started by root gets everything in it, whatever root had
    // before.
    let found = selftest(testbed, &["setpriv", "--bounding-set=-all,+bpf,+net_admin", "sh", "-c"])?;
    ensure!(found["auto"] == "splice", "{found:#}");
    for engine in ["splice", "inline"] {
        let checks = found[engine]["checks"].as_array().context("no checks")?;
        ensure!(!checks.is_empty() && checks.iter().all(|check| check["passed"] == true), "{found:#}");
    }
    Ok(())
}

fn selftest_without_capabilities(testbed: &Testbed) -> anyhow::Result<()> {
    let found = selftest(testbed, &WITHOUT_RIGHTS)?;
    ensure!(found["auto"] == "relay", "{found:#}");
    let reason = found["reason"].as_str().context("no reason")?;
    ensure!(reason.contains("CAP_BPF and CAP_NET_ADMIN"), "{reason}");
    Ok(())
}

/// After startup no thread of the daemon has more capabilities than needed, and the engine still
/// works.
fn capabilities_dropped(testbed: &Testbed) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let injector = testbed.injector("splice", "smtp", "")?;
    for task in std::fs::read_dir(format!("/proc/{}/task", injector.pid()))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let permitted = status.lines().find_map(|line| line.strip_prefix("CapPrm:")).context("no CapPrm")?;
        // CAP_NET_BIND_SERVICE: a reloaded configuration may have other ports below 1024.
        ensure!(u64::from_str_radix(permitted.trim(), 16)? == 1 << 10, "a thread has {permitted}");
        // What it could execute gets nothing back.
        for (field, value) in
            [("CapBnd:", "0000000000000000"), ("CapAmb:", "0000000000000000"), ("NoNewPrivs:", "1")]
        {
            let seen = status.lines().find_map(|line| line.strip_prefix(field)).context(field)?.trim();
            ensure!(seen == value, "{field} is {seen} in {status}");
        }
    }
    ensure!(injector.log().contains("files restricted by Landlock"), "{}", injector.log());
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    pass(&mut client, &mut server, b"EHLO client\r\n")?;
    pass(&mut client, &mut server, b"NOOP\r\n")?;
    drop((client, server));
    let sessions = crate::testbed::finished(&injector, 1)?;
    ensure!(sessions[0].number("spliced_to_backend") == Some(6), "{sessions:?}");
    Ok(())
}

/// A reload reads a file in the configuration's directory, and none elsewhere that a link leads to:
/// Landlock denies it.
fn files_elsewhere(testbed: &Testbed) -> anyhow::Result<()> {
    let injector = testbed.injector("relay", "smtp", &format!("\n\n{ADMIN}"))?;
    let socket = injector.admin_socket();
    let file = socket.parent().context("no directory")?.join("injector.toml");
    let elsewhere = scratch_dir("elsewhere")?;
    let copy = elsewhere.path().join("injector.toml");
    std::fs::copy(&file, &copy)?;
    let replace = |target: &Path| -> anyhow::Result<()> {
        let link = file.with_extension("new");
        std::os::unix::fs::symlink(target, &link)?;
        Ok(std::fs::rename(&link, &file)?)
    };
    std::fs::copy(&file, file.with_file_name("beside.toml"))?;
    replace(Path::new("beside.toml"))?;
    injector.command(&["reload"])?;
    replace(&copy)?;
    let (status, printed) = injector.try_command(&["reload"])?;
    ensure!(!status.success() && printed.contains("Permission denied"), "{printed}");
    Ok(())
}
