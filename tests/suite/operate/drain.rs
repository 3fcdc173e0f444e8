//! Draining: new clients are rejected.

use std::time::{Duration, Instant};

use anyhow::ensure;
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
    ("top/one page", page),
];

fn new_clients_rejected(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let server = testbed.backend(0)?;
    let injector = testbed.start(&Config::new(engine).text())?;
    let mut client = testbed.client()?;
    client.greeted()?;
    ensure!(injector.readiness()? == (200, "ready\n".to_owned()));
    let printed = injector.command(&["drain"])?;
    ensure!(printed == "draining: test\n", "{printed}");
    let line = testbed.client()?.line()?;
    ensure!(line == "421 4.3.2 Service shutting down, try again later", "{line:?}");
    ensure!(injector.readiness()? == (503, "draining\n".to_owned()));
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
    before.ends()?;
    let took = start.elapsed();
    ensure!((Duration::from_millis(700)..Duration::from_secs(4)).contains(&took), "{took:?}");
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
    client.ends()?;
    ensure!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
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
    client.ends()?;
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
    ensure!(text.lines().count() == 2 && text.starts_with("LISTENER"), "{text}");
    client.quit()?;
    let gone = |text: &String| text.lines().count() == 1;
    wait_until("sessions", || injector.command(&["sessions"]), gone)?;
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
