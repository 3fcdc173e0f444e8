//! A backend in a process of its own, which can be killed: this test binary, started again in the
//! mail namespace.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use anyhow::Context;
use injector_testbed::netns;
use injector_testbed::process::Process;
use tempfile::TempDir;

use crate::testbed::{LIMIT, Testbed, backend_address};
use crate::transfers::pattern;

/// Environment variable of the backend process: its behaviour.
const VARIABLE: &str = "INJECTOR_FAULTS_VICTIM";

/// What the backend process does after the first messages, until it is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// Reads everything except the last byte, so that unread data remains.
    Read,
    /// Sends [`pattern`] of this seed repeatedly, and reads nothing.
    Send,
}

impl Behaviour {
    const ALL: [Self; 2] = [Self::Read, Self::Send];

    const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Send => "send",
        }
    }
}

/// What [`Behaviour::Send`] repeats.
pub(crate) fn sent() -> Vec<u8> {
    pattern(23, 1 << 20)
}

/// The behaviour, if this process is to be a backend process.
pub(crate) fn requested() -> Option<Behaviour> {
    let name = std::env::var(VARIABLE).ok()?;
    Behaviour::ALL.into_iter().find(|behaviour| behaviour.name() == name)
}

/// Serves one connection, until it is killed.
pub(crate) fn run(behaviour: Behaviour) {
    if let Err(error) = serve(behaviour) {
        eprintln!("the backend process ended by itself: {error:#}");
    }
}

fn serve(behaviour: Behaviour) -> anyhow::Result<()> {
    let listener = TcpListener::bind(backend_address())?;
    let (mut stream, _) = listener.accept()?;
    // The header, then the first message.
    let mut first = [0; 512];
    let _ = stream.read(&mut first)?;
    stream.write_all(b"220 hello\r\n")?;
    let _ = stream.read(&mut first)?;
    stream.write_all(b"250 go on\r\n")?;
    match behaviour {
        Behaviour::Read => read(&mut stream),
        Behaviour::Send => {
            let bytes = sent();
            loop {
                stream.write_all(&bytes)?;
            }
        }
    }
}

fn read(stream: &mut TcpStream) -> anyhow::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        let waiting = stream.peek(&mut buffer)?;
        match buffer.get_mut(..waiting.saturating_sub(1)) {
            Some(all_but_one) if !all_but_one.is_empty() => stream.read_exact(all_but_one)?,
            _ => std::thread::sleep(Duration::from_micros(100)),
        }
    }
}

/// A running backend process.
#[derive(Debug)]
pub(crate) struct KillableBackend {
    process: Process,
    _dir: TempDir,
}

impl KillableBackend {
    /// Starts it, and waits until it listens.
    pub(crate) fn start(testbed: &Testbed, behaviour: Behaviour) -> anyhow::Result<Self> {
        let dir = netns::scratch_dir("backend")?;
        let mut command = testbed.topology.mail.command(std::env::current_exe()?);
        command.env(VARIABLE, behaviour.name());
        let mut process =
            Process::start("backend", &testbed.topology.mail, command, &dir.path().join("output"))?;
        process
            .wait_listening(&testbed.topology.mail, &[backend_address()], LIMIT)
            .context("the backend process")?;
        Ok(Self { process, _dir: dir })
    }

    /// Kills it by SIGKILL, without waiting.
    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        self.process.signal(libc::SIGKILL)
    }
}
