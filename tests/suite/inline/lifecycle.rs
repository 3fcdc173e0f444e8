//! What outlives the daemon, and detaching.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use injector_testbed::daemon::{Injector, OWN_DIRECTORY};
use injector_testbed::netns::{EDGE_INSIDE, Family};
use injector_testbed::sockets::LIMIT;

use crate::Run;
use crate::site::events;
use crate::testbed::{Testbed, accept, expect, is_inline, own_header, pass, works};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("close/both sides at once", both_at_once),
    ("detach/nothing is left", detached),
    ("detach/not while the daemon runs, unless forced", not_while_running),
    ("survives/daemon killed during a transfer", killed_in_transfer),
    ("survives/daemon killed during short sessions", killed_in_sessions),
    ("survives/pins moved to another place", pins_moved),
    ("survives/the next daemon has another engine", other_engine),
];

/// FINs that cross, each on its own processor: the program that comes second must see what the
/// first has stored, or the end is not reported until the next scan.
fn both_at_once(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    const CONNECTIONS: u32 = 4000;
    /// Long enough for the event to reach the daemon, and shorter than the time between two scans.
    const HEARD: Duration = Duration::from_secs(5);
    let backend = testbed.backend(family)?;
    let injector = testbed.injector("smtp", "")?;
    let at = AtomicU32::new(0);
    let finish = |stream: TcpStream, turn: u32| {
        at.fetch_add(1, Ordering::AcqRel);
        while at.load(Ordering::Acquire) < 2 * turn {
            std::hint::spin_loop();
        }
        stream.shutdown(Shutdown::Write)?;
        let mut rest = Vec::new();
        (&stream).read_to_end(&mut rest)
    };
    let start = Instant::now();
    for turn in 1..=CONNECTIONS {
        let client = testbed.client(family)?;
        let mut server = accept(&backend)?;
        own_header(&mut server, &client)?;
        std::thread::scope(|scope| {
            let other = scope.spawn(|| finish(server, turn));
            finish(client, turn)?;
            other.join().map_err(|_| anyhow!("panicked"))?.context("the backend's end")
        })
        .with_context(|| format!("turn {turn}; {}", events(&injector).unwrap_or_default()))?;
    }
    eprintln!("    {CONNECTIONS} in {:.1?}", start.elapsed());
    let deadline = Instant::now() + HEARD;
    loop {
        let closed = injector.metrics()?.sum("injector_connections_closed_total", &[]);
        if closed >= f64::from(CONNECTIONS) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{closed} of {CONNECTIONS} ended connections are counted");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// All devices.
fn config(testbed: &Testbed) -> String {
    testbed.config_with("", "smtp", "")
}

/// Runs `injector inline detach` at the end of each trial.
struct Detached<'a> {
    testbed: &'a Testbed,
    config: tempfile::NamedTempFile,
}

impl<'a> Detached<'a> {
    fn new(testbed: &'a Testbed) -> anyhow::Result<Self> {
        let mut file = tempfile::NamedTempFile::new()?;
        // Unused by this command.
        let config = config(testbed).replace(OWN_DIRECTORY, "/nonexistent");
        file.write_all(config.as_bytes())?;
        Ok(Self { testbed, config: file })
    }

    fn detach(&self, words: &[&str]) -> anyhow::Result<String> {
        let mut command = self.testbed.topology.edge.command(injector_testbed::daemon::binary()?);
        command.args(["inline", "detach"]).args(words).arg("--config").arg(self.config.path());
        let output = command.output()?;
        let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(output.status.success(), "injector inline detach: {printed}");
        Ok(printed)
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.detach(&["--force"]) {
            eprintln!("{error:#}");
        }
    }
}

fn detached(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let detached = Detached::new(testbed)?;
    let injector = Injector::start(&testbed.topology.edge, &config(testbed))?;
    let (_client, server) = testbed.joined(family, &backend)?;
    let peer = server.peer_addr()?;
    ensure!(peer.ip() == EDGE_INSIDE.of(family), "the backend's peer is {peer}");
    drop(injector);
    let printed = detached.detach(&[])?;
    for what in ["outside", "inside", "FLOWS"] {
        ensure!(printed.contains(what), "{what} is not among what was removed: {printed}");
    }
    let left = testbed.bpffs.path().join("v7");
    ensure!(!left.exists(), "{} is left", left.display());
    ensure!(detached.detach(&[])?.contains("nothing was left"), "a second time there was something");
    Ok(())
}

/// What the running daemon needs is not taken from it by mistake. If it is, it attaches again.
fn not_while_running(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let detached = Detached::new(testbed)?;
    let _injector = Injector::start(&testbed.topology.edge, &config(testbed))?;
    let refused = detached.detach(&[]);
    ensure!(refused.is_err(), "detached: {refused:?}");
    drop(testbed.inlined(family, &backend)?);
    detached.detach(&["--force"])?;
    // By whichever engine.
    drop(testbed.joined(family, &backend)?);
    Ok(())
}

/// The daemon is killed and restarted during a transfer, and new connections are opened meanwhile.
fn killed_in_transfer(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    killed_and_upgraded(testbed, family, 256 << 20)
}

/// The same with a number of bytes; the restarted daemon is the one that `INJECTOR_NEXT_BIN` names,
/// if set.
pub(crate) fn killed_and_upgraded(testbed: &Testbed, family: Family, bulk: usize) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let _detached = Detached::new(testbed)?;
    let injector = Injector::start(&testbed.topology.edge, &config(testbed))?;
    let (mut client, mut server) = testbed.joined(family, &backend)?;
    let block: Vec<u8> = (0..251).cycle().take(1 << 20).collect();
    let (received, back) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| -> anyhow::Result<()> {
            for sent in 0..bulk / block.len() {
                // The last quarter is for the restarted daemon.
                while sent == bulk / block.len() / 4 * 3 && !back.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                client.write_all(&block)?;
            }
            Ok(client.shutdown(Shutdown::Write)?)
        });
        let receiving = scope.spawn(|| -> anyhow::Result<()> {
            let mut seen = vec![0; block.len()];
            for _ in 0..bulk / block.len() {
                server.read_exact(&mut seen)?;
                ensure!(seen == block, "other bytes than were sent");
                received.fetch_add(seen.len(), Ordering::Relaxed);
            }
            ensure!(server.read(&mut seen)? == 0, "something behind the FIN");
            Ok(())
        });
        while received.load(Ordering::Relaxed) < bulk / 4 && !receiving.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // SIGKILL.
        drop(injector);
        let alone = testbed.joined(family, &backend).context("with no daemon");
        let again = Injector::start_next(&testbed.topology.edge, &config(testbed)).context("started again");
        let second = testbed.joined(family, &backend).context("with the second daemon");
        let left = bulk - received.load(Ordering::Relaxed);
        // Whatever the result, the sender must not wait forever.
        back.store(true, Ordering::Relaxed);
        drop((alone?, second?));
        let again = again?;
        ensure!(left > 0 && !receiving.is_finished(), "the transfer was over before the daemon was back");
        eprintln!("    the daemon was back with {} of {} MiB to come", left >> 20, bulk >> 20);
        sending.join().map_err(|_| anyhow::anyhow!("panicked"))?.context("sending")?;
        receiving.join().map_err(|_| anyhow::anyhow!("panicked"))?.context("receiving")?;
        drop(again);
        Ok(())
    })
}

