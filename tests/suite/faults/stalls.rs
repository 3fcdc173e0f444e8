//! What is not mail delays no session: scrapers and commands that hang, a log that is not read,
//! a name server that does not answer.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use injector_testbed::daemon::{ADMIN, CONNECTION_CLOSED, Injector};
use injector_testbed::netns::{Family, MAIL, scratch_dir};
use injector_testbed::wait::wait_until;

use crate::testbed::{Testbed, accept_with_header, config, counted, metrics_address, pass};

type Start = fn(&Testbed) -> anyhow::Result<()>;

pub(crate) const TRIALS: &[(&str, Start)] = &[
    ("idle connections to metrics and commands take no descriptors of mail", idle_connections),
    ("scrapers and commands that do not read", no_reader),
    ("a log that is not read", unread_log),
    ("a name server that does not answer", silent_name_server),
];

/// How long sessions run while something hangs: `STALL_SECONDS`, or two seconds.
fn hold() -> Duration {
    let seconds = std::env::var("STALL_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(2))
}

/// A session may not take longer.
const SESSION: Duration = Duration::from_secs(1);

/// Runs sessions one after another, each of which must be quick. Returns their number.
fn sessions(testbed: &Testbed, at_least: Duration) -> anyhow::Result<usize> {
    let backend = testbed.backend()?;
    let (start, mut count) = (Instant::now(), 0);
    while count < 20 || start.elapsed() < at_least {
        let began = Instant::now();
        let mut client = testbed.client()?;
        let (mut server, ..) = accept_with_header(&backend)?;
        pass(&mut server, &mut client, b"220 hello\r\n")?;
        pass(&mut client, &mut server, b"QUIT\r\n")?;
        ensure!(began.elapsed() < SESSION, "session {count} took {:?}", began.elapsed());
        count += 1;
    }
    Ok(count)
}

fn with_admin(extra: &str) -> String {
    config("relay", "smtp", &format!("{extra}\n\n{ADMIN}"))
}

/// Descriptors that the daemon has open.
fn descriptors(injector: &Injector) -> anyhow::Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{}/fd", injector.pid()))?.count())
}

fn idle_connections(testbed: &Testbed) -> anyhow::Result<()> {
    const LIMIT: usize = 250;
    let limit = format!("--nofile={LIMIT}:{LIMIT}");
    let injector = testbed.injector_by(&["prlimit", &limit, "sh", "-c"], &with_admin(""))?;
    let before = descriptors(&injector)?;
    let idle: Vec<_> = (0..LIMIT)
        .map(|_| testbed.topology.edge.run(|| TcpStream::connect(metrics_address()))?.context("metrics"))
        .collect::<anyhow::Result<_>>()?;
    let commands: Vec<_> = (0..LIMIT)
        .map(|_| UnixStream::connect(injector.admin_socket()).context("commands"))
        .collect::<anyhow::Result<_>>()?;
    // Sixteen of each.
    wait_until("the daemon's descriptors", || descriptors(&injector), |open| *open <= before + 2 * 16 + 2)?;
    sessions(testbed, Duration::ZERO)?;
    let ready = injector.readiness()?;
    ensure!(ready.0 == 200, "{ready:?}");
    injector.status()?;
    counted(&injector, "injector_connections_rejected_total", &[], 0.0)?;
    drop((idle, commands));
    Ok(())
}

fn no_reader(testbed: &Testbed) -> anyhow::Result<()> {
    let injector = testbed.injector_by(&["sh", "-c"], &with_admin(""))?;
    let mut stalled = Vec::new();
    for _ in 0..16 {
        let mut scraper = testbed.topology.edge.run(|| -> std::io::Result<TcpStream> {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            // Less than a page of metrics.
            socket.set_recv_buffer_size(1)?;
            socket.connect(&metrics_address().into())?;
            Ok(socket.into())
        })??;
        scraper.write_all(b"GET /metrics HTTP/1.1\r\nhost: test\r\n\r\n")?;
        let mut command = UnixStream::connect(injector.admin_socket())?;
        command.write_all(b"{\"command\":\"status\"}\n")?;
        stalled.push((scraper, command));
    }
    sessions(testbed, hold())?;
    ensure!(injector.readiness()?.0 == 200 && injector.metrics()?.has("injector_build_info"));
    injector.command(&["reload"])?;
    drop(stalled);
    Ok(())
}

