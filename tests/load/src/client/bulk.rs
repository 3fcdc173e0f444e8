//! Bulk transfer at full speed: blocking sockets, one thread for each connection, large system
//! calls.
//!
//! Only bytes that arrived count, and the time runs until the last byte has arrived: a proxy
//! buffers megabytes.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::net::{RecvFlags, recv};

use super::failures::Failures;
use crate::cpu::Cpu;
use crate::job::JobOutcome;
use crate::server::CHUNK;

/// A connection that transfers no byte for this long has failed.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes per read; the kernel drops them (MSG_TRUNC), so that the client causes no memory traffic.
const DISCARD_CHUNK: usize = 1 << 20;

pub(super) fn upload(target: SocketAddr, connections: usize, seconds: f64) -> anyhow::Result<JobOutcome> {
    run_together(target, connections, |mut stream| {
        let payload = vec![b'x'; CHUNK];
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        let mut sent = 0;
        while Instant::now() < until {
            sent += stream.write(&payload)? as u64;
        }
        stream.shutdown(Shutdown::Write)?;
        // The server closes when it has read everything; before that, arrival is unknown.
        match stream.read(&mut [0])? {
            0 => Ok(sent),
            _ => Err(io::Error::other("the server sent data during an upload")),
        }
    })
}

pub(super) fn download(target: SocketAddr, connections: usize, seconds: f64) -> anyhow::Result<JobOutcome> {
    let millis = Duration::from_secs_f64(seconds).as_millis();
    let duration = u32::try_from(millis).context("too long")?.to_be_bytes();
    run_together(target, connections, move |mut stream| {
        let mut buffer = vec![0; DISCARD_CHUNK];
        stream.write_all(&duration)?;
        let mut received = 0;
        loop {
            match recv(stream.as_fd(), &mut buffer[..], RecvFlags::TRUNC) {
                Ok((_, 0)) => return Ok(received),
                Ok((_, length)) => received += length as u64,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    })
}

/// Opens all connections, starts all transfers at the same moment, and returns when the last has
/// ended.
fn run_together(
    target: SocketAddr,
    connections: usize,
    transfer: impl Fn(TcpStream) -> io::Result<u64> + Sync,
) -> anyhow::Result<JobOutcome> {
    let mut outcome = JobOutcome::default();
    let mut failures = Failures::default();
    let mut streams = Vec::new();
    for _ in 0..connections {
        match connect(target) {
            Ok(stream) => streams.push(stream),
            Err(error) => failures.note("connecting", error),
        }
    }
    outcome.connections = streams.len() as u64;
    let start = Barrier::new(streams.len() + 1);
    let (start, transfer) = (&start, &transfer);
    let (begun, before) = thread::scope(|scope| {
        let run = move |stream| {
            start.wait();
            transfer(stream)
        };
        let threads: Vec<_> = streams.into_iter().map(|stream| scope.spawn(move || run(stream))).collect();
        let before = Cpu::now()?;
        let begun = Instant::now();
        start.wait();
        for thread in threads {
            match thread.join() {
                Ok(Ok(bytes)) => outcome.bytes += bytes,
                Ok(Err(error)) => failures.note("transferring", error),
                Err(_) => failures.note("transferring", "panicked"),
            }
        }
        anyhow::Ok((begun, before))
    })?;
    outcome.seconds = begun.elapsed().as_secs_f64();
    outcome.cpu = Cpu::now()? - before;
    failures.into(&mut outcome);
    Ok(outcome)
}

pub(super) fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, TIMEOUT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(stream)
}
