//! Many connections at a time: idle ones, more than there are descriptors, and new ones during a
//! shutdown.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::AddAssign;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use injector_testbed::bpf::{map_entries, map_exists, map_ids};
use injector_testbed::resource_usage::{Memory, descriptors};
use injector_testbed::wait::wait_until;

use crate::Run;
use crate::testbed::{
    Ending, LIMIT, Testbed, accept_now, accept_with_header, counted, ending, expect, finished, pass, patient,
    public_address,
};
use crate::transfers::{introduced, pattern, receive_all, send_all};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("limits/connections during a shutdown", churn),
    ("limits/2000 idle connections", idle),
    ("limits/no descriptors left", no_descriptors),
];

/// Sessions of the clients of [`churn`], by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct SessionCounts {
    /// Complete: from the banner to the last reply.
    finished: usize,
    /// Complete after the signal.
    finished_late: usize,
    /// `421` instead of a banner.
    rejected: usize,
    /// Reset before the banner, in the accept queue of a closed socket.
    reset: usize,
}

impl AddAssign for SessionCounts {
    fn add_assign(&mut self, other: Self) {
        self.finished += other.finished;
        self.finished_late += other.finished_late;
        self.rejected += other.rejected;
        self.reset += other.reset;
    }
}

/// Clients connect and close continuously while the daemon shuts down. A client that has the banner
/// finishes; others are rejected or reset, none before the signal. The daemon exits in time and
/// leaves nothing in the kernel.
fn churn(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const WORKERS: usize = 8;
    const DEADLINE: Duration = Duration::from_secs(5);
    let backend = testbed.backend()?;
    backend.set_nonblocking(true)?;
    let mut injector = testbed.injector(engine, "smtp", "\n\n[stop]\ndeadline = \"5s\"")?;
    let maps = map_ids(injector.pid())?;
    let (stopping, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let (counts, stopped) = std::thread::scope(|scope| {
        let serving = scope.spawn(|| serve(&backend, &over));
        let clients = scope.spawn(|| {
            testbed.topology.client.run(|| {
                std::thread::scope(|scope| {
                    let workers: Vec<_> = (0..WORKERS)
                        .map(|number| {
                            let stopping = &stopping;
                            scope.spawn(move || keep_coming(stopping, number))
                        })
                        .collect();
                    let mut all = SessionCounts::default();
                    for worker in workers {
                        all += worker.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
                    }
                    anyhow::Ok(all)
                })
            })
        });
        std::thread::sleep(Duration::from_millis(500));
        let start = Instant::now();
        // Before the signal, so that scheduling cannot make a rejected client appear to be early.
        stopping.store(true, Ordering::SeqCst);
        injector.ask_to_stop()?;
        let (status, log) = injector.wait_stopped()?;
        let took = start.elapsed();
        let counts = clients.join().map_err(|_| anyhow::anyhow!("the clients panicked"))???;
        over.store(true, Ordering::SeqCst);
        serving.join().map_err(|_| anyhow::anyhow!("the backend panicked"))??;
        anyhow::Ok((counts, (status, log, took)))
    })?;
    let (status, log, took) = stopped;
    println!("  {counts:?}, stopped after {took:?}");
    ensure!(status.success() && took < DEADLINE, "{status} after {took:?}");
    ensure!(log.contains(", 0 aborted"), "{log}");
    ensure!(
        counts.finished > WORKERS && counts.finished_late > 0,
        "nothing went on during the stop: {counts:?}"
    );
    gone(&maps)
}

/// The maps disappear shortly after the daemon exits, because nothing pins them.
fn gone(maps: &[u32]) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    for map in maps {
        while map_exists(*map)? {
            ensure!(Instant::now() < deadline, "BPF map {map} outlived its daemon");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(())
}

/// A backend that responds to all clients at once.
fn serve(backend: &TcpListener, over: &AtomicBool) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        while !over.load(Ordering::SeqCst) {
            match backend.accept() {
                Ok((stream, _)) => drop(scope.spawn(move || answer(stream))),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    })
}

/// The client detects any error here.
fn answer(mut stream: TcpStream) -> anyhow::Result<()> {
    stream.set_nonblocking(false)?;
    patient(&stream)?;
    let mut header = [0; 28];
    stream.read_exact(&mut header)?;
    stream.write_all(b"220 hello\r\n")?;
    expect(&mut stream, b"EHLO client\r\n")?;
    stream.write_all(b"250 go on\r\n")?;
    expect(&mut stream, b"QUIT\r\n")?;
    stream.write_all(b"221 bye\r\n")?;
    stream.shutdown(Shutdown::Write)?;
    let _ = ending(&mut stream)?;
    Ok(())
}

/// One session after another, until connecting fails.
fn keep_coming(stopping: &AtomicBool, number: usize) -> anyhow::Result<SessionCounts> {
    let mut counts = SessionCounts::default();
    loop {
        let mut client = match TcpStream::connect_timeout(&public_address(), LIMIT) {
            Ok(client) => client,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused && stopping.load(Ordering::SeqCst) => {
                return Ok(counts);
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset && stopping.load(Ordering::SeqCst) => {
                counts.reset += 1;
                continue;
            }
            Err(error) => return Err(error).context("connecting"),
        };
        patient(&client)?;
        let mut banner = [0; 11];
        match client.read_exact(&mut banner) {
            Ok(()) if &banner == b"220 hello\r\n" => {
                talk(&mut client, number).context("after the banner")?;
                counts.finished += 1;
                counts.finished_late += usize::from(stopping.load(Ordering::SeqCst));
            }
            Ok(()) if banner.starts_with(b"421 4.3.2 ") && stopping.load(Ordering::SeqCst) => {
                counts.rejected += 1
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset && stopping.load(Ordering::SeqCst) => {
                counts.reset += 1;
            }
            other => bail!("{other:?} in place of a banner: {:?}", String::from_utf8_lossy(&banner)),
        }
    }
}

/// Some sessions are slow, so that the signal arrives in the middle.
fn talk(client: &mut TcpStream, number: usize) -> anyhow::Result<()> {
    client.write_all(b"EHLO client\r\n")?;
    expect(client, b"250 go on\r\n")?;
    std::thread::sleep(Duration::from_millis(number as u64 * 10));
    client.write_all(b"QUIT\r\n")?;
    ensure!(ending(client)? == Ending::Fin(b"221 bye\r\n".to_vec()), "no last reply and FIN");
    Ok(())
}

/// The hash maps of the splice engine with one entry per spliced direction.
const PER_DIRECTION: [&str; 4] = ["TARGETS", "VERDICT", "FLOWS", "CREDIT"];

/// All connections are spliced, then closed: descriptors and map entries are as before.
fn idle(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const CONNECTIONS: usize = 2000;
    // Two descriptors per connection in this process, two in the daemon.
    allow_descriptors(std::process::id(), 2 * CONNECTIONS + 1000)?;
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    let pid = injector.pid();
    // The readiness check's connection may still be open.
    std::thread::sleep(Duration::from_millis(300));
    let before = (descriptors(pid)?, map_entries(pid)?);
    let memory = Memory::now(pid).daemon;
    let start = Instant::now();
    let (mut clients, mut servers) = (Vec::new(), Vec::new());
    while clients.len() < CONNECTIONS {
        // So few at a time that no accept queue overflows.
        let some: Vec<_> = testbed.topology.client.run(|| {
            let connect = |_| TcpStream::connect_timeout(&public_address(), LIMIT);
            (0..100).map(connect).collect::<Result<_, _>>()
        })??;
        for _ in &some {
            let (mut server, ..) = accept_with_header(&backend)?;
            server.write_all(b"220 hello\r\n")?;
            servers.push(server);
        }
        // The order of the servers does not matter: all send the same.
        for mut client in some {
            patient(&client)?;
            client.write_all(b"EHLO client\r\n")?;
            clients.push(client);
        }
    }
    for (client, server) in clients.iter_mut().zip(&mut servers) {
        expect(client, b"220 hello\r\n")?;
        expect(server, b"EHLO client\r\n")?;
    }
    if engine == "splice" {
        wait_until(
            "map entries",
            || map_entries(pid),
            |entries| {
                let full =
                    |name: &&str| entries.iter().any(|(map, count)| map == name && *count == 2 * CONNECTIONS);
                PER_DIRECTION.iter().all(full)
            },
        )?;
    }
    let grown = Memory::now(pid).daemon.saturating_sub(memory);
    let opened = start.elapsed();
    println!(
        "  {} bytes of the daemon per connection, all open after {opened:?}",
        grown / CONNECTIONS as u64
    );
    counted(&injector, "injector_connections_active", &[], CONNECTIONS as f64)?;
    // Per connection the daemon needs two sockets, their bookkeeping, and a task. 64 KiB is far too
    // much.
    ensure!(grown / (CONNECTIONS as u64) < 64 << 10, "{grown} bytes for {CONNECTIONS} connections");
    drop(clients);
    for mut server in servers {
        ensure!(ending(&mut server)? == Ending::Fin(Vec::new()), "no clean end at the backend");
    }
    for session in finished(&injector, CONNECTIONS)? {
        ensure!(session.field("reason").as_deref() == Some("client_closed"), "{session:?}");
    }
    // The scrape above may have kept its connection.
    wait_until(
        &format!("descriptors and map entries, before {before:?}"),
        || Ok((descriptors(pid)?, map_entries(pid)?)),
        |after| after.0 <= before.0 && after.1 == before.1,
    )
    .map(drop)
}

/// Sets a process's limit of open files.
fn set_nofile(pid: u32, limit: usize) -> anyhow::Result<()> {
    let (pid, limit) = (format!("--pid={pid}"), format!("--nofile={limit}:"));
    let output = Command::new("prlimit").args([&pid, &limit]).output().context("cannot run prlimit")?;
    ensure!(output.status.success(), "prlimit: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Raises a process's limit of open files, if it is lower.
fn allow_descriptors(pid: u32, wanted: usize) -> anyhow::Result<()> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).context("no limit")?;
    let limit: usize =
        line.split_whitespace().next().and_then(|soft| soft.parse().ok()).unwrap_or(usize::MAX);
    if limit < wanted { set_nofile(pid, wanted) } else { Ok(()) }
}

/// The lowest unused descriptor number of the process; as its limit, it leaves no descriptor.
fn lowest_free(pid: u32) -> anyhow::Result<usize> {
    let mut used = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        used.extend(entry?.file_name().to_str().and_then(|name| name.parse::<usize>().ok()));
    }
    Ok((0..).find(|number| !used.contains(number)).unwrap_or_default())
}

/// The same, once it is stable: a descriptor is closed shortly after its log line.
fn settled_free(pid: u32) -> anyhow::Result<usize> {
    let mut free = lowest_free(pid)?;
    for _ in 0..50 {
        std::thread::sleep(Duration::from_millis(100));
        match std::mem::replace(&mut free, lowest_free(pid)?) {
            before if before == free => return Ok(free),
            _ => {}
        }
    }
    anyhow::bail!("descriptors come and go: {free} is free now")
}

/// Processor time of the process in ticks of 10 ms: fields 14 and 15 of /proc/pid/stat, after the
/// name (proc(5)).
fn ticks(pid: u32) -> anyhow::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(") ").context("no name in /proc/pid/stat")?;
    let times = fields.split_whitespace().skip(11).take(2);
    Ok(times.filter_map(|time| time.parse::<u64>().ok()).sum())
}

/// Clients above the limit are rejected with a temporary failure, this is logged once, existing
/// sessions are not affected, the daemon does not spin, and accepts again when descriptors are
/// free.
fn no_descriptors(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const REJECTED: usize = 20;
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    let pid = injector.pid();
    std::thread::sleep(Duration::from_millis(300));
    let (mut client, mut server) = introduced(testbed, &backend)?;
    let (bulk_client, bulk_server) = introduced(testbed, &backend)?;

    // One descriptor for the client, none for the backend socket.
    set_nofile(pid, lowest_free(pid)? + 1)?;
    let mut half = testbed.client()?;
    expect(&mut half, b"421 4.3.2 Mail service not available, try again later\r\n")
        .with_context(|| format!("logged:\n{}", injector.log()))?;
    drop(half);
    let sessions = finished(&injector, 1)?;
    ensure!(sessions[0].field("reason").as_deref() == Some("internal"), "{sessions:?}");
    ensure!(
        sessions[0].field("error").is_some_and(|error| error.contains("Too many open files")),
        "{sessions:?}"
    );

    // No descriptor at all, once the last client's is closed.
    set_nofile(pid, settled_free(pid)?)?;
    let (start, before) = (Instant::now(), ticks(pid)?);
    for _ in 0..REJECTED {
        let mut late = testbed.client()?;
        let rejected = ending(&mut late)?;
        let line = b"421 4.3.2 Too many connections, try again later\r\n".to_vec();
        ensure!(rejected == Ending::Fin(line), "{rejected:?}");
        pass(&mut client, &mut server, b"NOOP\r\n")?;
        pass(&mut server, &mut client, b"250 fine\r\n")?;
    }
    // A waiting client costs no processor time either.
    std::thread::sleep(Duration::from_secs(1));
    let (busy, wall) = (ticks(pid)? - before, start.elapsed());
    ensure!(busy < 30, "{busy} ticks of work in {wall:?}: it spins");
    let (up, down) = (pattern(47, 8 << 20), pattern(53, 8 << 20));
    std::thread::scope(|scope| {
        let tasks = [
            scope.spawn(|| send_all(&bulk_client, &up)),
            scope.spawn(|| receive_all(&bulk_server, &up)),
            scope.spawn(|| send_all(&bulk_server, &down)),
            scope.spawn(|| receive_all(&bulk_client, &down)),
        ];
        tasks.into_iter().try_for_each(|task| task.join().map_err(|_| anyhow::anyhow!("panicked"))?)
    })?;
    let log = injector.log();
    ensure!(log.matches("no file descriptors left").count() == 1, "{log}");

    // And again.
    set_nofile(pid, 1000)?;
    drop((bulk_client, bulk_server));
    let (new_client, new_server) = introduced(testbed, &backend)?;
    drop((new_client, new_server, client, server));
    finished(&injector, 4)?;
    let refused = [("reason", "no_descriptors")];
    counted(&injector, "injector_connections_rejected_total", &refused, REJECTED as f64)?;
    // Rejected clients cause no backend connection.
    backend.set_nonblocking(true)?;
    ensure!(accept_now(&backend)?.is_none(), "a connection to the backend for a rejected client");
    Ok(())
}