/// The pipe of standard error is full all the time.
fn unread_log(testbed: &Testbed) -> anyhow::Result<()> {
    let dir = scratch_dir("stalls")?;
    let pipe = dir.path().join("log");
    let name = CString::new(pipe.as_os_str().as_bytes())?;
    // SAFETY: the name ends with a zero byte, and the call keeps no pointer.
    ensure!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) } == 0, "{}", std::io::Error::last_os_error());
    // For both, so that opening it does not wait.
    let mut reader = File::options().read(true).write(true).open(&pipe)?;
    // SAFETY: the descriptor is open, and the argument is a number.
    let size = unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) };
    ensure!(size == 4096, "{}", std::io::Error::last_os_error());
    let script = format!("eval \"$0 2>{}\"", pipe.display());
    // Longer than the pipe after a few sessions, as the access log of many is.
    let config = with_admin("") + "\n[log]\nlevel = \"debug\"\n";
    let mut injector = testbed.injector_by(&["sh", "-c", &script], &config)?;
    let count = sessions(testbed, hold())?;
    injector.command(&["reload"])?;
    injector.status()?;
    counted(&injector, "injector_log_lines_dropped_total", &[], 0.0)?;
    // All of it is there once it is read.
    read_until(&mut reader, |text| {
        text.matches(CONNECTION_CLOSED).count() == count && text.contains("configuration reloaded")
    })?;
    // The exit waits a second for the reader, and no longer.
    sessions(testbed, Duration::ZERO)?;
    let start = Instant::now();
    injector.ask_to_stop()?;
    let (status, _) = injector.wait_stopped()?;
    ensure!(
        status.success() && start.elapsed() < Duration::from_secs(20),
        "{status} after {:?}",
        start.elapsed()
    );
    Ok(())
}

/// Reads until the text satisfies the condition.
fn read_until(reader: &mut File, complete: impl Fn(&str) -> bool) -> anyhow::Result<String> {
    let (mut bytes, start) = (Vec::new(), Instant::now());
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if complete(&text) {
            return Ok(text);
        }
        ensure!(start.elapsed() < Duration::from_secs(30), "only this is in the log: {text}");
        let mut ready = libc::pollfd { fd: reader.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: `ready` is one entry, which lives during the call.
        if unsafe { libc::poll(&raw mut ready, 1, 100) } > 0 {
            let mut chunk = [0; 4096];
            let count = reader.read(&mut chunk)?;
            bytes.extend_from_slice(&chunk[..count]);
        }
    }
}

/// Sessions to another backend go on, a reload is applied, and the daemon exits at once.
fn silent_name_server(testbed: &Testbed) -> anyhow::Result<()> {
    let dir = scratch_dir("stalls")?;
    let server = testbed.topology.mail.run(|| UdpSocket::bind((MAIL.v4, 53)))??;
    server.set_read_timeout(Some(Duration::from_secs(30)))?;
    let resolv = dir.path().join("resolv.conf");
    std::fs::write(&resolv, format!("nameserver {}\noptions timeout:30 attempts:5\n", MAIL.of(Family::V4)))?;
    let script = format!("mount --bind {} /etc/resolv.conf && eval \"$0\"", resolv.display());
    let named = "\n[[listener]]\nname = \"named\"\nbind = [\"192.0.2.10:2501\"]\nprotocol = \"smtp\"\nengine = \"relay\"\n\
                 backends = [\"mail.stalled.test:2525\"]\nresolve_interval = \"1s\"\n";
    let config = with_admin("") + named;
    let mut injector = testbed.injector_by(&["unshare", "--mount", "sh", "-c", &script], &config)?;
    let asked = server.recv(&mut [0; 512]).context("the name was not looked up")?;
    ensure!(asked > 0);
    sessions(testbed, hold())?;
    injector.command(&["reload"])?;
    injector.status()?;
    let start = Instant::now();
    injector.ask_to_stop()?;
    let (status, log) = injector.wait_stopped()?;
    ensure!(
        status.success() && start.elapsed() < Duration::from_secs(20),
        "{status} after {:?}: {log}",
        start.elapsed()
    );
    Ok(())
}
