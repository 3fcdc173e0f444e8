//! Reloading the configuration of a running injector.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context as _, ensure};
use injector_testbed::daemon::{ADMIN, Injector};
use injector_testbed::netns::{VIP_RELAY, VIP_SPLICE};
use injector_testbed::wait::wait_until;

use crate::Run;
use crate::testbed::{Config, PORT, Testbed, another, backend_name, bind_of};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("reload/sessions continue, new ones use the new backend", elsewhere),
    ("reload/listeners are added and removed", come_and_go),
    ("reload/an address moves to another listener", renamed),
    ("reload/a port below 1024, after capabilities were dropped", low_port),
    ("reload/from all addresses to one and back, under load", all_addresses),
    ("reload/a dry run changes nothing", dry_run),
    ("reload/an invalid file changes nothing", mistake),
    ("reload/a port in use changes nothing", port_in_use),
    ("reload/by SIGHUP", by_signal),
    ("reload/limits", limits),
    ("reload/changes that need a restart are reported", restart),
    ("reload/watching a file", watching),
    ("reload/the log's level, and by command", log_level),
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
    client.ends(engine)?;
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

/// Clients of the one address notice nothing.
fn all_addresses(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let one = Config::new(engine).text();
    let all = |address: &str| one.replace(&bind_of(PORT), &format!("\"{address}:{PORT}\""));
    let other = SocketAddr::new(IpAddr::V4(VIP_RELAY.v4), PORT);
    let injector = testbed.start(&one)?;
    ensure!(testbed.connect(other).is_err(), "somebody listens there already");
    let (over, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| -> anyhow::Result<()> {
        let serve = || -> anyhow::Result<()> {
            while !over.load(Ordering::Relaxed) {
                testbed.who_answers()?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(serve)).collect();
        let change = || -> anyhow::Result<()> {
            for config in [&all("0.0.0.0"), &all("[::]")] {
                let printed = reload(&injector, config)?;
                ensure!(printed == "changed: test\n", "{printed}");
                let mut client = testbed.connect(other)?;
                client.greeted()?;
                client.quit()?;
                injector.rewrite(&one)?;
                for _ in 0..3 {
                    injector.command(&["reload", "--dry-run"])?;
                }
                reload(&injector, &one)?;
                // At once, while the sockets for all addresses are still open.
                reload(&injector, config)?;
                reload(&injector, &one)?;
                wait_until("listening", || Ok(testbed.connect(other).is_ok()), |listens| !listens)?;
            }
            Ok(())
        };
        let changed = change();
        over.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        changed
    })?;
    let done = done.into_inner();
    ensure!(done > 20, "{done} sessions");
    // And from all addresses at the start.
    drop(injector);
    let injector = testbed.start(&all("[::]"))?;
    testbed.who_answers()?;
    reload(&injector, &one)?;
    testbed.who_answers()?;
    // Elsewhere, and back while the sockets for all addresses are still open.
    reload(&injector, &one.replace(&bind_of(PORT), &bind_of(PORT + 1)))?;
    reload(&injector, &all("[::]"))?;
    testbed.who_answers()?;
    Ok(())
}

fn dry_run(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let mut config = Config::new(engine);
    let injector = testbed.start(&config.text())?;
    let before = injector.status()?["listeners"].clone();
    config.listener = "max_connections = 7\n".to_owned();
    let backends = format!("\"{}\", \"{}\"", backend_name(0), backend_name(1));
    let more = another("more", engine, &bind_of(PORT + 1), &backends);
    injector.rewrite(&(config.text() + &more))?;
    let printed = injector.command(&["reload", "--dry-run"])?;
    for expected in [
        format!("test: would be changed, engine {engine}\n  {}  answers\n", backend_name(0)),
        format!("more: would be added, engine {engine}\n  {}  answers\n", backend_name(0)),
        format!("  {}  connecting: Connection refused", backend_name(1)),
        "the reload would be accepted; nothing was changed\n".to_owned(),
    ] {
        ensure!(printed.contains(&expected), "no {expected:?} in {printed}");
    }
    never_listens(testbed, &injector, PORT + 1)?;
    ensure!(injector.status()?["listeners"] == before, "something changed");
    let reloads = injector.metrics()?.sum("injector_config_reloads_total", &[]);
    ensure!(reloads < 0.5, "{reloads}");
    // A port in use, and a removed listener.
    let taken = testbed.topology.edge.run(|| std::net::TcpListener::bind(("0.0.0.0", PORT + 2)))??;
    let other = another("other", engine, &bind_of(PORT + 2), &backends);
    injector.rewrite(&config.text().replace("name = \"test\"", "name = \"new\""))?;
    let printed = injector.command(&["reload", "--dry-run"])?;
    ensure!(printed.contains("would be removed: test\n"), "{printed}");
    injector.rewrite(&(config.text() + &other))?;
    let (status, printed) = injector.try_command(&["reload", "--dry-run"])?;
    ensure!(!status.success() && printed.contains("other: would be rejected: cannot listen on"), "{printed}");
    ensure!(printed.contains("test: would be changed"), "{printed}");
    drop(taken);
    injector.rewrite("nonsense")?;
    let (status, printed) = injector.try_command(&["reload", "--dry-run"])?;
    ensure!(!status.success() && printed.contains("would be rejected: "), "{printed}");
    ensure!(injector.status()?["config"]["reload_error"].is_null());
    testbed.who_answers()?;
    Ok(())
}

/// Dry runs bind the port, and no connection to it is accepted meanwhile.
fn never_listens(testbed: &Testbed, injector: &Injector, port: u16) -> anyhow::Result<()> {
    let address = SocketAddr::new(IpAddr::V4(VIP_SPLICE.v4), port);
    let (over, accepted) = (AtomicBool::new(false), AtomicUsize::new(0));
    let connect = || {
        while !over.load(Ordering::Relaxed) {
            accepted.fetch_add(usize::from(TcpStream::connect(address).is_ok()), Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        let connecting = scope.spawn(|| testbed.topology.edge.run(connect));
        let reload = || injector.command(&["reload", "--dry-run"]).map(drop);
        let reloaded = (0..20).try_for_each(|_| reload());
        over.store(true, Ordering::Relaxed);
        connecting.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        reloaded
    })?;
    let accepted = accepted.into_inner();
    ensure!(accepted == 0, "a dry run listens: {accepted} connections were accepted");
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
    // The daemon logs JSON, by a variable of its environment.
    config.top = "[admin]\nsocket = \"/run/other\"\n[limits]\nworkers = 7\n".to_owned();
    let text = config.text().replacen(ADMIN, "", 1);
    let printed = reload(&injector, &text)?;
    ensure!(printed.ends_with("needs a restart: admin, limits.workers\n"), "{printed}");
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

fn log_level(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let mut config = Config::new(engine);
    let injector = testbed.start(&config.text())?;
    injector.command(&["drain"])?;
    // A rejected client is a line at debug, of target `access`.
    let rejected = || -> anyhow::Result<usize> {
        let line = testbed.client()?.line()?;
        ensure!(line.starts_with("421 "), "{line:?}");
        Ok(details(&injector))
    };
    ensure!(rejected()? == 0);
    // By command, of one target, until the next reload.
    let printed = injector.command(&["log-level", "access=debug"])?;
    ensure!(printed == "log level until the next reload: info,access=debug\n", "{printed}");
    ensure!(injector.status()?["log_level"] == "info,access=debug");
    rejected()?;
    wait_until("lines at debug", || Ok(details(&injector)), |count| *count == 1)?;
    injector.command(&["reload"])?;
    ensure!(injector.status()?["log_level"] == "info");
    rejected()?;
    // A mistake changes nothing.
    let (status, printed) = injector.try_command(&["log-level", "sessions=debug"])?;
    ensure!(
        !status.success() && printed.contains("\"sessions\" is not a log target: use one of access"),
        "{printed}"
    );
    // By the file.
    config.top = "[log]\nlevel = \"debug\"\n".to_owned();
    let printed = reload(&injector, &config.text())?;
    ensure!(printed == "no changes\n", "{printed}");
    ensure!(injector.status()?["log_level"] == "debug");
    rejected()?;
    wait_until("lines at debug", || Ok(details(&injector)), |count| *count > 1)?;
    let listener = injector.log().lines().filter(|line| line.contains("connection rejected")).count();
    ensure!(listener == 2, "{}", injector.log());
    Ok(())
}

/// Lines at debug.
fn details(injector: &Injector) -> usize {
    injector.log().lines().filter(|line| line.contains("\"level\":\"DEBUG\"")).count()
}

fn watching(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _servers = [testbed.backend(0)?, testbed.backend(1)?];
    let mut config = Config::new(engine);
    let injector = testbed.start(&config.text())?;
    // Before the file is watched.
    config.backends = format!("\"{}\"", backend_name(1));
    injector.rewrite(&config.text())?;
    let mut watching = injector.watching()?;
    let found = wait_until("the backend", || testbed.who_answers(), |number| *number == 1).and_then(|_| {
        config.backends = format!("\"{}\"", backend_name(0));
        injector.rewrite(&config.text())?;
        wait_until("the backend", || testbed.who_answers(), |number| *number == 0)
    });
    watching.kill()?;
    let output = watching.wait_with_output().context("injector reload --watch")?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    found.with_context(|| printed.clone())?;
    ensure!(printed == "changed: test\nchanged: test\n", "{printed}");
    Ok(())
}
