//! Many connections at one time: idle ones, more than there are descriptors for, and those that come during a stop.

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

/// How the clients of [`churn`] fared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Fared {
    /// From the banner to the goodbye.
    finished: usize,
    /// As many of them after the signal.
    finished_late: usize,
    /// `421` in place of a banner.
    told: usize,
    /// Reset before the banner, in the kernel's queue of a socket that closed.
    reset: usize,
}

impl AddAssign for Fared {
    fn add_assign(&mut self, other: Self) {
        self.finished += other.finished;
        self.finished_late += other.finished_late;
        self.told += other.told;
        self.reset += other.reset;
    }
}

/// Clients connect and finish all the time, while the daemon is told to stop: whoever had the banner finishes, whoever had
/// none is told or reset, nobody before the signal, and the daemon ends in time and leaves nothing in the kernel.
fn churn(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const WORKERS: usize = 8;
    const DEADLINE: Duration = Duration::from_secs(5);
    let backend = testbed.backend()?;
    backend.set_nonblocking(true)?;
    let mut injector = testbed.injector(engine, "smtp", "\n\n[stop]\ndeadline = \"5s\"")?;
    let maps = map_ids(injector.pid())?;
    let (stopping, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let (fared, stopped) = std::thread::scope(|scope| {
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
                    let mut all = Fared::default();
                    for worker in workers {
                        all += worker.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
                    }
                    anyhow::Ok(all)
                })
            })
        });
        std::thread::sleep(Duration::from_millis(500));
        let start = Instant::now();
        // Before the signal: a client that is told cannot have been told too early by a scheduler's whim.
        stopping.store(true, Ordering::SeqCst);
        injector.ask_to_stop()?;
        let (status, log) = injector.wait_stopped()?;
        let took = start.elapsed();
        let fared = clients.join().map_err(|_| anyhow::anyhow!("the clients panicked"))???;
        over.store(true, Ordering::SeqCst);
        serving.join().map_err(|_| anyhow::anyhow!("the backend panicked"))??;
        anyhow::Ok((fared, (status, log, took)))
    })?;
    let (status, log, took) = stopped;
    println!("  {fared:?}, stopped after {took:?}");
    ensure!(status.success() && took < DEADLINE, "{status} after {took:?}");
    ensure!(log.contains("0 were cut"), "{log}");
    ensure!(
        fared.finished > WORKERS && fared.finished_late > 0,
        "nothing went on during the stop: {fared:?}"
    );
    gone(&maps)
}

/// The maps of an ended daemon go, a moment after it: nothing pins them.
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

/// A backend that answers everybody at once.
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

/// What goes wrong here, the client sees.
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

