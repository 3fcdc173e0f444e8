//! Connections that are silent for too long, and handshakes that are never finished: nothing stays for
//! ever, and no client decides how long.

use std::io::{ErrorKind, Read as _};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use injector_testbed::bpf::DaemonMap;
use injector_testbed::daemon::Injector;
use injector_testbed::netns::{Family, Netns};
use injector_testbed::wait::wait_until;

use crate::testbed::{BACKEND_PORT, Testbed, counted, public_address, works};
use crate::{BothRun, Run};

/// Trials that take seconds, each for both families at once.
pub(crate) const TRIALS: &[(&str, BothRun)] = &[
    ("idle", idle),
    ("half-closed by the client", |testbed| half_closed(testbed, Vanishes::No)),
    ("the client vanishes after the backend's FIN", |testbed| half_closed(testbed, Vanishes::AfterFin)),
    ("the client vanishes before the backend's FIN", |testbed| half_closed(testbed, Vanishes::BeforeFin)),
    ("the client stays after the backend's FIN", client_fin),
    ("handshakes that are never finished", |testbed| {
        unfinished(testbed, "flows = 32", "", "to_socket_pending_full")
    }),
    ("handshakes that take the room of connections", |testbed| {
        unfinished(testbed, "", "max_connections = 8\n", "to_socket_limit")
    }),
    ("without a daemon", without_daemon),
];

/// In place of a trial for one family.
pub(crate) const EACH: &[(&str, Run)] = &[("a connection that is used stays", used)];

const QUICK: &str = "[listener.timeouts]\nidle = \"1s\"\nhalf_closed = \"1s\"\n";

/// The end sees a reset within this time, not before the timeout, which counts from `since` or later. The sweep
/// looks once a second.
fn is_reset(mut stream: &TcpStream, since: Instant) -> anyhow::Result<()> {
    // With a time limit, read(2) is not begun again after a signal (signal(7)).
    let outcome = loop {
        match stream.read(&mut [0; 8]) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            outcome => break outcome,
        }
    };
    let took = since.elapsed();
    ensure!(
        outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
        "{outcome:?} after {took:?}"
    );
    ensure!((900..10_000).contains(&took.as_millis()), "after {took:?}");
    Ok(())
}

/// As many connections as this have ended, with this reason.
fn logged(injector: &Injector, count: usize, reason: &str) -> anyhow::Result<()> {
    let sessions = injector.sessions_within(count)?;
    let wrong = sessions.iter().find(|session| session.field("reason").as_deref() != Some(reason));
    ensure!(wrong.is_none(), "{wrong:?}");
    Ok(())
}

/// The pinned map of connections has this many entries, at most.
fn entries(testbed: &Testbed) -> anyhow::Result<usize> {
    DaemonMap::pinned(&testbed.bpffs.path().join("v7/maps/FLOWS"))?.entries()
}

fn no_entries(testbed: &Testbed) -> anyhow::Result<()> {
    wait_until("entries of FLOWS", || entries(testbed), |entries| *entries == 0).map(drop)
}

/// Both ends are reset, and it is logged.
fn idle(testbed: &Testbed) -> anyhow::Result<()> {
    let injector = testbed.start(&testbed.config_with("", "smtp", QUICK))?;
    let open = Family::ALL.map(|family| {
        let backend = testbed.backend(family)?;
        // Before its last byte.
        let start = Instant::now();
        testbed.inlined(family, &backend).map(|(client, server)| (client, server, start))
    });
    for connection in open {
        let (client, server, start) = connection?;
        is_reset(&client, start).context("the client")?;
        is_reset(&server, start).context("the backend")?;
    }
    logged(&injector, 2, "idle")?;
    no_entries(testbed)?;
    let active = injector.metrics()?.sum("injector_connections_active", &[]);
    ensure!(active < 0.5, "{active} are active");
    Ok(())
}

/// A packet now and then is enough, longer than the timeout.
fn used(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let _injector = testbed.start(&testbed.config_with("", "smtp", QUICK))?;
    let (mut client, mut server) = testbed.inlined(family, &testbed.backend(family)?)?;
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(500));
        works(&mut client, &mut server)?;
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Vanishes {
    /// It finishes, and the backend says nothing.
    No,
    AfterFin,
    BeforeFin,
}

/// While this exists, a host neither sends nor receives.
struct Silent<'a>(&'a Netns);

impl<'a> Silent<'a> {
    fn new(netns: &'a Netns) -> anyhow::Result<Self> {
        netns.nft(
            "add table inet silent; \
             add chain inet silent input { type filter hook input priority 0; policy drop; }; \
             add chain inet silent output { type filter hook output priority 0; policy drop; }",
        )?;
        Ok(Self(netns))
    }
}

impl Drop for Silent<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.nft("delete table inet silent") {
            eprintln!("{error:#}");
        }
    }
}

