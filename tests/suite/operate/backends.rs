//! Which backend gets connections: weights, backups, checks, ejection, the operator's commands.

use std::thread;
use std::time::Duration;

use anyhow::ensure;
use injector_testbed::daemon::{Injector, OWN_DIRECTORY};
use injector_testbed::wait::wait_until;

use crate::Run;
use crate::testbed::{Config, Testbed, backend_name};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("backends/weights", weights),
    ("backends/a backup waits until it is needed", backup),
    ("backends/checked by mail on another port", mail_check),
    ("backends/checked by mail with LOCAL on their own", local_check),
    ("backends/checked by tcp", tcp_check),
    ("backends/ejected when connections fail", ejected),
    ("backends/the operator disables one", operator),
    ("backends/the operator changes weights", weights_of_the_operator),
    ("backends/none is up, so all are tried", last_resort),
];

pub(crate) const INLINE_TRIALS: &[(&str, Run)] =
    &[("backends/inline follows health and the operator", inline)];

const STANDARD_PORT: u16 = 12525;

fn two(config: &mut Config, other: &str) {
    config.backends = format!("\"{}\", {{ address = \"{}\", {other} }}", backend_name(0), backend_name(1));
}

/// How often each backend responds.
fn answers(testbed: &Testbed, count: usize) -> anyhow::Result<[usize; 3]> {
    let mut seen = [0; 3];
    for _ in 0..count {
        seen[testbed.who_answers()?] += 1;
    }
    Ok(seen)
}

fn health_state(injector: &Injector, number: usize) -> anyhow::Result<String> {
    let status = injector.status()?;
    let all = status["listeners"][0]["backends"].as_array().cloned().unwrap_or_default();
    let one = all.into_iter().find(|backend| backend["name"] == backend_name(number));
    Ok(one.map_or(String::new(), |one| one["state"].as_str().unwrap_or_default().to_owned()))
}

fn stands(injector: &Injector, number: usize, expected: &str) -> anyhow::Result<()> {
    wait_until("state", || health_state(injector, number), |health_state| health_state == expected).map(drop)
}

fn weights(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _servers = [testbed.backend(0)?, testbed.backend(1)?];
    let mut config = Config::new(engine);
    two(&mut config, "weight = 3");
    let injector = testbed.start(&config.text())?;
    let seen = answers(testbed, 40)?;
    ensure!(seen == [10, 30, 0], "{seen:?}");
    let metrics = injector.metrics()?;
    let name = backend_name(1);
    let counted = metrics.sum("injector_backend_sessions_total", &[("backend", name.as_str())]);
    ensure!((counted - 30.0).abs() < 0.5, "{counted}");
    Ok(())
}

fn backup(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let first = testbed.backend(0)?;
    let _other = testbed.backend(1)?;
    let mut config = Config::new(engine);
    two(&mut config, "backup = true");
    let _injector = testbed.start(&config.text())?;
    ensure!(answers(testbed, 10)? == [10, 0, 0]);
    drop(first);
    // Without checks as well: a failed connection is retried there.
    ensure!(answers(testbed, 10)? == [0, 10, 0]);
    Ok(())
}

const QUICK: &str = "interval = \"100ms\"\ntimeout = \"1s\"\nrise = 2\nfall = 2\neject_after = 0\n";

/// The backend goes down and up again while an established session continues.
fn mail_check(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _servers = [testbed.backend(0)?, testbed.backend(1)?];
    let standard = testbed.standard(STANDARD_PORT)?;
    let mut config = Config::new(engine);
    two(&mut config, "backup = true");
    config.listener = format!("[listener.health]\ncheck = \"mail\"\nport = {STANDARD_PORT}\n{QUICK}");
    let injector = testbed.start(&config.text())?;
    ensure!(answers(testbed, 4)? == [4, 0, 0]);
    wait_until("checks", || Ok(standard.seen()), |seen| *seen >= 4)?;
    ensure!(
        standard.broken.load(std::sync::atomic::Ordering::Relaxed) == 0,
        "a check hung up without a goodbye"
    );
    let mut session = testbed.client()?;
    ensure!(session.greeted()? == 0);
    drop(standard);
    // Both are checked on the same port of the host, so both are down, and all are tried: the first
    // one again.
    stands(&injector, 0, "down")?;
    stands(&injector, 1, "down")?;
    session.talk()?;
    ensure!(injector.metrics()?.sum("injector_backend_up", &[]) < 0.5);
    let _stock = testbed.standard(STANDARD_PORT)?;
    stands(&injector, 0, "up")?;
    session.quit()?;
    let metrics = injector.metrics()?;
    for result in ["passed", "failed"] {
        ensure!(metrics.sum("injector_backend_checks_total", &[("result", result)]) > 1.5, "{result}");
    }
    let log = injector.log();
    ensure!(log.contains("backend is down") && log.contains("connecting: Connection refused"), "{log}");
    ensure!(log.contains("backend is up"), "{log}");
    Ok(())
}