/// Two programs would add two headers. The earlier daemon's maps are found wherever they are pinned,
/// and its connections go on.
fn pins_moved(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let _detached = Detached::new(testbed)?;
    drop(Injector::start(&testbed.topology.edge, &config(testbed))?);
    let (mut client, mut server) = testbed.joined(family, &backend)?;
    let pin = testbed.bpffs.path().display().to_string();
    let moved = config(testbed).replace(&pin, &format!("{pin}/elsewhere"));
    let injector = Injector::start(&testbed.topology.edge, &moved)?;
    drop(testbed.joined(family, &backend)?);
    pass(&mut server, &mut client, b"250 still here\r\n")?;
    pass(&mut client, &mut server, b"NOOP\r\n")?;
    let log = injector.log();
    ensure!(log.contains("were taken over, with their connections"), "{log}");
    drop(injector);
    drop(Injector::start(&testbed.topology.edge, &config(testbed))?);
    pass(&mut client, &mut server, b"QUIT\r\n")
}

/// The program goes on with its own connections and opens no new ones: it would send them to the
/// backends of then. A daemon that sees neither the pins nor what the program is says so.
fn other_engine(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let backend = testbed.backend(family)?;
    let _detached = Detached::new(testbed)?;
    drop(Injector::start(&testbed.topology.edge, &config(testbed))?);
    let (mut client, mut server) = testbed.inlined(family, &backend)?;
    let splice = config(testbed).replace("engine = \"inline\"", "engine = \"splice\"");
    let hidden = format!(
        "umount {}; exec setpriv --bounding-set=-sys_admin sh -c \"$0\"",
        testbed.bpffs.path().display()
    );
    let blind = Injector::start_by(
        &testbed.topology.edge,
        &["unshare", "--mount", "--propagation=private", "sh", "-c", &hidden],
        &splice,
    )?;
    ensure!(blind.log().contains("in Kubernetes with deploy/kubernetes/detach"), "{}", blind.log());
    drop(testbed.inlined(family, &backend).context("nothing could stop it")?);
    drop(blind);
    let injector = Injector::start(&testbed.topology.edge, &splice)?;
    ensure!(injector.log().contains("inline is not used"), "{}", injector.log());
    ensure!(!injector.log().contains("may not read what they are"), "{}", injector.log());
    let (_later, second) = testbed.joined(family, &backend)?;
    ensure!(!is_inline(&second)?, "the earlier daemon's program has opened a connection");
    works(&mut client, &mut server)
}

