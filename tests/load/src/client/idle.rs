//! Connections that make one round trip and are then held open.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Instant;

use super::bulk::connect;
use super::failures::Failures;
use crate::cpu::Cpu;
use crate::job::JobOutcome;
use crate::service::{ECHO, Script};

/// The client prints this line when all connections are open.
pub const OPEN: &str = "open";

/// Threads that open connections.
const OPENERS: usize = 8;

/// Opens the connections, holds them until standard input has a line or ends, and closes them.
pub(super) fn run(target: SocketAddr, connections: usize) -> anyhow::Result<JobOutcome> {
    let (before, begun) = (Cpu::now()?, Instant::now());
    let mut failures = Failures::default();
    let mut held = Vec::with_capacity(connections);
    thread::scope(|scope| {
        let share = |opener| connections / OPENERS + usize::from(opener < connections % OPENERS);
        let openers: Vec<_> = (0..OPENERS)
            .map(|opener| scope.spawn(move || (0..share(opener)).map(|_| open(target)).collect::<Vec<_>>()))
            .collect();
        for opener in openers {
            match opener.join() {
                Ok(opened) => held.extend(opened),
                Err(_) => failures.note("opening", "panicked"),
            }
        }
    });
    let mut outcome = JobOutcome { connections: connections as u64, ..JobOutcome::default() };
    let mut streams = Vec::with_capacity(connections);
    for opened in held {
        match opened {
            Ok(stream) => streams.push(stream),
            Err(error) => failures.note("opening", error),
        }
    }
    outcome.sessions = streams.len() as u64;
    println!("{OPEN}");
    io::stdout().flush()?;
    io::stdin().read_line(&mut String::new())?;
    drop(streams);
    outcome.seconds = begun.elapsed().as_secs_f64();
    outcome.cpu = Cpu::now()? - before;
    failures.into(&mut outcome);
    Ok(outcome)
}

/// One connection after a round trip, so that its header has been sent.
fn open(target: SocketAddr) -> io::Result<TcpStream> {
    let Script::Dialogue { steps: &[(request, response), ..], .. } = ECHO.script else {
        return Err(io::ErrorKind::Unsupported.into());
    };
    let mut stream = connect(target)?;
    stream.write_all(&vec![b'x'; request])?;
    stream.read_exact(&mut vec![0; response])?;
    Ok(stream)
}
