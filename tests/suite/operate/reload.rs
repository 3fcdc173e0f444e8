//! Reloading the configuration of a running injector.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use injector_testbed::daemon::Injector;
use injector_testbed::wait::wait_until;

use crate::Run;
use crate::testbed::{Config, PORT, Testbed, another, backend_name, bind_of};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("reload/sessions continue, new ones use the new backend", elsewhere),
    ("reload/listeners are added and removed", come_and_go),
    ("reload/an address moves to another listener", renamed),
    ("reload/a port below 1024, after capabilities were dropped", low_port),
    ("reload/an invalid file changes nothing", mistake),
    ("reload/a port in use changes nothing", port_in_use),
    ("reload/by SIGHUP", by_signal),
    ("reload/limits", limits),
    ("reload/changes that need a restart are reported", restart),
    ("reload/watching a file", watching),
];

/// The output of `injector reload`.
fn reload(injector: &Injector, config: &str) -> anyhow::Result<String> {
    injector.rewrite(config)?;
    injector.command(&["reload"])
}

fn elsewhere(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _servers = [testbed.backend(0)?, testbed.backend(1)?];
    let mut config = Config::new(engine);
    let injector = testbed.start(&config.text())?;
    let mut old = testbed.client()?;
    ensure!(old.greeted()? == 0);
    config.backends = format!("\"{}\"", backend_name(1));
    let printed = reload(&injector, &config.text())?;
    ensure!(printed == "changed: test\n", "{printed}");
    ensure!(testbed.who_answers()? == 1);
    old.talk()?;
    old.quit()?;
    // Reloading the same file changes nothing.
    let printed = injector.command(&["reload"])?;
    ensure!(printed == "no changes\n", "{printed}");
    let metrics = injector.metrics()?;
    let applied = metrics.sum("injector_config_reloads_total", &[("result", "applied")]);
    ensure!((applied - 2.0).abs() < 0.5, "{applied}");
    Ok(())
}

fn come_and_go(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let config = Config::new(engine);
    let injector = testbed.start(&config.text())?;
    ensure!(testbed.client_at(PORT + 1).is_err(), "somebody listens there already");
    let backend = format!("\"{}\"", backend_name(0));
    let more =
        another("more", engine, &bind_of(PORT + 1), &backend) + "[listener.timeouts]\ndrain = \"600ms\"\n";
    let printed = reload(&injector, &(config.text() + &more))?;
    ensure!(printed == "added: more\n", "{printed}");
    let mut client = testbed.client_at(PORT + 1)?;
    client.greeted()?;
    let printed = reload(&injector, &config.text())?;
    ensure!(printed == "removed: more\n", "{printed}");
    // Each worker closes its listen socket in its own time.
    wait_until("listening", || Ok(testbed.client_at(PORT + 1).is_ok()), |listens| !listens)?;
    // The session may continue until the drain deadline, and is aborted then.
    client.talk()?;
    let status = injector.status()?;
    ensure!(
        status["removed_listeners"][0]["name"] == "more" && status["removed_listeners"][0]["sessions"] == 1,
        "{status:#}"
    );
    client.ends()?;
    let aborted = injector.sessions_within(1)?;
    ensure!(aborted[0].field("reason").as_deref() == Some("aborted"), "{aborted:?}");
    wait_until(
        "removed listeners",
        || injector.status(),
        |status| status["removed_listeners"] == serde_json::json!([]),
    )?;
    testbed.who_answers()?;
    Ok(())
}

fn renamed(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let config = Config::new(engine).text();
    let injector = testbed.start(&config)?;
    let mut client = testbed.client()?;
    client.greeted()?;
    let printed = reload(&injector, &config.replace("name = \"test\"", "name = \"other\""))?;
    ensure!(printed == "added: other\nremoved: test\n", "{printed}");
    for _ in 0..20 {
        testbed.who_answers()?;
    }
    client.talk()?;
    client.quit()?;
    let sessions = injector.sessions_within(21)?;
    let of = |name: &str| sessions.iter().filter(|it| it.field("listener").as_deref() == Some(name)).count();
    ensure!(of("test") == 1 && of("other") == 20, "{} and {}", of("test"), of("other"));
    Ok(())
}

fn low_port(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let mut config = Config::new(engine);
    let injector = testbed.start(&config.text())?;
    ensure!(injector.log().contains("CAP_NET_BIND_SERVICE"), "{}", injector.log());
    config.bind.push(26);
    reload(&injector, &config.text())?;
    let mut client = testbed.client_at(26)?;
    client.greeted()?;
    client.quit()?;
    testbed.who_answers()?;
    Ok(())
}