fn half_closed(testbed: &Testbed, vanishes: Vanishes) -> anyhow::Result<()> {
    let limits = "[listener.timeouts]\nidle = \"10m\"\nhalf_closed = \"1s\"\n";
    let injector = testbed.start(&testbed.config_with("", "smtp", limits))?;
    let mut open = Vec::new();
    for family in Family::ALL {
        open.push(testbed.inlined(family, &testbed.backend(family)?)?);
    }
    let mut gone = None;
    if vanishes == Vanishes::BeforeFin {
        gone = Some(Silent::new(&testbed.topology.client)?);
    }
    let start = Instant::now();
    for (client, server) in &open {
        if vanishes == Vanishes::No { client } else { server }.shutdown(Shutdown::Write)?;
    }
    if vanishes == Vanishes::AfterFin {
        for (client, _) in &mut open {
            ensure!(client.read(&mut [0; 8])? == 0, "bytes in place of an end");
        }
        // Its acknowledgement has passed.
        std::thread::sleep(Duration::from_millis(20));
        gone = Some(Silent::new(&testbed.topology.client)?);
    }
    if vanishes == Vanishes::No {
        for (client, server) in &mut open {
            ensure!(server.read(&mut [0; 8])? == 0, "bytes in place of an end");
            is_reset(client, start).context("the client")?;
            // It has read the end before.
            wait_until("the backend's reset", || Ok(server.take_error()?), Option::is_some)?;
        }
    }
    // A backend that sends its FIN again and again does not keep it for ever, either.
    logged(&injector, 2, "half_closed")?;
    no_entries(testbed)?;
    eprintln!("    {:.1?}", start.elapsed());
    drop(gone);
    Ok(())
}

/// A client that has everything, and neither finishes nor vanishes.
fn client_fin(testbed: &Testbed) -> anyhow::Result<()> {
    let limits = "[listener.timeouts]\nidle = \"10m\"\nhalf_closed = \"10m\"\nclient_fin = \"1s\"\n";
    let injector = testbed.start(&testbed.config_with("", "smtp", limits))?;
    let mut open = Vec::new();
    for family in Family::ALL {
        let (mut client, server) = testbed.inlined(family, &testbed.backend(family)?)?;
        let start = Instant::now();
        server.shutdown(Shutdown::Write)?;
        ensure!(client.read(&mut [0; 8])? == 0, "bytes in place of an end");
        open.push((client, server, start));
    }
    for (client, server, start) in open {
        is_reset(&server, start).context("the backend")?;
        // It has read the end before.
        wait_until("the client's reset", || Ok(client.take_error()?), Option::is_some)?;
    }
    logged(&injector, 2, "client_fin")?;
    no_entries(testbed)
}

/// As many as there is room for, by the limit that `counter` names. They leave sooner then, and
/// meanwhile clients are served by the socket.
fn unfinished(testbed: &Testbed, inline: &str, listener: &str, counter: &str) -> anyhow::Result<()> {
    /// A quarter of 32 places, and the listener's limit.
    const MOST: u64 = 8;
    let injector = testbed.start(&testbed.config_with(inline, "smtp", listener))?;
    let (client, mail) = (&testbed.topology.client, &testbed.topology.mail);
    mail.nft(&format!(
        "add table inet silent; add chain inet silent input {{ type filter hook input priority 0; }}; \
         add rule inet silent input tcp dport {BACKEND_PORT} drop"
    ))?;
    let run = || {
        let family = Family::V4;
        for _ in 0..MOST {
            let connect =
                || TcpStream::connect_timeout(&public_address(family), Duration::from_millis(50)).map(drop);
            ensure!(client.run(connect)?.is_err(), "connected");
        }
        let opened = counted(&injector, "opened")?;
        ensure!(opened == MOST, "{opened} were opened");
        // There is no room for another one.
        let connect =
            || TcpStream::connect_timeout(&public_address(family), Duration::from_millis(500)).map(drop);
        client.run(connect)?.context("by the socket")?;
        ensure!(counted(&injector, counter)? == 1, "not left to the socket");
        // The last ones may stay longer, as they no longer take the room of others.
        wait_until("abandoned", || counted(&injector, "abandoned"), |abandoned| *abandoned > MOST / 2)?;
        let connect =
            || TcpStream::connect_timeout(&public_address(family), Duration::from_millis(50)).map(drop);
        ensure!(client.run(connect)?.is_err(), "connected");
        let opened = counted(&injector, "opened")?;
        ensure!(opened == MOST + 1, "{opened} were opened");
        Ok(())
    };
    let outcome = run();
    mail.nft("delete table inet silent")?;
    outcome
}

/// The kernel goes on sweeping. The next daemon has nothing of what is gone.
fn without_daemon(testbed: &Testbed) -> anyhow::Result<()> {
    let config = testbed.config_with("", "smtp", QUICK);
    let attached = testbed.attached();
    let injector = Injector::start(&testbed.topology.edge, &config)?;
    let mut open = Vec::new();
    for family in Family::ALL {
        open.push(testbed.inlined(family, &testbed.backend(family)?)?);
    }
    ensure!(entries(testbed)? == 4, "{} entries", entries(testbed)?);
    // SIGKILL.
    drop(injector);
    no_entries(testbed)?;
    let injector = Injector::start(&testbed.topology.edge, &config)?;
    let active = injector.metrics()?.sum("injector_connections_active", &[]);
    ensure!(active < 0.5, "{active} are active");
    for family in Family::ALL {
        let backend = testbed.backend(family)?;
        drop(testbed.inlined(family, &backend)?);
    }
    drop((injector, attached));
    Ok(())
}