/// One session after the other, until nobody listens.
fn keep_coming(stopping: &AtomicBool, number: usize) -> anyhow::Result<Fared> {
    let mut fared = Fared::default();
    loop {
        let mut client = match TcpStream::connect_timeout(&public_address(), LIMIT) {
            Ok(client) => client,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused && stopping.load(Ordering::SeqCst) => {
                return Ok(fared);
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset && stopping.load(Ordering::SeqCst) => {
                fared.reset += 1;
                continue;
            }
            Err(error) => return Err(error).context("connecting"),
        };
        patient(&client)?;
        let mut banner = [0; 11];
        match client.read_exact(&mut banner) {
            Ok(()) if &banner == b"220 hello\r\n" => {
                talk(&mut client, number).context("after the banner")?;
                fared.finished += 1;
                fared.finished_late += usize::from(stopping.load(Ordering::SeqCst));
            }
            Ok(()) if banner.starts_with(b"421 4.3.2 ") && stopping.load(Ordering::SeqCst) => fared.told += 1,
            Err(error) if error.kind() == ErrorKind::ConnectionReset && stopping.load(Ordering::SeqCst) => {
                fared.reset += 1;
            }
            other => bail!("{other:?} in place of a banner: {:?}", String::from_utf8_lossy(&banner)),
        }
    }
}

/// Some take their time, so that the stop comes in the middle.
fn talk(client: &mut TcpStream, number: usize) -> anyhow::Result<()> {
    client.write_all(b"EHLO client\r\n")?;
    expect(client, b"250 go on\r\n")?;
    std::thread::sleep(Duration::from_millis(number as u64 * 10));
    client.write_all(b"QUIT\r\n")?;
    ensure!(ending(client)? == Ending::Fin(b"221 bye\r\n".to_vec()), "no goodbye and FIN");
    Ok(())
}

/// The hash maps of the splice engine that have an element for each spliced direction.
const PER_DIRECTION: [&str; 4] = ["TARGETS", "VERDICT", "FLOWS", "CREDIT"];

/// All of them in the kernel's hands, then all closed: descriptors and map elements are as before.
fn idle(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const CONNECTIONS: usize = 2000;
    // Two for each here, two there.
    allow_descriptors(std::process::id(), 2 * CONNECTIONS + 1000)?;
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    let pid = injector.pid();
    // The connection that asked for readiness may still be open.
    std::thread::sleep(Duration::from_millis(300));
    let before = (descriptors(pid)?, map_entries(pid)?);
    let memory = Memory::now(pid).daemon;
    let start = Instant::now();
    let (mut clients, mut servers) = (Vec::new(), Vec::new());
    while clients.len() < CONNECTIONS {
        // So few at a time that no queue of waiting connections is full.
        let some: Vec<_> = testbed.topology.client.run(|| {
            let connect = |_| TcpStream::connect_timeout(&public_address(), LIMIT);
            (0..100).map(connect).collect::<Result<_, _>>()
        })??;
        for _ in &some {
            let (mut server, ..) = accept_with_header(&backend)?;
            server.write_all(b"220 hello\r\n")?;
            servers.push(server);
        }
        // Which server is whose does not matter: all say the same.
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
    // What a connection needs in the daemon: two sockets, their buffers' bookkeeping, a task. 64 KiB is far too much.
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

/// The lowest number that no descriptor of the process has: as its limit, it leaves room for none.
fn lowest_free(pid: u32) -> anyhow::Result<usize> {
    let mut used = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        used.extend(entry?.file_name().to_str().and_then(|name| name.parse::<usize>().ok()));
    }
    Ok((0..).find(|number| !used.contains(number)).unwrap_or_default())
}

/// The same when it has not changed for a while: a descriptor is closed some time after the line about it.
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

/// Ticks (of 10 ms) that the process has run: fields 14 and 15 of /proc/pid/stat, counted behind the name (proc(5)).
fn ticks(pid: u32) -> anyhow::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(") ").context("no name in /proc/pid/stat")?;
    let times = fields.split_whitespace().skip(11).take(2);
    Ok(times.filter_map(|time| time.parse::<u64>().ok()).sum())
}

/// Everybody beyond is told to come back later, the log says so once, those who are served notice nothing, the daemon does
/// not spin, and with descriptors there is room again.
fn no_descriptors(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const TURNED_AWAY: usize = 20;
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", "")?;
    let pid = injector.pid();
    std::thread::sleep(Duration::from_millis(300));
    let (mut client, mut server) = introduced(testbed, &backend)?;
    let (bulk_client, bulk_server) = introduced(testbed, &backend)?;

    // Room for the client, none for the socket to its backend.
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

    // None at all, once the last one's is closed.
    set_nofile(pid, settled_free(pid)?)?;
    let (start, before) = (Instant::now(), ticks(pid)?);
    for _ in 0..TURNED_AWAY {
        let mut late = testbed.client()?;
        let told = ending(&mut late)?;
        let line = b"421 4.3.2 Too many connections, try again later\r\n".to_vec();
        ensure!(told == Ending::Fin(line), "{told:?}");
        pass(&mut client, &mut server, b"NOOP\r\n")?;
        pass(&mut server, &mut client, b"250 fine\r\n")?;
    }
    // Somebody who waits costs nothing either.
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
    ensure!(log.matches("no file descriptors are left").count() == 1, "{log}");

    // And again.
    set_nofile(pid, 1000)?;
    drop((bulk_client, bulk_server));
    let (new_client, new_server) = introduced(testbed, &backend)?;
    drop((new_client, new_server, client, server));
    finished(&injector, 4)?;
    let refused = [("reason", "no_descriptors")];
    counted(&injector, "injector_connections_rejected_total", &refused, TURNED_AWAY as f64)?;
    // No backend was touched for those who were turned away.
    backend.set_nonblocking(true)?;
    ensure!(accept_now(&backend)?.is_none(), "a connection to the backend for somebody who was turned away");
    Ok(())
}