/// No client of many sees an error while the daemon is killed and restarted.
fn killed_in_sessions(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    const SESSIONS: usize = 1000;
    let backend = testbed.backend(family)?;
    backend.set_nonblocking(true)?;
    let _detached = Detached::new(testbed)?;
    let injector = Injector::start(&testbed.topology.edge, &config(testbed))?;
    let (done, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| serve(&backend, &over));
        let clients = scope.spawn(|| -> anyhow::Result<()> {
            for number in 0..SESSIONS {
                session(testbed, family).with_context(|| format!("session {number}"))?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let wait_for = |count: usize| {
            let deadline = Instant::now() + Duration::from_secs(20);
            while done.load(Ordering::Relaxed) < count && !clients.is_finished() && Instant::now() < deadline
            {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        wait_for(SESSIONS / 4);
        // SIGKILL.
        drop(injector);
        wait_for(SESSIONS / 2);
        let again = Injector::start(&testbed.topology.edge, &config(testbed));
        let finished = clients.join().map_err(|_| anyhow::anyhow!("panicked"));
        over.store(true, Ordering::Relaxed);
        let served = serving.join().map_err(|_| anyhow::anyhow!("panicked"));
        finished?.context("a client")?;
        served?.context("the backend")?;
        drop(again.context("started again")?);
        Ok(())
    })
}

/// A backend that accepts only connections with a header, until stopped. The listener does not
/// block.
pub(crate) fn serve(backend: &TcpListener, over: &AtomicBool) -> anyhow::Result<()> {
    while !over.load(Ordering::Relaxed) {
        let (mut server, _) = match backend.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_micros(200));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        server.set_nonblocking(false)?;
        server.set_read_timeout(Some(LIMIT))?;
        let mut seen = [0; 12];
        server.read_exact(&mut seen)?;
        ensure!(seen == *b"\r\n\r\n\0\r\nQUIT\n", "no header but {seen:02x?}");
        server.write_all(b"220 hello\r\n")?;
        // Reads until the client's FIN: the rest of the header, and the client's message.
        std::io::copy(&mut server, &mut std::io::sink())?;
    }
    Ok(())
}

/// One client of such a backend, from start to end.
pub(crate) fn session(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let mut client = testbed.client(family)?;
    expect(&mut client, b"220 hello\r\n")?;
    client.write_all(b"QUIT\r\n")?;
    client.shutdown(Shutdown::Write)?;
    ensure!(client.read(&mut [0; 8])? == 0, "no clean end");
    Ok(())
}
