//! SIGTERM: the replies to clients, and what is aborted.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::ensure;
use injector_testbed::daemon::parse_sessions;

use crate::Run;
use crate::testbed::{Ending, Testbed, accept_with_header, ending, finished, pass};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("shutdown/aborts at the deadline and logs it", aborts),
    ("shutdown/in the middle of a reply the client is reset", aborts_in_a_reply),
    ("shutdown/inside TLS the client is reset", aborts_in_tls),
    ("shutdown/waits for sessions to finish", waits),
    ("shutdown/nothing is left behind", nothing_left),
];

fn aborts(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let mut injector = testbed.injector(engine, "smtp", "\n\n[stop]\ndeadline = \"500ms\"")?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    let start = Instant::now();
    injector.ask_to_stop()?;
    // What the kernel forwarded may have been TLS.
    let expected = match engine {
        "splice" => Ending::Reset(Vec::new()),
        _ => Ending::Fin(b"421 4.3.2 Service shutting down, try again later\r\n".to_vec()),
    };
    let seen = ending(&mut client)?;
    ensure!(seen == expected, "{seen:?} in place of {expected:?}");
    ensure!(ending(&mut server)? == Ending::Reset(Vec::new()), "the backend was not reset");
    ensure!(start.elapsed() > Duration::from_millis(400), "before the deadline: {:?}", start.elapsed());
    let (status, log) = injector.wait_stopped()?;
    ensure!(status.success(), "{status}");
    ensure!(log.contains("0 sessions completed, 1 aborted"), "{log}");
    let sessions = parse_sessions(&log)?;
    ensure!(sessions.len() == 1 && sessions[0].field("reason").as_deref() == Some("aborted"), "{sessions:?}");
    Ok(())
}

/// A line of the injector would be taken for a part of the reply.
fn aborts_in_a_reply(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let mut injector = testbed.injector(engine, "imap", "\n\n[stop]\ndeadline = \"0s\"")?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut client, b"* OK hello\r\n")?;
    pass(&mut client, &mut server, b"a FETCH 1 BODY[]\r\n")?;
    pass(&mut server, &mut client, b"* 1 FETCH (BODY[] {90}\r\nSubject: a letter\r\n")?;
    injector.ask_to_stop()?;
    ensure!(ending(&mut client)? == Ending::Reset(Vec::new()), "a line in the middle of a message");
    Ok(())
}

/// After STARTTLS the client understands no clear text.
fn aborts_in_tls(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let mut injector = testbed.injector(engine, "smtp", "\n\n[stop]\ndeadline = \"0s\"\n\n[splice]\n")?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    pass(&mut client, &mut server, b"STARTTLS\r\n")?;
    pass(&mut server, &mut client, b"220 go ahead\r\n")?;
    pass(&mut client, &mut server, b"\x16\x03\x01\x02\x00\x01")?;
    pass(&mut server, &mut client, b"\x16\x03\x03\x00\x7a\x02\r\n")?;
    injector.ask_to_stop()?;
    ensure!(ending(&mut client)? == Ending::Reset(Vec::new()), "clear text inside TLS");
    Ok(())
}

fn waits(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let backend = testbed.backend()?;
    let mut injector = testbed.injector(engine, "smtp", "")?;
    let mut client = testbed.client()?;
    let (mut server, ..) = accept_with_header(&backend)?;
    pass(&mut server, &mut client, b"220 hello\r\n")?;
    injector.ask_to_stop()?;
    std::thread::sleep(Duration::from_millis(200));
    pass(&mut client, &mut server, b"QUIT\r\n")?;
    server.write_all(b"221 bye\r\n")?;
    drop(server);
    ensure!(ending(&mut client)? == Ending::Fin(b"221 bye\r\n".to_vec()), "no clean end");
    drop(client);
    let start = Instant::now();
    let (status, log) = injector.wait_stopped()?;
    ensure!(
        status.success() && start.elapsed() < Duration::from_secs(20),
        "{status} after {:?}",
        start.elapsed()
    );
    ensure!(log.contains("1 sessions completed, 0 aborted"), "{log}");
    Ok(())
}

/// Descriptors of the daemon before and after many connections.
fn nothing_left(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const CONNECTIONS: usize = 50;
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    let descriptors = || anyhow::Ok(std::fs::read_dir(format!("/proc/{}/fd", injector.pid()))?.count());
    let before = descriptors()?;
    for _ in 0..CONNECTIONS {
        let mut client = testbed.client()?;
        let (mut server, ..) = accept_with_header(&backend)?;
        pass(&mut server, &mut client, b"220 hello\r\n")?;
        pass(&mut client, &mut server, b"QUIT\r\n")?;
        drop((client, server));
    }
    finished(&injector, CONNECTIONS)?;
    // The last task may still be closing its sockets.
    std::thread::sleep(Duration::from_millis(100));
    let after = descriptors()?;
    // Before that, the readiness check's connection may still have been open.
    ensure!(after <= before, "{before} descriptors before, {after} after {CONNECTIONS} connections");
    let active = injector.metrics()?.sum("injector_connections_active", &[]);
    ensure!(active.abs() < 0.5, "{active} connections are still active");
    Ok(())
}
