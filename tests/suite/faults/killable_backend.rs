//! A backend that is a process of its own, to be killed: this test binary, started again in the mail namespace.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use anyhow::Context;
use injector_testbed::netns;
use injector_testbed::process::Process;
use tempfile::TempDir;

use crate::testbed::{LIMIT, Testbed, backend_address};
use crate::transfers::pattern;

/// In the environment of the victim: its habit.
const VARIABLE: &str = "INJECTOR_FAULTS_VICTIM";

/// What the victim does after the first words, until it is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Habit {
    /// Reads, but for the last byte: when it dies, something is unread.
    Read,
    /// Sends [`pattern`] of this seed over and over, and reads nothing.
    Send,
}

impl Habit {
    const ALL: [Self; 2] = [Self::Read, Self::Send];

    const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Send => "send",
        }
    }
}

/// What [`Habit::Send`] repeats.
pub(crate) fn sent() -> Vec<u8> {
    pattern(23, 1 << 20)
}

/// Whether this process is to be a victim, and which.
pub(crate) fn asked() -> Option<Habit> {
    let name = std::env::var(VARIABLE).ok()?;
    Habit::ALL.into_iter().find(|habit| habit.name() == name)
}

/// Serves one connection, until it is killed.
pub(crate) fn run(habit: Habit) {
    if let Err(error) = serve(habit) {
        eprintln!("the victim ended by itself: {error:#}");
    }
}

fn serve(habit: Habit) -> anyhow::Result<()> {
    let listener = TcpListener::bind(backend_address())?;
    let (mut stream, _) = listener.accept()?;
    // The header, then the first words.
    let mut first = [0; 512];
    let _ = stream.read(&mut first)?;
    stream.write_all(b"220 hello\r\n")?;
    let _ = stream.read(&mut first)?;
    stream.write_all(b"250 go on\r\n")?;
    match habit {
        Habit::Read => read(&mut stream),
        Habit::Send => {
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

/// A running victim.
#[derive(Debug)]
pub(crate) struct Victim {
    process: Process,
    _dir: TempDir,
}

impl Victim {
    /// Starts it, and waits until it listens.
    pub(crate) fn start(testbed: &Testbed, habit: Habit) -> anyhow::Result<Self> {
        let dir = netns::scratch_dir("victim")?;
        let mut command = testbed.topology.mail.command(std::env::current_exe()?);
        command.env(VARIABLE, habit.name());
        let mut process =
            Process::start("victim", &testbed.topology.mail, command, &dir.path().join("output"))?;
        process.wait_listening(&testbed.topology.mail, &[backend_address()], LIMIT).context("the victim")?;
        Ok(Self { process, _dir: dir })
    }

    /// Kills it by SIGKILL, without waiting.
    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        self.process.signal(libc::SIGKILL)
    }
}
