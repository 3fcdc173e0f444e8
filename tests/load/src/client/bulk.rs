//! As many bytes as fit through: blocking sockets, a thread for each, large system calls.
//!
//! What counts is what arrived, and the time until the last byte had: megabytes lie in the buffers of a proxy.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::net::{RecvFlags, recv};

use super::tally::Failures;
use crate::cpu::Cpu;
use crate::order::Outcome;
use crate::server::CHUNK;

/// Without a byte for so long, a connection has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes asked for at once; the kernel drops them (MSG_TRUNC), so the client costs no memory traffic.
const SWALLOW: usize = 1 << 20;

pub(super) fn upload(target: SocketAddr, connections: usize, seconds: f64) -> anyhow::Result<Outcome> {
    together(target, connections, |mut stream| {
        let payload = vec![b'x'; CHUNK];
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        let mut sent = 0;
        while Instant::now() < until {
            sent += stream.write(&payload)? as u64;
        }
        stream.shutdown(Shutdown::Write)?;
        // The server finishes when it has read all; until then nothing is known to have arrived.
        match stream.read(&mut [0])? {
            0 => Ok(sent),
            _ => Err(io::Error::other("the server of an upload spoke")),
        }
    })
}

pub(super) fn download(target: SocketAddr, connections: usize, seconds: f64) -> anyhow::Result<Outcome> {
    let millis = Duration::from_secs_f64(seconds).as_millis();
    let question = u32::try_from(millis).context("too long")?.to_be_bytes();
    together(target, connections, move |mut stream| {
        let mut buffer = vec![0; SWALLOW];
        stream.write_all(&question)?;
        let mut come = 0;
        loop {
            match recv(stream.as_fd(), &mut buffer[..], RecvFlags::TRUNC) {
                Ok((_, 0)) => return Ok(come),
                Ok((_, length)) => come += length as u64,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    })
}

/// Connects all, begins at one moment, and ends with the last.
fn together(
    target: SocketAddr,
    connections: usize,
    carry: impl Fn(TcpStream) -> io::Result<u64> + Sync,
) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
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
    let (start, carry) = (&start, &carry);
    let (begun, before) = thread::scope(|scope| {
        let begin = move |stream| {
            start.wait();
            carry(stream)
        };
        let threads: Vec<_> = streams.into_iter().map(|stream| scope.spawn(move || begin(stream))).collect();
        let before = Cpu::now()?;
        let begun = Instant::now();
        start.wait();
        for thread in threads {
            match thread.join() {
                Ok(Ok(bytes)) => outcome.bytes += bytes,
                Ok(Err(error)) => failures.note("carrying", error),
                Err(_) => failures.note("carrying", "panicked"),
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
    let stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}
