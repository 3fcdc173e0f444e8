//! The splice engine, user half: it terminates TCP at both sides, has the header put in by `inject` and the payload
//! carried by `verdict`. The programs are in `injector-ebpf/src/splice/`, under the same names.

mod alarms;
pub mod inject;
mod maps;
pub mod selftest;
pub mod verdict;

use std::{
    fmt, io,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{MapData, MapError, SockHash},
    programs::{ProgramError, SkMsg, SkSkb},
};
use aya_log::EbpfLogger;
use injector_common::splice::Counter;
use thiserror::Error;

use self::{alarms::Alarms, maps::Maps};
use crate::metrics::BpfCounters;

/// The loaded and attached programs with their maps. Dropping it detaches them: end all sessions first.
pub struct Splice {
    maps: Maps,
    credit: u64,
    alarms: Alarms,
    // Holds the attachments.
    programs: Mutex<Ebpf>,
}

/// Why the engine cannot be had.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The kernel did not take the object: no rights, or a mechanism that it does not have.
    #[error("loading the BPF programs: {}{}", chain(.0), advice(.0))]
    Load(#[from] EbpfError),
    /// A program was refused, by the verifier or at attachment.
    #[error("program {program}: {}", refusal(.error))]
    Program {
        /// Its name.
        program: &'static str,
        /// What the kernel said.
        #[source]
        error: ProgramError,
    },
    /// A map is not what the daemon expects.
    #[error("map {map}: {}", chain(.error))]
    Map {
        /// Its name.
        map: &'static str,
        /// What is wrong.
        #[source]
        error: MapError,
    },
    /// The object in this binary lacks a part: daemon and programs were not built together.
    #[error("this binary's BPF object has no {0}; build it again with `cargo xtask build`")]
    Missing(&'static str),
}

/// A loaded program, for reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramReport {
    /// Its name.
    pub name: String,
    /// Instructions that the verifier walked to prove it safe; `None` before Linux 5.16.
    pub verified_instructions: Option<u32>,
}

impl Splice {
    /// Loads the programs, with maps for `connections` connections, and attaches them. A direction rings for its
    /// backlog to be looked at after every `alarm_step` bytes, and more often in the beginning; should nobody look in time,
    /// the kernel stops carrying it when `credit` bytes may be waiting.
    ///
    /// # Errors
    /// [`LoadError`]: typically missing CAP_BPF or CAP_NET_ADMIN.
    pub fn load(connections: u32, alarm_step: u64, credit: u64) -> Result<Self, LoadError> {
        let directions = connections.saturating_mul(2);
        let mut programs = EbpfLoader::new()
            .map_max_entries("INJECT", connections)
            .map_max_entries("TARGETS", directions)
            .map_max_entries("VERDICT", directions)
            .map_max_entries("FLOWS", directions)
            .map_max_entries("CREDIT", directions)
            .override_global("ALARM_STEP", &alarm_step, true)
            .load(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/injector-bpf")))?;
        let maps = Maps::take(&mut programs)?;

        let failed = |program| move |error| LoadError::Program { program, error };
        let inject: &mut SkMsg = program(&mut programs, "inject")?;
        inject.load().map_err(failed("inject"))?;
        inject.attach(lock(&maps.inject).fd()).map_err(failed("inject"))?;
        let verdict: &mut SkSkb = program(&mut programs, "verdict")?;
        verdict.load().map_err(failed("verdict"))?;
        verdict.attach(lock(&maps.verdict).fd()).map_err(failed("verdict"))?;
        Ok(Self { maps, credit, alarms: Alarms::default(), programs: Mutex::new(programs) })
    }

    /// The log lines that the programs write from now on, as `log` records; can be taken once. What they wrote before,
    /// in the self-test, is thrown away: it provokes what would alarm an operator.
    ///
    /// # Errors
    /// When it was taken already.
    pub fn logger(&self) -> Result<EbpfLogger<&'static dyn log::Log>, aya_log::Error> {
        let mut logger =
            EbpfLogger::init_with_logger(&mut lock(&self.programs), &PROGRAM_LOG as &dyn log::Log)?;
        logger.flush();
        PROGRAM_LOG.heard.store(true, Ordering::Relaxed);
        Ok(logger)
    }

