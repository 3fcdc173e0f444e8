//! Memory cost of many stalled readers, with back-pressure and without.

use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use injector_testbed::resource_usage::{Memory, MemoryWatch, socket_buffers};
use socket2::SockRef;

use crate::Run;
use crate::testbed::{LIMIT, Testbed, accept_with_header, expect, patient, public_address};
use crate::transfers::pattern;

pub(crate) const TRIALS: &[(&str, Run)] = &[("limits/200 stalled readers", stalled_readers)];

const READERS: usize = 200;
/// Bytes offered to each reader.
const PUSHED: usize = 8 << 20;
/// Memory that they may cost in addition to the sockets' own buffers.
const BESIDE_BUFFERS: u64 = 64 << 20;
/// Water marks of the splice engine that are too high to be reached.
const NO_BACK_PRESSURE: &str = "\n\n[splice]\nhigh_water = 1099511627775\ntotal_high_water = 1099511627775\n\
                                total_limit = 1099511627776\nenrol_after_messages = 1";

/// The measured cost, in bytes.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Accepted from the backends.
    taken: u64,
    /// Additional memory in the kernel, and in the daemon, at peak.
    grown: u64,
    /// The part of it in socket buffers, at the end.
    buffers: u64,
    /// Bytes queued in the kernel that are charged to no socket, as the daemon counts them.
    backlog: u64,
    /// Decrease of `MemAvailable`; other programs contribute to it.
    less_available: u64,
}

impl Cost {
    fn beside_buffers(&self) -> u64 {
        self.grown.saturating_sub(self.buffers)
    }

    fn print(&self, what: &str) {
        let [taken, grown, buffers, beside, backlog, less] =
            [self.taken, self.grown, self.buffers, self.beside_buffers(), self.backlog, self.less_available]
                .map(|bytes| bytes >> 20);
        println!(
            "  {what}: {taken} MiB taken, memory grew by {grown} MiB, of it {buffers} MiB in socket buffers and \
             {beside} MiB beside them; {backlog} MiB wait in the kernel; {less} MiB less available"
        );
    }
}

/// Backends send at full speed to clients that read nothing.
fn stalled_readers(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    // Other programs may use kernel memory at the same time: the minimum of several runs counts.
    const TRIES: usize = 3;
    let mut least = u64::MAX;
    for _ in 0..TRIES {
        let cost = push(testbed, engine, "")?;
        cost.print("with back-pressure");
        // Memory that other programs release meanwhile hides ours; the daemon's counters do not
        // depend on them.
        least = least.min(cost.beside_buffers().max(cost.backlog));
        if least < BESIDE_BUFFERS {
            break;
        }
    }
    if engine == "splice" {
        push(testbed, engine, NO_BACK_PRESSURE)?.print("without back-pressure");
    }
    ensure!(least < BESIDE_BUFFERS, "{READERS} stalled readers cost {} MiB beside the buffers", least >> 20);
    Ok(())
}

fn push(testbed: &Testbed, engine: &str, extra: &str) -> anyhow::Result<Cost> {
    let backend = testbed.backend()?;
    let injector = testbed.injector(engine, "smtp", extra)?;
    let readers = readers(testbed, &backend)?;
    let buffers = || -> anyhow::Result<u64> {
        let topology = &testbed.topology;
        [&topology.client, &topology.edge, &topology.mail].into_iter().map(socket_buffers).sum()
    };
    let buffers_before = buffers()?;
    settle();
    let watch = MemoryWatch::start(injector.pid());
    let taken = push_all(&readers)?;
    let in_buffers = buffers()?.saturating_sub(buffers_before);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a sum of bytes")]
    let backlog = injector.metrics()?.sum("injector_backlog_bytes", &[]) as u64;
    let (before, peak): (Memory, Memory) = watch.end();
    let cost = Cost {
        taken,
        grown: peak.kernel.saturating_sub(before.kernel) + peak.daemon.saturating_sub(before.daemon),
        buffers: in_buffers,
        backlog,
        less_available: before.available.saturating_sub(peak.available),
    };
    // Closing with unread bytes resets: the queued bytes are freed at once.
    drop(readers);
    let deadline = Instant::now() + LIMIT;
    while injector.sessions()?.len() < READERS {
        ensure!(Instant::now() < deadline, "{} of {READERS} sessions ended", injector.sessions()?.len());
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(cost)
}

/// Clients that read nothing, and their backends' sockets, both with small buffers, so that these
/// do not hide what the injector queues.
fn readers(testbed: &Testbed, backend: &TcpListener) -> anyhow::Result<Vec<(TcpStream, TcpStream)>> {
    const BUFFER: usize = 64 << 10;
    let connect = |_| TcpStream::connect_timeout(&public_address(), LIMIT);
    let clients: Vec<TcpStream> =
        testbed.topology.client.run(|| (0..READERS).map(connect).collect::<Result<_, _>>())??;
    let mut servers = Vec::new();
    for _ in &clients {
        let (mut server, ..) = accept_with_header(backend)?;
        server.write_all(b"220 hello\r\n")?;
        SockRef::from(&server).set_send_buffer_size(BUFFER)?;
        server.set_nonblocking(true)?;
        servers.push(server);
    }
    for client in &clients {
        patient(client)?;
        SockRef::from(client).set_recv_buffer_size(BUFFER)?;
        expect(&mut client.try_clone()?, b"220 hello\r\n")?;
    }
    Ok(clients.into_iter().zip(servers).collect())
}

/// Waits until the kernel has released the memory of a previous run.
fn settle() {
    let kernel = || Memory::now(std::process::id()).kernel;
    let (deadline, mut last) = (Instant::now() + Duration::from_secs(10), u64::MAX);
    while Instant::now() < deadline {
        let now = kernel();
        if now.abs_diff(last) < 1 << 20 {
            return;
        }
        last = now;
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// Writes to all sockets until none has accepted anything for a second; returns the accepted bytes.
fn push_all(readers: &[(TcpStream, TcpStream)]) -> anyhow::Result<u64> {
    let bytes = pattern(59, PUSHED);
    let mut written = vec![0; readers.len()];
    let mut last = Instant::now();
    while last.elapsed() < Duration::from_secs(1) {
        for ((_, server), written) in readers.iter().zip(&mut written) {
            match (&mut &*server).write(bytes.get(*written..).unwrap_or_default()) {
                Ok(0) => {}
                Ok(count) => (*written, last) = (*written + count, Instant::now()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("pushing"),
            }
        }
    }
    Ok(written.iter().sum::<usize>() as u64)
}
