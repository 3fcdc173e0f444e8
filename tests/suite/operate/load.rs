//! Reload and drain under load, without any effect on clients.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::Run;
use crate::testbed::{Config, PORT, Testbed, another, backend_name, bind_of};

pub(crate) const TRIALS: &[(&str, Run)] = &[("load/reloads and drains abort no session", none_aborted)];

/// Simultaneous clients.
const CLIENTS: usize = 16;
/// Sessions that last from before the first change until after the last.
const LONG: usize = 20;
/// How long the configuration is changed.
const TIME: Duration = Duration::from_secs(4);

fn none_aborted(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let servers = [testbed.backend(0)?, testbed.backend(1)?];
    let mut config = Config::new(engine);
    let both = format!("\"{}\", \"{}\"", backend_name(0), backend_name(1));
    config.backends.clone_from(&both);
    // The other listener takes the clients that are not drained.
    let other = another("other", engine, &bind_of(PORT + 1), &both);
    let injector = testbed.start(&(config.text() + &other))?;
    let mut long = Vec::new();
    for _ in 0..LONG {
        let mut client = testbed.client()?;
        client.greeted()?;
        long.push(client);
    }
    let (over, done, rejected) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let (mut reloads, mut drains) = (0, 0);
    thread::scope(|scope| -> anyhow::Result<()> {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let (over, done, rejected) = (&over, &done, &rejected);
                scope.spawn(move || -> anyhow::Result<()> {
                    while !over.load(Ordering::Relaxed) {
                        let mut client = testbed.client_at(PORT + u16::try_from(number % 2)?)?;
                        let line = client.line()?;
                        if line.starts_with("421 4.3.2 Service shutting down") {
                            rejected.fetch_add(1, Ordering::Relaxed);
                            thread::sleep(Duration::from_millis(10));
                            continue;
                        }
                        ensure!(line.starts_with("220 "), "greeted with {line:?}");
                        client.talk()?;
                        client.talk()?;
                        client.quit()?;
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let change = || -> anyhow::Result<()> {
            let end = Instant::now() + TIME;
            while Instant::now() < end {
                // Each reload changes weights and limits, and adds or removes the second listener
                // under another name.
                let weight = 1 + reloads % 3;
                config.backends = format!(
                    "\"{}\", {{ address = \"{}\", weight = {weight} }}",
                    backend_name(0),
                    backend_name(1)
                );
                let name = if reloads % 2 == 0 { "renamed" } else { "other" };
                let other = another(name, engine, &bind_of(PORT + 1), &both);
                injector.rewrite(&(config.text() + &other))?;
                injector.command(&["reload"])?;
                reloads += 1;
                if reloads % 4 == 0 {
                    injector.command(&["drain", "test", "--deadline", "1h"])?;
                    thread::sleep(Duration::from_millis(50));
                    injector.command(&["resume", "test"])?;
                    drains += 1;
                }
                thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        };
        let changed = { change }();
        over.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        changed
    })?;
    for client in &mut long {
        client.talk()?;
    }
    for client in long {
        client.quit()?;
    }
    let (done, rejected) = (done.into_inner(), rejected.into_inner());
    let sessions = injector.sessions_within(done + LONG)?;
    let clean = |end: &str| ["client_closed", "backend_closed"].contains(&end);
    let aborted = sessions.iter().filter(|it| !it.field("reason").is_some_and(|end| clean(&end))).count();
    println!(
        "    {engine}: {reloads} reloads and {drains} drains in {TIME:?}; {done} short sessions and {LONG} long ones, {aborted} \
         aborted; {rejected} clients got 421 while drained"
    );
    ensure!(aborted == 0, "{aborted} sessions ended otherwise");
    ensure!(reloads >= 8 && drains >= 2 && done > 100, "too little happened");
    let broken: usize = servers.iter().map(|server| server.broken.load(Ordering::Relaxed)).sum();
    ensure!(broken == 0, "{broken} sessions broke at the backends");
    Ok(())
}