    /// Listens to what the programs ring, until the runtime ends. Without it nobody is held back.
    ///
    /// # Errors
    /// When it was called already, or the runtime cannot poll the ring buffer.
    pub async fn follow_alarms(&self) -> io::Result<()> {
        let ring = lock(&self.maps.alarms).take();
        let ring = ring.ok_or_else(|| io::Error::other("the alarms are followed already"))?;
        self.alarms.follow(ring).await
    }

    /// The loaded programs and what they cost the verifier.
    #[must_use]
    pub fn programs(&self) -> Vec<ProgramReport> {
        let programs = lock(&self.programs);
        programs
            .programs()
            .filter_map(|(name, program)| {
                let info = program.info().ok()?;
                let verified_instructions = info.verified_instruction_count();
                Some(ProgramReport { name: name.to_owned(), verified_instructions })
            })
            .collect()
    }

    /// How many sockets and flows the maps hold now; all zero when no connection is spliced.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn entries(&self) -> Result<usize, MapError> {
        self.maps.entries()
    }

    /// Whether a thread without capabilities can still use the maps. Since Linux 6.4 only creating and loading need
    /// rights (bpf_prog_load, map_create, kernel/bpf/syscall.c); before that every bpf(2) call did, unless
    /// unprivileged BPF was allowed.
    #[must_use]
    pub fn works_without_rights(&self) -> bool {
        let tried = std::thread::scope(|scope| {
            let without_rights = scope.spawn(|| {
                caps::clear(None, caps::CapSet::Effective).ok()?;
                self.maps.probe().ok()
            });
            without_rights.join()
        });
        matches!(tried, Ok(Some(())))
    }
}

static PROGRAM_LOG: ProgramLog = ProgramLog { heard: AtomicBool::new(false) };

/// Passes on what the programs log, once it is to be heard.
struct ProgramLog {
    heard: AtomicBool,
}

impl log::Log for ProgramLog {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        self.heard.load(Ordering::Relaxed) && log::logger().enabled(metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.heard.load(Ordering::Relaxed) {
            log::logger().log(record);
        }
    }

    fn flush(&self) {
        log::logger().flush();
    }
}

impl fmt::Debug for Splice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Splice").field("programs", &self.programs()).finish_non_exhaustive()
    }
}

impl BpfCounters for Splice {
    fn read(&self) -> Vec<(&'static str, &'static str, u64)> {
        let counted = |counter: Counter| {
            let (program, event) = counter.labels();
            (program, event, self.maps.counted(counter))
        };
        Counter::ALL.into_iter().map(counted).collect()
    }
}

fn program<'a, P>(programs: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, LoadError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let program = programs.program_mut(name).ok_or(LoadError::Missing(name))?;
    program.try_into().map_err(|error| LoadError::Program { program: name, error })
}

type Sockets = Mutex<SockHash<MapData, u64>>;

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// An error with all its causes, without repeating a cause that the error already prints.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

/// Why a program was refused; of the verifier's log the last words, which name the fault.
fn refusal(error: &ProgramError) -> String {
    let ProgramError::LoadError { io_error, verifier_log } = error else { return chain(error) };
    let log = verifier_log.to_string();
    let statistics = ["verification time", "stack depth", "processed"];
    let told = log.lines().filter(|line| !statistics.iter().any(|start| line.starts_with(start)));
    let last: Vec<_> = told.filter(|line| !line.is_empty()).collect();
    let last = last.split_at_checked(last.len().saturating_sub(2)).map_or(&last[..], |(_, last)| last);
    format!("{io_error}; the verifier's last words: {}", last.join("; "))
}

fn advice(error: &EbpfError) -> &'static str {
    let text = chain(error);
    if text.contains("os error 1)") {
        " (run as root, or with CAP_BPF and CAP_NET_ADMIN)"
    } else if text.contains("os error 12)") {
        " (not enough memory for the maps: lower limits.max_connections)"
    } else {
        ""
    }
}