fn local_check(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (first, _other) = (testbed.backend(0)?, testbed.backend(1)?);
    let mut config = Config::new(engine);
    two(&mut config, "backup = true");
    config.listener = format!("[listener.health]\ncheck = \"mail\"\nheader = \"local\"\n{QUICK}");
    let injector = testbed.start(&config.text())?;
    wait_until("checks", || Ok(first.seen()), |seen| *seen >= 3)?;
    ensure!(first.broken.load(std::sync::atomic::Ordering::Relaxed) == 0, "a check was not understood");
    ensure!(answers(testbed, 4)? == [4, 0, 0]);
    drop(first);
    stands(&injector, 0, "down")?;
    ensure!(answers(testbed, 4)? == [0, 4, 0]);
    let _first = testbed.backend(0)?;
    stands(&injector, 0, "up")?;
    ensure!(answers(testbed, 4)? == [4, 0, 0]);
    Ok(())
}

fn tcp_check(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (first, _other) = (testbed.backend(0)?, testbed.backend(1)?);
    let mut config = Config::new(engine);
    two(&mut config, "backup = true");
    config.listener = format!("[listener.health]\ncheck = \"tcp\"\n{QUICK}");
    let injector = testbed.start(&config.text())?;
    stands(&injector, 0, "up")?;
    drop(first);
    stands(&injector, 0, "down")?;
    ensure!(answers(testbed, 4)? == [0, 4, 0]);
    Ok(())
}

fn ejected(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _other = testbed.backend(1)?;
    let mut config = Config::new(engine);
    two(&mut config, "weight = 1");
    config.listener = "[listener.health]\neject_after = 2\neject_for = \"1s\"\n".to_owned();
    let injector = testbed.start(&config.text())?;
    // No client fails; only the injector sees the failures.
    ensure!(answers(testbed, 6)? == [0, 6, 0]);
    ensure!(health_state(&injector, 0)? == "ejected", "{}", health_state(&injector, 0)?);
    ensure!(injector.log().contains("backend ejected"), "{}", injector.log());
    let _first = testbed.backend(0)?;
    ensure!(answers(testbed, 4)? == [0, 4, 0], "it was asked too soon");
    thread::sleep(Duration::from_millis(1100));
    let seen = answers(testbed, 4)?;
    ensure!(seen[0] == 2 && seen[1] == 2, "{seen:?}");
    Ok(())
}

fn operator(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _servers = [testbed.backend(0)?, testbed.backend(1)?];
    let mut config = Config::new(engine);
    two(&mut config, "weight = 1");
    let injector = testbed.start(&config.text())?;
    let mut session = testbed.client()?;
    let number = session.greeted()?;
    let printed = injector.command(&["backend", "down", &backend_name(number)])?;
    ensure!(printed == "backend state changed for test\n", "{printed}");
    let seen = answers(testbed, 6)?;
    ensure!(seen[1 - number] == 6, "{seen:?}");
    session.talk()?;
    session.quit()?;
    // It stays ejected after a reload.
    injector.command(&["reload"])?;
    ensure!(health_state(&injector, number)? == "forced_down");
    injector.command(&["backend", "down", &backend_name(1 - number), "--listener", "test"])?;
    let line = testbed.client()?.line()?;
    ensure!(line.starts_with("421 4.3.2 Mail service not available"), "{line:?}");
    injector.command(&["backend", "auto", &backend_name(number)])?;
    ensure!(testbed.who_answers()? == number);
    let (status, printed) = injector.try_command(&["backend", "down", "mail:25"])?;
    ensure!(
        !status.success() && printed.contains("no backend is named \"mail:25\"; configured backends:"),
        "{printed}"
    );
    Ok(())
}

/// Sets a backend's weight; checks that the answer names the listener.
fn set_weight(injector: &Injector, number: usize, weight: &str) -> anyhow::Result<()> {
    let printed = injector.command(&["backend", "weight", &backend_name(number), weight])?;
    ensure!(printed == format!("weight {weight} until the next reload for test\n"), "{printed}");
    Ok(())
}

