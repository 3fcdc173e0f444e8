//! Draining: new clients are rejected.

use std::time::{Duration, Instant};

use anyhow::ensure;
use injector_testbed::sockets::LIMIT;
use injector_testbed::wait::wait_until;

use crate::Run;
use crate::testbed::{Config, PORT, Testbed, another, backend_name, bind_of};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("drain/new clients are rejected, sessions finish", new_clients_rejected),
    ("drain/aborts at the deadline, but not later sessions", deadline),
    ("drain/one of two listeners", one_of_two),
    ("drain/the earlier of two deadlines applies", earlier),
    ("drain/waits for sessions", waits),
    ("drain/without sessions", without_sessions),
    ("sessions/are listed", listed),
    ("sessions/end by id, address and network", ended_by_operator),
    ("top/one page", page),
];

fn new_clients_rejected(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let server = testbed.backend(0)?;
    let health = "127.0.0.1:9146".parse()?;
    let top = format!("[health]\nlisten = \"{health}\"");
    let injector = testbed.start(&Config { top, ..Config::new(engine) }.text())?;
    let mut client = testbed.client()?;
    client.greeted()?;
    ensure!(injector.readiness()? == (200, "ready\n".to_owned()));
    ensure!(injector.get(health, "/readyz")? == injector.readiness()?);
    ensure!(injector.get(health, "/metrics")?.0 == 404);
    let printed = injector.command(&["drain"])?;
    ensure!(printed == "draining: test\n", "{printed}");
    let line = testbed.client()?.line()?;
    ensure!(line == "421 4.3.2 Service shutting down, try again later", "{line:?}");
    ensure!(injector.readiness()? == (503, "draining\n".to_owned()));
    ensure!(injector.get(health, "/readyz")? == injector.readiness()?);
    ensure!(injector.status()?["listeners"][0]["draining"] == true);
    ensure!(injector.metrics()?.sum("injector_listener_draining", &[]) > 0.5);
    client.talk()?;
    client.quit()?;
    let refused = injector.metrics()?.sum("injector_connections_rejected_total", &[("reason", "draining")]);
    ensure!((refused - 1.0).abs() < 0.5, "{refused}");
    let printed = injector.command(&["resume", "test"])?;
    ensure!(printed == "accepting again: test\n", "{printed}");
    ensure!(injector.readiness()? == (200, "ready\n".to_owned()));
    testbed.who_answers()?;
    let printed = injector.command(&["resume"])?;
    ensure!(printed == "no listener was draining\n", "{printed}");
    ensure!(server.seen() == 2, "{} reached the backend", server.seen());
    Ok(())
}

fn deadline(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let injector = testbed.start(&Config::new(engine).text())?;
    let mut before = testbed.client()?;
    before.greeted()?;
    let aborted = before.address()?;
    let start = Instant::now();
    injector.command(&["drain", "test", "--deadline", "800ms"])?;
    injector.command(&["resume"])?;
    let mut after = testbed.client()?;
    after.greeted()?;
    before.talk()?;
    before.ends(engine)?;
    let took = start.elapsed();
    ensure!((Duration::from_millis(700)..LIMIT).contains(&took), "{took:?}");
    after.talk()?;
    after.quit()?;
    let sessions = injector.sessions_within(2)?;
    // Worker threads log independently, so either line may be the first.
    for session in &sessions {
        let is_aborted = session.field("reason").as_deref() == Some("aborted");
        ensure!(is_aborted == (session.client() == Some(aborted)), "{sessions:?}");
    }
    Ok(())
}

fn one_of_two(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let backend = format!("\"{}\"", backend_name(0));
    let config = Config::new(engine).text() + &another("more", engine, &bind_of(PORT + 1), &backend);
    let injector = testbed.start(&config)?;
    injector.command(&["drain", "more"])?;
    let line = testbed.client_at(PORT + 1)?.line()?;
    ensure!(line.starts_with("421 "), "{line:?}");
    testbed.who_answers()?;
    ensure!(injector.readiness()?.0 == 200);
    let (status, printed) = injector.try_command(&["drain", "less"])?;
    ensure!(
        !status.success()
            && printed.contains("no listener is named \"less\"; configured listeners: test, more"),
        "{printed}"
    );
    Ok(())
}