fn mistake(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let config = Config::new(engine);
    let injector = testbed.start(&config.text())?;
    let broken = Config { backends: "\"mail\"".to_owned(), ..config.clone() };
    injector.rewrite(&broken.text())?;
    let (status, printed) = injector.try_command(&["reload"])?;
    ensure!(!status.success() && printed.contains("backends \"mail\": the port is missing"), "{printed}");
    testbed.who_answers()?;
    let refused = injector.status()?["config"]["reload_error"].clone();
    ensure!(refused.as_str().is_some_and(|why| why.contains("the port is missing")), "{refused}");
    let metrics = injector.metrics()?;
    ensure!(metrics.sum("injector_config_reloads_total", &[("result", "rejected")]) > 0.5);
    // The error disappears when the file is valid again.
    reload(&injector, &config.text())?;
    ensure!(injector.status()?["config"]["reload_error"].is_null());
    Ok(())
}

/// The second of two new addresses cannot be bound: the first is not opened either.
fn port_in_use(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let mut config = Config::new(engine);
    let injector = testbed.start(&config.text())?;
    let taken = testbed.topology.edge.run(|| std::net::TcpListener::bind(("0.0.0.0", PORT + 2)))??;
    config.bind.extend([PORT + 1, PORT + 2]);
    injector.rewrite(&config.text())?;
    let (status, printed) = injector.try_command(&["reload"])?;
    ensure!(!status.success() && printed.contains("another program listens there"), "{printed}");
    ensure!(testbed.client_at(PORT + 1).is_err(), "half of it was done");
    testbed.who_answers()?;
    drop(taken);
    injector.command(&["reload"])?;
    testbed.client_at(PORT + 2)?.greeted()?;
    Ok(())
}

fn by_signal(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _servers = [testbed.backend(0)?, testbed.backend(1)?];
    let mut config = Config::new(engine);
    let mut injector = testbed.start(&config.text())?;
    ensure!(testbed.who_answers()? == 0);
    config.backends = format!("\"{}\"", backend_name(1));
    injector.rewrite(&config.text())?;
    injector.hang_up()?;
    wait_until("the backend", || testbed.who_answers(), |number| *number == 1)?;
    ensure!(injector.log().contains("configuration reloaded"), "{}", injector.log());
    Ok(())
}

fn limits(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let mut config = Config::new(engine);
    let injector = testbed.start(&config.text())?;
    let mut clients = [testbed.client()?, testbed.client()?];
    for client in &mut clients {
        client.greeted()?;
    }
    config.listener = "max_connections = 1".to_owned();
    reload(&injector, &config.text())?;
    let line = testbed.client()?.line()?;
    ensure!(line.starts_with("421 4.3.2 Too many connections"), "{line:?}");
    for client in &mut clients {
        client.talk()?;
    }
    config.listener = "max_connections = 3".to_owned();
    config.top = "[limits]\nmax_connections = 2".to_owned();
    reload(&injector, &config.text())?;
    let line = testbed.client()?.line()?;
    ensure!(line.starts_with("421 4.3.2 Too many connections"), "{line:?}");
    config.top = String::new();
    reload(&injector, &config.text())?;
    testbed.who_answers()?;
    Ok(())
}

fn restart(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let mut config = Config::new(engine);
    let injector = testbed.start(&config.text())?;
    config.top = "[log]\nlevel = \"debug\"\n[limits]\nworkers = 7\n".to_owned();
    let printed = reload(&injector, &config.text())?;
    ensure!(printed.ends_with("needs a restart: limits.workers, log\n"), "{printed}");
    // An engine that was not loaded at startup cannot be selected later.
    let mut other = Config::new("inline");
    other.listener = String::new();
    injector.rewrite(&other.text())?;
    let (status, printed) = injector.try_command(&["reload"])?;
    ensure!(
        !status.success()
            && printed.contains("an engine that was not loaded at startup needs a restart of the daemon"),
        "{printed}"
    );
    testbed.who_answers()?;
    Ok(())
}

fn watching(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _servers = [testbed.backend(0)?, testbed.backend(1)?];
    let mut config = Config::new(engine);
    let injector = testbed.start(&config.text())?;
    let mut watching = injector.watching()?;
    // Longer than the first read of the file takes.
    std::thread::sleep(Duration::from_millis(500));
    config.backends = format!("\"{}\"", backend_name(1));
    injector.rewrite(&config.text())?;
    let found = wait_until("the backend", || testbed.who_answers(), |number| *number == 1);
    watching.kill()?;
    let output = watching.wait_with_output().context("injector reload --watch")?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    found.with_context(|| printed.clone())?;
    ensure!(printed == "changed: test\n", "{printed}");
    Ok(())
}