fn weights_of_the_operator(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _servers = [testbed.backend(0)?, testbed.backend(1)?];
    let mut config = Config::new(engine);
    two(&mut config, "weight = 3");
    let injector = testbed.start(&config.text())?;
    let mut session = testbed.client()?;
    let number = session.greeted()?;
    set_weight(&injector, 0, "9")?;
    ensure!(answers(testbed, 12)? == [9, 3, 0], "at once");
    set_weight(&injector, number, "0")?;
    let seen = answers(testbed, 6)?;
    ensure!(seen[1 - number] == 6, "{seen:?}");
    session.talk()?;
    session.quit()?;
    let (status, printed) =
        injector.try_command(&["backend", "weight", &backend_name(1 - number), "0", "--listener", "test"])?;
    ensure!(!status.success() && printed.contains("at least one non-backup backend"), "{printed}");
    let (status, printed) = injector.try_command(&["backend", "weight", &backend_name(0), "1001"])?;
    ensure!(!status.success() && printed.contains("1001 is not in 0..=1000"), "{printed}");
    let (status, printed) = injector.try_command(&["backend", "weight", "mail:25", "1"])?;
    ensure!(!status.success() && printed.contains("no backend is named \"mail:25\""), "{printed}");
    let printed = injector.command(&["status"])?;
    ensure!(printed.contains(", weight 0 (file: "), "{printed}");
    // The file is the same: the listener is unchanged.
    injector.command(&["reload"])?;
    ensure!(answers(testbed, 8)? == [2, 6, 0], "after a reload");
    Ok(())
}

fn last_resort(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _servers = [testbed.backend(0)?, testbed.backend(1)?];
    let mut config = Config::new(engine);
    two(&mut config, "weight = 1");
    // No server listens there.
    config.listener = format!("[listener.health]\ncheck = \"tcp\"\nport = {STANDARD_PORT}\n{QUICK}");
    let injector = testbed.start(&config.text())?;
    for number in [0, 1] {
        stands(&injector, number, "down")?;
    }
    let ready = injector.readiness()?;
    ensure!(ready == (200, "ready\n".to_owned()), "{ready:?}");
    let ready = injector.readiness_with_backends()?;
    ensure!(ready == (503, "no backend is up: test\n".to_owned()), "{ready:?}");
    ensure!(answers(testbed, 4)? == [2, 2, 0]);
    Ok(())
}

fn inline(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (first, _other) = (testbed.backend(0)?, testbed.backend(1)?);
    let mut config = Config::new(engine);
    two(&mut config, "backup = true");
    let pin = testbed.bpffs.path().display();
    config.top = format!("[inline]\npin = \"{pin}\"\n");
    config.listener = format!("[listener.health]\ncheck = \"mail\"\nheader = \"local\"\n{QUICK}");
    let _detached = Detached { testbed, config: config.clone() };
    let injector = testbed.start(&config.text())?;
    ensure!(answers(testbed, 4)? == [4, 0, 0]);
    let mut session = testbed.client()?;
    session.greeted()?;
    drop(first);
    stands(&injector, 0, "down")?;
    wait_until("the backend", || testbed.who_answers(), |number| *number == 1)?;
    session.talk()?;
    let _first = testbed.backend(0)?;
    stands(&injector, 0, "up")?;
    wait_until("the backend", || testbed.who_answers(), |number| *number == 0)?;
    injector.command(&["backend", "down", &backend_name(0)])?;
    wait_until("the backend", || testbed.who_answers(), |number| *number == 1)?;
    // With other weights the tables are other ones; the session continues.
    config.backends = format!("\"{}\", \"{}\"", backend_name(0), backend_name(1));
    injector.rewrite(&config.text())?;
    injector.command(&["reload"])?;
    injector.command(&["backend", "auto", &backend_name(0)])?;
    let both = |seen: &[usize; 3]| seen[0] >= 4 && seen[1] >= 4;
    wait_until("both backends", || answers(testbed, 24), both)?;
    set_weight(&injector, 1, "0")?;
    wait_until("weight 0", || answers(testbed, 8), |seen| seen[0] == 8)?;
    set_weight(&injector, 1, "7")?;
    wait_until("weight 7", || answers(testbed, 24), |seen| seen[0] < seen[1])?;
    session.talk()?;
    // A reload changes the backends; the session continues.
    config.backends = format!("\"{}\"", backend_name(1));
    injector.rewrite(&config.text())?;
    injector.command(&["reload"])?;
    ensure!(answers(testbed, 4)? == [0, 4, 0]);
    // While draining, the socket rejects new clients.
    injector.command(&["drain"])?;
    wait_until("drained", || testbed.client()?.line(), |line| line.starts_with("421 4.3.2"))?;
    session.talk()?;
    injector.command(&["resume"])?;
    wait_until("the backend", || testbed.who_answers(), |number| *number == 1)?;
    session.talk()?;
    session.quit()
}

/// Removes what outlives the daemon.
struct Detached<'a> {
    testbed: &'a Testbed,
    config: Config,
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        let detach = || -> anyhow::Result<()> {
            let file = tempfile::NamedTempFile::new()?;
            // Unused by this command.
            std::fs::write(file.path(), self.config.text().replace(OWN_DIRECTORY, "/nonexistent"))?;
            let mut command = self.testbed.topology.edge.command(injector_testbed::daemon::binary()?);
            let output = command.args(["inline", "detach", "--config"]).arg(file.path()).output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        };
        if let Err(error) = detach() {
            eprintln!("injector inline detach: {error:#}");
        }
    }
}