fn earlier(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let injector = testbed.start(&Config::new(engine).text())?;
    let mut client = testbed.client()?;
    client.greeted()?;
    injector.command(&["drain", "--deadline", "1h"])?;
    client.talk()?;
    let start = Instant::now();
    injector.command(&["drain", "--deadline", "300ms"])?;
    client.ends(engine)?;
    ensure!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
    Ok(())
}

fn waits(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let injector = testbed.start(&Config::new(engine).text())?;
    let mut client = testbed.client()?;
    client.greeted()?;
    let start = Instant::now();
    injector.command(&["drain", "--deadline", "700ms", "--wait"])?;
    ensure!(start.elapsed() > Duration::from_millis(600), "{:?}", start.elapsed());
    client.ends(engine)?;
    injector.sessions_within(1)?;
    Ok(())
}

fn without_sessions(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let injector = testbed.start(&Config::new(engine).text())?;
    let socket = ["status", "--socket", "/nonexistent/admin.sock"];
    let (status, printed) = injector.try_command(&socket)?;
    ensure!(!status.success() && printed.contains("no injector answers there: is it running"), "{printed}");
    Ok(())
}

fn listed(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let injector = testbed.start(&Config::new(engine).text())?;
    let mut client = testbed.client()?;
    client.greeted()?;
    let answer = || -> anyhow::Result<serde_json::Value> {
        Ok(serde_json::from_str(&injector.command(&["sessions", "test", "--json"])?)?)
    };
    let counted = |answer: &serde_json::Value| answer["sessions"]["rows"][0]["bytes_to_client"] == 7;
    let answer = wait_until("bytes", answer, counted)?;
    let row = &answer["sessions"]["rows"][0];
    ensure!(answer["sessions"]["count"] == 1, "{answer:#}");
    ensure!(row["backend"] == backend_name(0) && row["engine"] == engine, "{answer:#}");
    let text = injector.command(&["sessions"])?;
    ensure!(text.lines().count() == 2 && text.starts_with("ID "), "{text}");
    client.quit()?;
    let gone = |text: &String| text.lines().count() == 1;
    wait_until("sessions", || injector.command(&["sessions"]), gone)?;
    Ok(())
}

fn ended_by_operator(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let injector = testbed.start(&Config::new(engine).text())?;
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut client = testbed.client()?;
        client.greeted()?;
        clients.push(client);
    }
    let listed: serde_json::Value = serde_json::from_str(&injector.command(&["sessions", "--json"])?)?;
    let rows = listed["sessions"]["rows"].as_array().cloned().unwrap_or_default();
    let address = clients[0].address()?;
    let row = rows.iter().find(|row| row["client"] == address.to_string());
    let id = row.and_then(|row| row["id"].as_str()).unwrap_or_default().to_owned();
    for (target, ended) in
        [(id.clone(), 1), (clients[1].address()?.to_string(), 1), (format!("{}/32", address.ip()), 2)]
    {
        let printed = injector.command(&["sessions", "end", &target, "--json"])?;
        let answer: serde_json::Value = serde_json::from_str(&printed)?;
        ensure!(answer["sessions_ended"]["count"] == ended, "{target}: {answer}");
        for client in clients.drain(..ended) {
            client.ends(engine)?;
        }
    }
    for session in injector.sessions_within(4)? {
        ensure!(session.field("reason").as_deref() == Some("ended_by_operator"), "{session:?}");
    }
    for (target, said) in [(id.as_str(), "no session matches"), ("smtp", "give an ID of `injector sessions`")]
    {
        let (status, printed) = injector.try_command(&["sessions", "end", target])?;
        ensure!(!status.success() && printed.contains(said), "{printed}");
    }
    testbed.who_answers()?;
    Ok(())
}

fn page(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let _server = testbed.backend(0)?;
    let injector = testbed.start(&Config::new(engine).text())?;
    let mut client = testbed.client()?;
    client.greeted()?;
    let text = injector.command(&["top", "--once", "--interval", "300ms"])?;
    let row = |line: &&str| line.starts_with("test") && line.contains(engine) && line.contains("open");
    ensure!(text.lines().any(|line| row(&line)), "{text}");
    ensure!(text.contains(&backend_name(0)) && text.contains("1 of 1"), "{text}");
    client.quit()
}
